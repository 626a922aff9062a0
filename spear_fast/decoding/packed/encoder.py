"""The source side: utterances packed one after the other, no work on padding, weights as the modules hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spear_fast import ops
from spear_fast.decoding.packed.layout import EncoderLayer, ParameterWatch, read_encoder_layer
from spear_fast.decoding.packed.linear import Weights, check_weights
from spear_fast.transfer import to_device

# source tokens that are encoded together, by type of device: on a CPU what passes between layers then stays in caches
ENCODE_TOKENS = {"cpu": 512, "cuda": 8192}
# tokens of each utterance that only fills up a group
FILLER = 64


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
    _watch: ParameterWatch

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
        self._watch = ParameterWatch([source_transformer], [token_embedding])
        attention = source_transformer.layers[0][0]
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.head_dim = attention.to_q[0].weight.shape[0] // self.heads
        self.embedding = token_embedding.detach()
        self.gamma = source_transformer.final_norm.gamma.detach()
        self.layers = [
            read_encoder_layer(attention, feed_forward, weights)
            for attention, _, feed_forward in source_transformer.layers
        ]
        return self

    def is_stale(self) -> bool:
        """Returns whether a packed parameter has since been changed, moved or replaced; see `ParameterWatch`."""
        return self._watch.changed()

    def __call__(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Returns the memory `[tokens, dim]` of utterances one after the other.

        ids: `[tokens]`, int64, in the vocabulary. lengths: `[utterances]`, int64, on the host; they sum up to `tokens`.
        """
        bounds, longest = packed_bounds(lengths)
        bounds = to_device(bounds, ids.device)
        x = self.embedding[ids]
        for layer in self.layers:
            normed = ops.rms_norm(x, layer.attention_gamma)
            projected = [linear(normed).unflatten(-1, (-1, self.head_dim)) for linear in layer.projections]
            query, key, value = split_heads(projected, self.heads, self.kv_heads)
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
            x = layer.output.add_to(x, attended.flatten(1))
            gamma = layer.feed_forward_gamma
            x = layer.feed_forward.add_to(x, None if gamma is None else ops.rms_norm(x, gamma))
        return ops.rms_norm(x, self.gamma)

    def encoded(self, sources: Sequence[Tensor], *, multiple: int = 1) -> Sequence[Tensor]:
        """Returns the memories `[n, dim]` of sources, ids `[n]` int64 on the host, encoded together.

        multiple: tokens are added until their number is one of it. Where the bits of a matmul depend on its number of
            rows, all that are encoded with the same number then are as if each had been encoded so alone.
        """
        lengths = [len(source) for source in sources]
        added = -sum(lengths) % multiple
        # short ones: attention is quadratic
        fillers = [FILLER] * (added // FILLER) + ([added % FILLER] if added % FILLER else [])
        filled = [*sources, torch.zeros(added, dtype=torch.int64, device="cpu")]
        ids = to_device(torch.cat(filled), self.embedding.device)
        memory = self(ids, torch.tensor(lengths + fillers, device="cpu"))
        return memory[: sum(lengths)].split(lengths)


def split_heads(projected: Sequence[Tensor], heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries, keys and values, `[tokens, heads, head_dim]` each, of one projection or of two."""
    sizes = [heads, kv_heads, kv_heads]
    if len(projected) == 1:
        query, key, value = projected[0].split(sizes, dim=1)
        return query, key, value
    query, (key, value) = projected[0], projected[1].split(sizes[1:], dim=1)
    return query, key, value


def tokens_together(device: torch.device) -> int:
    """Returns how many source tokens are best encoded together on such a device."""
    return ENCODE_TOKENS.get(device.type, ENCODE_TOKENS["cuda"])


def packed_bounds(lengths: Tensor) -> tuple[Tensor, int]:
    """Returns the cumulative lengths of sequences one after the other, `[n + 1]` int32, and the longest length.

    lengths: `[sequences]` int64, on the host.
    """
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32, device="cpu")
    bounds[1:] = lengths.cumsum(0)
    return bounds, int(lengths.max())
