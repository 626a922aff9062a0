"""How the reference lays out its parameters: the one place of decoding that reads its modules.

`read_*` turn modules, of this package or of the reference, into the layers that packed weights are made of.
`ParameterWatch` tells whether they have changed since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spear_fast.decoding.packed.linear import Linear, PackedFeedForward, Weights, defers_norm, packs

# values of each parameter that show whether it has changed
SAMPLES = 16


@dataclass(frozen=True)
class DecoderLayer:
    """Matmuls of one layer, and gammas of the norms before them, `[dim]`: `self_gamma`, `cross_gamma`, `feed_gamma`.

    Where the extension packs the weights, gammas and scales are folded into them, and those here are None: see
    `normalize`. Where `norm_deferred`, see `defers_norm`, the gammas are folded and those here are ones.
    query_key_value: to `[(heads + 2 * kv_heads) * head_dim]`; query head i reads kv head `i // (heads / kv_heads)`.
    null_key, null_value: `[heads, head_dim]`. null_output: `[dim]`, cross-attention seeing the null key alone.
    """

    norm_deferred: bool
    self_gamma: Tensor | None
    query_key_value: Linear
    self_output: Linear
    cross_gamma: Tensor | None
    cross_query: Linear
    cross_output: Linear
    null_key: Tensor
    null_value: Tensor
    null_output: Tensor
    feed_gamma: Tensor | None
    feed_forward: PackedFeedForward
    freqs: Tensor


@dataclass(frozen=True)
class EarlyExit:
    """The head that drafts: feed-forward with residual, norm, logits, of the hidden state after `depth` layers."""

    depth: int
    feed_gamma: Tensor | None
    feed_forward: PackedFeedForward
    gamma: Tensor | None
    logits: Linear


@dataclass(frozen=True)
class EncoderLayer:
    """One layer: the norms' gammas, `[dim]`, and matmuls; as in the reference, query head i reads `i % kv_heads`.

    projections: to `[(heads + 2 * kv_heads) * head_dim]`, queries, keys and values; of a model that is float32 on a CPU
    two, over the weights as the modules hold them. feed_forward_gamma: None where `defers_norm`, and folded.
    """

    attention_gamma: Tensor
    projections: tuple[Linear, ...]
    output: Linear
    feed_forward_gamma: Tensor | None
    feed_forward: PackedFeedForward
    freqs: Tensor


def read_decoder_layer(self_attention: Any, cross_attention: Any, feed_forward: Any, weights: Weights) -> DecoderLayer:
    """Returns the packed layer of a target side's modules."""
    heads, kv_heads = self_attention.heads, self_attention.kv_heads
    # query head i of the reference reads kv head i % kv_heads; here those of one kv head stand together
    order = head_order(heads, kv_heads).to(self_attention.to_out.weight.device)
    query = self_attention.to_q[0].weight.detach().unflatten(0, (heads, -1))[order].flatten(0, 1)
    output = self_attention.to_out.weight.detach().unflatten(1, (heads, -1))[:, order].flatten(1)
    null_key, null_value = cross_attention.null_kv.detach()[:, :, 0]
    cross_output = cross_attention.to_out.weight.detach()
    query_key_value = torch.cat((query, self_attention.to_kv[0].weight.detach()))
    deferred = defers_norm(query_key_value)
    self_gamma, query_key_value = split_norm(query_key_value, self_attention.norm, deferred)
    cross_gamma, cross_query = split_norm(cross_attention.to_q[0].weight.detach(), cross_attention.norm, deferred)
    feed_gamma, packed_feed_forward = _normed_feed_forward(feed_forward, weights, deferred)
    return DecoderLayer(
        norm_deferred=deferred,
        self_gamma=self_gamma,
        query_key_value=Linear(query_key_value, weights=weights),
        self_output=Linear(output, weights=weights),
        cross_gamma=cross_gamma,
        cross_query=Linear(cross_query, weights=weights),
        cross_output=Linear(cross_output, weights=weights),
        null_key=null_key.contiguous(),
        null_value=null_value.contiguous(),
        null_output=cross_output @ null_value.flatten(),
        feed_gamma=feed_gamma,
        feed_forward=packed_feed_forward,
        freqs=self_attention.rotary_emb.freqs.detach().float(),
    )


