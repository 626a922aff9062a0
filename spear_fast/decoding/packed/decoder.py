"""The weights of one target side, packed for decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spear_fast.decoding.packed.fused import FusedWeights
from spear_fast.decoding.packed.layout import (
    DecoderLayer,
    EarlyExit,
    ParameterWatch,
    read_decoder_layer,
    read_early_exit,
    read_memory_key_value,
    split_norm,
)
from spear_fast.decoding.packed.linear import Linear, Weights, check_weights


class Decoder:
    """Packed weights of one target side.

    layers: the decoder's layers. embedding: `[vocabulary + 1, dim]`, the start vector last, at `start_id`.
    final_gamma, logits: of the final norm, see `DecoderLayer`, and the tied embedding. early_exit: the drafting head,
        or None.
    eos_id: the id that ends a sequence, None when nothing does. pad_id: what fills up results; any integer.
    fused: the whole step in C++, of float32 models on a CPU; None elsewhere. cuda_weights: for the whole step of few
        rows in one launch, on CUDA; or None. weights: how they are held, see `Linear`.
    idle_engine: made for an earlier batch, with its buffers and captured steps, for the next one; or None.
    """

    def __init__(self) -> None:
        raise TypeError("a Decoder is made from modules: call Decoder.from_modules.")

    layers: list[DecoderLayer]
    embedding: Tensor
    final_gamma: Tensor | None
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
    fused: Any
    cuda_weights: FusedWeights | None
    weights: Weights
    idle_engine: Any
    _watch: ParameterWatch

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
        weights: "int8" rounds the weights, and what they are multiplied with, to 8 bits; of float32 models on
            x86 CPUs.

        Raises ValueError when the transformer has no cross-attention, or when its weights cannot be held so.
        """
        self = object.__new__(cls)
        modules = [target_transformer, *([] if early_exit is None else [early_exit[1]])]
        self._watch = ParameterWatch(modules, [token_embedding, start_token])
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
        self.layers = [read_decoder_layer(own, cross, last, weights) for own, cross, last in target_transformer.layers]
        self.memory_key_value = read_memory_key_value(target_transformer, weights)
        self.final_gamma, logits = split_norm(token_embedding, target_transformer.final_norm)
        self.logits = Linear(logits, weights=weights)
        self.early_exit = None if early_exit is None else read_early_exit(*early_exit, weights)
        self.fused = _fused(self)
        self.cuda_weights = FusedWeights.of(self) if self.device.type == "cuda" else None
        self.idle_engine = None
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def batch_invariant(self) -> bool:
        """Whether matmuls give a row the same bits whatever rows, and however many, are beside it."""
        return self.logits.packed is not None

    def is_stale(self) -> bool:
        """Returns whether a packed parameter has since been changed, moved or replaced; see `ParameterWatch`."""
        return self._watch.changed()

    def project(self, memory: Tensor) -> Tensor:
        """Returns all layers' cross-attention keys and values, `[rows, layers, 2, heads, head_dim]`: one matmul.

        memory: `[rows, dim]`, the encoder's output, floating point, of one utterance or several.
        """
        projected = self.memory_key_value(memory.to(self.dtype))
        return projected.view(len(memory), len(self.layers), 2, self.heads, self.head_dim)


def _fused(decoder: Decoder) -> Any:
    """Returns the extension's object that makes whole steps with these weights, or None where it cannot."""
    if decoder.logits.packed is None:
        return None
    linears, constants = [], []
    for layer in decoder.layers:
        attentions = (layer.query_key_value, layer.self_output, layer.cross_query, layer.cross_output)
        linears += [each.packed for each in (*attentions, layer.feed_forward.up_gate, layer.feed_forward.down)]
        constants += [layer.null_key, layer.null_value, layer.null_output, layer.feed_forward.bias, layer.freqs]
    return torch.classes.spear_fast.DecoderLayers(
        [*linears, decoder.logits.packed], constants, decoder.embedding, decoder.heads, decoder.kv_heads
    )
