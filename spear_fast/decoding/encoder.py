"""The source side, for decoding: utterances one behind the other, no work on padding, weights as modules hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spear_fast import ops
from spear_fast.decoding.linear import FeedForward, Linear, Weights, check_weights
from spear_fast.decoding.transfer import to_device
from spear_fast.decoding.watch import Watch

# source tokens that are encoded together, by type of device: on a CPU what passes between layers then stays in caches
ENCODE_TOKENS = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class EncoderLayer:
    """One layer: the norms' gammas, `[dim]`, and products; as in the reference, query head i reads `i % kv_heads`."""

    attention_gamma: Tensor
    query: Linear
    key_value: Linear
    output: Linear
    feed_forward_gamma: Tensor
    feed_forward: FeedForward
    freqs: Tensor


class Encoder:
    """Weights of one source side; `from_modules` makes it.

    embedding: `[vocabulary, dim]`. gamma: `[dim]`, the final norm's.
    """

    layers: list[EncoderLayer]
    embedding: Tensor
    gamma: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    _watch: Watch

    def __init__(self) -> None:
        raise TypeError("an Encoder is made from modules: call Encoder.from_modules.")

    @classmethod
    @torch.no_grad()
    def from_modules(cls, source_transformer: Any, token_embedding: Tensor, *, weights: Weights = "exact") -> Encoder:
        """Returns the encoder of a `Transformer` without cross-attention, of this package or of the reference.

        weights: see `Decoder.from_modules`.
        """
        check_weights(weights, token_embedding)
        self = object.__new__(cls)
        self._watch = Watch([source_transformer], [token_embedding])
        attention = source_transformer.layers[0][0]
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.head_dim = attention.to_q[0].weight.shape[0] // self.heads
        self.embedding = token_embedding.detach()
        self.gamma = source_transformer.final_norm.gamma.detach()
        self.layers = [
            _layer(attention, feed_forward, weights) for attention, _, feed_forward in source_transformer.layers
        ]
        return self

    def is_stale(self) -> bool:
        """Returns whether a parameter that was packed has since been changed, moved or replaced; see `Watch`."""
        return self._watch.changed()

    def __call__(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns the memory `[tokens, dim]` of utterances one behind the other.

        ids: `[tokens]`, int64, in the vocabulary. lengths: `[utterances]`, int64, on the host; they sum up to `tokens`.
        """
        bounds, longest = packed_bounds(lengths)
        bounds = to_device(bounds, ids.device)
        x = self.embedding[ids]
        for layer in self.layers:
            normed = ops.rms_norm(x, layer.attention_gamma)
            query = layer.query(normed).unflatten(-1, (self.heads, self.head_dim))
            key, value = layer.key_value(normed).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(1)
            attended = ops.attention(
                query,
                key,
                value,
                cu_query=bounds,
                cu_key=bounds,
                max_query=longest,
                max_key=longest,
                freqs=layer.freqs,
                modulo_heads=self.heads != self.kv_heads,
            )
            x = layer.output(attended.flatten(1), x)
            x = layer.feed_forward(ops.rms_norm(x, layer.feed_forward_gamma), x)
        return ops.rms_norm(x, self.gamma)

    def encoded(self, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the memories `[n, dim]` of sources, ids `[n]` int64 on the host, encoded together."""
        lengths = torch.tensor([len(source) for source in sources])
        ids = to_device(torch.cat(list(sources)), self.embedding.device)
        return self(ids, lengths).split(lengths.tolist())


def tokens_together(device: torch.device) -> int:
    """Returns how many source tokens are best encoded together on such a device."""
    return ENCODE_TOKENS.get(device.type, ENCODE_TOKENS["cuda"])


def packed_bounds(lengths: Tensor) -> tuple[Tensor, int]:
    """Returns the cumulative lengths of sequences one behind the other, `[n + 1]` int32, and the longest length.

    lengths: `[sequences]` int64, on the host.
    """
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    bounds[1:] = lengths.cumsum(0)
    return bounds, int(lengths.max())


def _layer(attention: Any, feed_forward: Any, weights: Weights) -> EncoderLayer:
    norm, first, _, _, last = feed_forward
    held = (first.weight.detach(), first.bias.detach(), last.weight.detach(), last.bias.detach())
    return EncoderLayer(
        attention_gamma=attention.norm.gamma.detach(),
        query=Linear(attention.to_q[0].weight.detach(), weights=weights, pack=False),
        key_value=Linear(attention.to_kv[0].weight.detach(), weights=weights, pack=False),
        output=Linear(attention.to_out.weight.detach(), weights=weights, pack=False),
        feed_forward_gamma=norm.gamma.detach(),
        feed_forward=FeedForward(*held, weights=weights, pack=False),
        freqs=attention.rotary_emb.freqs.detach().float(),
    )