def read_early_exit(depth: int, head: Any, weights: Weights) -> EarlyExit:
    """Returns the packed head that drafts after `depth` layers: feed-forward with residual, norm, linear."""
    residual, norm, linear = head
    gamma, weight = split_norm(linear.weight.detach(), norm)
    return EarlyExit(depth, *_normed_feed_forward(residual.fn, weights), gamma, Linear(weight, weights=weights))


def read_memory_key_value(target_transformer: Any, weights: Weights) -> Linear:
    """Returns the matmul from the encoder's output to the cross-attention keys and values of all layers."""
    projections = [layer[1].to_kv[0].weight for layer in target_transformer.layers]
    return Linear(torch.cat(projections).detach(), weights=weights)


def read_encoder_layer(attention: Any, feed_forward: Any, weights: Weights) -> EncoderLayer:
    """Returns one layer of a source side, on a CPU over float32 weights as the modules hold them."""
    norm, first, _, _, last = feed_forward
    projections = [attention.to_q[0].weight.detach(), attention.to_kv[0].weight.detach()]
    deferred = defers_norm(first.weight)
    if not packs(first.weight):
        projections = [torch.cat(projections)]
    up_gate = fold_norm(first.weight, norm) if deferred else first.weight.detach()
    held = (up_gate, first.bias.detach(), last.weight.detach(), last.bias.detach())
    return EncoderLayer(
        attention_gamma=attention.norm.gamma.detach(),
        projections=tuple(Linear(each, weights=weights, pack=False) for each in projections),
        output=Linear(attention.to_out.weight.detach(), weights=weights, pack=False),
        feed_forward_gamma=None if deferred else norm.gamma.detach(),
        feed_forward=PackedFeedForward(*held, weights=weights, pack=False),
        freqs=attention.rotary_emb.freqs.detach().float(),
    )


def split_norm(weight: Tensor, norm: Any, deferred: bool = False) -> tuple[Tensor | None, Tensor]:
    """Returns a norm's gamma and the weights `[out, dim]` after it; None for the gamma where it is folded into them.

    deferred: fold the gamma alone, and return ones for it.
    """
    if packs(weight):
        return None, fold_norm(weight, norm, weight.shape[-1] ** 0.5)
    gamma = norm.gamma.detach()
    return (torch.ones_like(gamma), fold_norm(weight, norm)) if deferred else (gamma, weight.detach())


def fold_norm(weight: Tensor, norm: Any, scale: float = 1.0) -> Tensor:
    """Returns `weight` `[out, dim]` times the norm's gamma and `scale`, rounded once."""
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return (exact * (norm.gamma.detach() * scale)).to(weight.dtype)


def head_order(heads: int, kv_heads: int) -> Tensor:
    """Returns the reference's query heads, `[heads]`, so ordered that those of one key head stand together.

    Head i of the reference reads key head `i % kv_heads`.
    """
    return torch.arange(heads, device="cpu").view(-1, kv_heads).t().flatten()


def _normed_feed_forward(
    feed_forward: Any, weights: Weights, deferred: bool = False
) -> tuple[Tensor | None, PackedFeedForward]:
    norm, first, _, _, last = feed_forward
    gamma, weight = split_norm(first.weight.detach(), norm, deferred)
    held = first.bias.detach(), last.weight.detach(), last.bias.detach()
    return gamma, PackedFeedForward(weight, *held, weights)


class ParameterWatch:
    """Remembers the parameters of modules, and tensors of their own, as they are now."""

    def __init__(self, modules: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        self._modules, self._tensors = modules, tensors
        self._signature, self._samples = self._current_signature(), self._current_samples()

    def changed(self) -> bool:
        """Returns whether one of them has since been changed, moved or replaced.

        Writing through `.data`, as moving averages and some optimizers do, leaves no trace but the values: a sample of
        them is compared, which shows every change of whole tensors, not that of a single element by hand.
        """
        return self._signature != self._current_signature() or not torch.equal(self._samples, self._current_samples())

    def _current(self) -> list[Tensor]:
        return [*self._tensors, *(parameter for module in self._modules for parameter in module.parameters())]

    def _current_samples(self) -> Tensor:
        """Returns a few values of every parameter, `[values]` float32."""
        flat = [tensor.detach().reshape(-1) for tensor in self._current()]
        return torch.cat([values[:: max(1, len(values) // SAMPLES)].float() for values in flat])

    def _current_signature(self) -> list[tuple]:
        return [
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device)
            for tensor in self._current()
        ]
