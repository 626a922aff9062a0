"""The weights of one target side, laid out for decoding: packed once, from live modules.

This is the one place of decoding that knows how the reference lays out its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spear_fast.decoding.linear import FeedForward, Linear, Weights, check_weights, fed_forward, folded, head_order
from spear_fast.decoding.watch import Watch

# elements of the projected memory that are held besides the result
CHUNK = 1 << 24


@dataclass(frozen=True)
class DecoderLayer:
    """Products of one layer; those after a norm have its gamma and scale folded in, so that the norm is `unit`.

    query_key_value: to `[(heads + 2 * kv_heads) * head_dim]`; query head i reads kv head `i // (heads / kv_heads)`.
    null_key, null_value: `[heads, head_dim]`. null_output: `[dim]`, cross-attention seeing the null key alone.
    """

    query_key_value: Linear
    self_output: Linear
    cross_query: Linear
    cross_output: Linear
    null_key: Tensor
    null_value: Tensor
    null_output: Tensor
    feed_forward: FeedForward
    freqs: Tensor


@dataclass(frozen=True)
class EarlyExit:
    """The head that drafts: `logits(unit(feed_forward(x)))` of the hidden state after `depth` layers."""

    depth: int
    feed_forward: FeedForward
    logits: Linear


@dataclass(frozen=True)
class ProjectedMemory:
    """Cross-attention keys and values of a batch, once for each utterance and layer.

    keys, values: for each layer `[batch, heads, length, head_dim]`. lengths: `[batch]` int64.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor


class Decoder:
    """Packed weights of one target side.

    layers: the decoder's layers. embedding: `[vocabulary + 1, dim]`, the start vector last, at `start_id`.
    logits: the final norm's gamma and the tied embedding. early_exit: the drafting head, or None.
    eos_id: the id that ends a sequence, None when nothing does. pad_id: what fills up results; any integer.
    native: the whole step in C++, of float32 models on a CPU; None elsewhere. weights: how they are held, see `Linear`.
    """

    def __init__(self) -> None:
        raise TypeError("a Decoder is made from modules: call Decoder.from_modules.")

    layers: list[DecoderLayer]
    embedding: Tensor
    logits: Linear
    memory_key_value: Linear
    early_exit: EarlyExit | None
    heads: int
    kv_heads: int
    head_dim: int
    dim: int
    vocab_size: int
    start_id: int
    eos_id: int | None
    pad_id: int
    native: Any
    weights: Weights
    _watch: Watch

    @classmethod
    @torch.no_grad()
    def from_modules(
        cls,
        target_transformer: Any,
        token_embedding: Tensor,
        start_token: Tensor,
        *,
        eos_id: int | None,
        pad_id: int,
        early_exit: tuple[int, Any] | None = None,
        weights: Weights = "exact",
    ) -> Decoder:
        """Returns the decoder of a `Transformer` with cross-attention, of this package or of the reference.

        token_embedding: `[vocabulary, dim]`, also the logits' matrix. start_token: `[dim]`.
        early_exit: the number of layers below it and the head: feed-forward with residual, norm, linear.
        weights: "int8" rounds the products' weights, and what they are multiplied with, to 8 bits; of float32 models on
            x86 CPUs.

        Raises ValueError when the transformer has no cross-attention, or when its weights cannot be held so.
        """
        self = object.__new__(cls)
        modules = [target_transformer, *([] if early_exit is None else [early_exit[1]])]
        self._watch = Watch(modules, [token_embedding, start_token])
        if not len(target_transformer.layers) or any(layer[1] is None for layer in target_transformer.layers):
            raise ValueError(
                "a decoder needs layers with cross-attention, got a transformer without; pass the target's."
            )
        check_weights(weights, token_embedding)
        self.weights = weights
        attention = target_transformer.layers[0][0]
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.vocab_size, self.dim = token_embedding.shape
        self.head_dim = attention.to_q[0].weight.shape[0] // self.heads
        self.eos_id = eos_id if eos_id is not None and 0 <= eos_id < self.vocab_size else None
        self.pad_id = pad_id
        self.embedding = torch.cat((token_embedding.detach(), start_token.detach()[None]))
        self.start_id = self.vocab_size
        self.layers = [_layer(own, cross, last, weights) for own, cross, last in target_transformer.layers]
        projections = [layer[1].to_kv[0].weight for layer in target_transformer.layers]
        self.memory_key_value = Linear(torch.cat(projections).detach(), weights=weights)
        self.logits = Linear(folded(token_embedding, target_transformer.final_norm), weights=weights)
        self.early_exit = None
        if early_exit is not None:
            depth, (residual, norm, linear) = early_exit
            head = Linear(folded(linear.weight, norm), weights=weights)
            self.early_exit = EarlyExit(depth, fed_forward(residual.fn, weights), head)
        self.native = _native(self)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def row_by_row(self) -> bool:
        """Whether products give a row the same bits whatever rows, and however many, are beside it."""
        return self.logits.packed is not None

    def is_stale(self) -> bool:
        """Returns whether a parameter that was packed has since been changed, moved or replaced; see `Watch`."""
        return self._watch.changed()

    def project_memory(self, memory: Tensor, mask: Tensor) -> ProjectedMemory:
        """Returns the cross-attention keys and values of all layers, masked positions left out.

        memory: `[batch, length, dim]`. mask: `[batch, length]`, bool; positions have no order in cross-attention, so
        holes close up. The length of the result is that of the longest row.
        """
        lengths = mask.sum(dim=-1)
        batch, longest = memory.shape[0], int(lengths.max())
        shape = (len(self.layers), 2, batch, self.heads, longest, self.head_dim)
        # what lies behind a row's length must be finite
        make = torch.empty if int(lengths.min()) == longest else torch.zeros
        projected = make(shape, dtype=self.dtype, device=self.device)
        rows, columns = mask.nonzero(as_tuple=True)
        slots = (mask.cumsum(dim=-1) - 1)[rows, columns]
        size = max(1, CHUNK // (2 * len(self.layers) * self.heads * self.head_dim))
        for begin in range(0, len(rows), size):
            row, slot = rows[begin : begin + size], slots[begin : begin + size]
            product = self.memory_key_value(memory[row, columns[begin : begin + size]].to(self.dtype))
            product = product.view(len(row), len(self.layers), 2, self.heads, self.head_dim)
            # advanced indices on both sides of a slice put their dimension first
            projected[:, :, row, :, slot] = product
        return ProjectedMemory(list(projected[:, 0]), list(projected[:, 1]), lengths)


def _native(decoder: Decoder) -> Any:
    """Returns the extension's object that makes whole steps with these weights, or None where it cannot."""
    if decoder.logits.packed is None:
        return None
    linears, constants = [], []
    for layer in decoder.layers:
        attentions = (layer.query_key_value, layer.self_output, layer.cross_query, layer.cross_output)
        linears += [each.packed for each in (*attentions, layer.feed_forward.both, layer.feed_forward.out)]
        constants += [layer.null_key, layer.null_value, layer.null_output, layer.feed_forward.bias, layer.freqs]
    return torch.classes.spear_fast.DecoderLayers(
        [*linears, decoder.logits.packed], constants, decoder.embedding, decoder.heads, decoder.kv_heads
    )


def _layer(self_attention: Any, cross_attention: Any, feed_forward: Any, weights: Weights) -> DecoderLayer:
    heads, kv_heads = self_attention.heads, self_attention.kv_heads
    # query head i of the reference reads kv head i % kv_heads; here those of one kv head stand together
    order = head_order(heads, kv_heads).to(self_attention.to_out.weight.device)
    query = self_attention.to_q[0].weight.detach().unflatten(0, (heads, -1))[order].flatten(0, 1)
    output = self_attention.to_out.weight.detach().unflatten(1, (heads, -1))[:, order].flatten(1)
    null_key, null_value = cross_attention.null_kv.detach()[:, :, 0]
    cross_output = cross_attention.to_out.weight.detach()
    return DecoderLayer(
        query_key_value=Linear(
            folded(torch.cat((query, self_attention.to_kv[0].weight.detach())), self_attention.norm), weights=weights
        ),
        self_output=Linear(output, weights=weights),
        cross_query=Linear(folded(cross_attention.to_q[0].weight, cross_attention.norm), weights=weights),
        cross_output=Linear(cross_output, weights=weights),
        null_key=null_key.contiguous(),
        null_value=null_value.contiguous(),
        null_output=cross_output @ null_value.flatten(),
        feed_forward=fed_forward(feed_forward, weights),
        freqs=self_attention.rotary_emb.freqs.detach().float(),
    )
