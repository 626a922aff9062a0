"""The weights of a layer as its matmuls take them: some side by side, some padded, and in autocast's type by one copy.

Under autocast each parameter would be cast by a kernel of its own, and its gradient by another. Here those of a layer
are cast by one, and what is multiplied together is put side by side on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class AttentionWeights(NamedTuple):
    """gamma: `[dim]`, of the norm. query: `[heads * head_dim, dim]`; of self-attention keys' and values' rows follow.

    key_value: `[2 * kv_heads * head_dim, dim]`, None of self-attention. out: `[dim, heads * head_dim]`.
    null_key_value: `[2, kv_heads, 1, head_dim]`, or None.
    """

    gamma: Tensor
    query: Tensor
    key_value: Tensor | None
    out: Tensor
    null_key_value: Tensor | None


class FeedForwardWeights(NamedTuple):
    """gamma: `[dim]`, of the norm. up_gate: `[2 * inner, dim]`, with its bias. down: `[dim, inner]`, with its bias.

    inner may be padded: the columns of values and gates that are added are zeros, and stay zeros.
    """

    gamma: Tensor
    up_gate: Tensor
    bias: Tensor
    down: Tensor
    down_bias: Tensor


class LayerWeights(NamedTuple):
    self_attention: AttentionWeights
    cross_attention: AttentionWeights | None
    feed_forward: FeedForwardWeights


class _Fused(NamedTuple):
    """How one tensor is made of parameters.

    parts: one below the other. lacking: zeros added at the end of both halves of the rows, or of the columns.
    """

    parts: tuple[Tensor, ...]
    lacking: int = 0
    columns: bool = False

    def whole(self) -> Tensor:
        """Returns the tensor in the parameters' own type."""
        if len(self.parts) > 1:
            return torch.cat(self.parts)
        (part,) = self.parts
        if not self.lacking:
            return part
        if self.columns:
            return F.pad(part, (0, self.lacking))
        below = (0, 0) * (part.dim() - 1) + (0, self.lacking)
        return F.pad(part.unflatten(0, (2, -1)), below).flatten(0, 1)

    def empty(self, dtype: torch.dtype) -> Tensor:
        """Returns room for the tensor; what is lacking is zero."""
        first = self.parts[0]
        rows, rest = sum(len(part) for part in self.parts), list(first.shape[1:])
        if not self.lacking:
            return first.new_empty([rows, *rest], dtype=dtype)
        if self.columns:
            return first.new_zeros([rows, rest[0] + self.lacking], dtype=dtype)
        return first.new_zeros([rows + 2 * self.lacking, *rest], dtype=dtype)

    def pieces(self, whole: Tensor) -> list[Tensor]:
        """Returns the parts' views of the tensor; each of its part's shape, halves apart where they are padded."""
        if self.lacking and self.columns:
            return [whole[:, : whole.shape[1] - self.lacking]]
        if self.lacking:
            halves = whole.unflatten(0, (2, -1))
            return [halves[:, : halves.shape[1] - self.lacking]]
        return list(whole.split([len(part) for part in self.parts]))

    def as_pieces(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Returns tensors of the parts' shapes as views of their pieces' shapes."""
        return [part.unflatten(0, (2, -1)) for part in parts] if self.lacking and not self.columns else list(parts)


class _Cast(torch.autograd.Function):
    """Casts the parts of fused tensors, all by one copy; and their gradients back by another."""

    @staticmethod
    def forward(ctx: Any, fused: Sequence[_Fused], dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.fused = fused
        made = [each.empty(dtype) for each in fused]
        pieces = [piece for each, whole in zip(fused, made, strict=True) for piece in each.pieces(whole)]
        torch._foreach_copy_(pieces, [part for each in fused for part in each.as_pieces(each.parts)])
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        found: list[Tensor | None] = []
        targets: list[Tensor] = []
        origins: list[Tensor] = []
        wanted = iter(ctx.needs_input_grad[2:])
        for each, gradient in zip(ctx.fused, gradients, strict=True):
            pieces = [None] * len(each.parts) if gradient is None else each.pieces(gradient)
            for part, piece in zip(each.parts, pieces, strict=True):
                own = torch.empty_like(part) if next(wanted) and piece is not None else None
                found.append(own)
                if own is not None and piece is not None:
                    targets += each.as_pieces([own])
                    origins.append(piece)
        if targets:
            torch._foreach_copy_(targets, origins)
        return None, None, *found


def layer_weights(layer: Any, dtype: torch.dtype | None = None, *, alignment: int = 1) -> LayerWeights:
    """Returns the weights of a transformer's layer, with their gradients' way back to its parameters.

    dtype: what they are cast to; None leaves them as they are. alignment: inner features are padded to its multiple.
    """
    self_attention, cross_attention, feed_forward = layer
    lacking = -feed_forward[-1].in_features % alignment
    fused = [*_attention(self_attention), *_feed_forward(feed_forward, lacking)]
    if cross_attention is not None:
        fused += _attention(cross_attention)
    if dtype is None:
        made = [each.whole() for each in fused]
    else:
        made = list(_Cast.apply(fused, dtype, *(part for each in fused for part in each.parts)))
    gamma, query, out, *rest = made
    own = AttentionWeights(gamma, query, None, out, None)
    return LayerWeights(own, AttentionWeights(*rest[5:]) if rest[5:] else None, FeedForwardWeights(*rest[:5]))


def feed_forward_weights(feed_forward: Any, *, alignment: int = 1) -> FeedForwardWeights:
    """Returns the weights of a feed-forward in their own type; see `layer_weights`."""
    lacking = -feed_forward[-1].in_features % alignment
    return FeedForwardWeights(*(each.whole() for each in _feed_forward(feed_forward, lacking)))


def _attention(attention: Any) -> list[_Fused]:
    """In the order of `AttentionWeights`, without what self-attention has not."""
    query, key_value = attention.to_q[0].weight, attention.to_kv[0].weight
    gamma, out = _Fused((attention.norm.gamma,)), _Fused((attention.to_out.weight,))
    if attention.add_null_kv:
        return [gamma, _Fused((query,)), _Fused((key_value,)), out, _Fused((attention.null_kv,))]
    return [gamma, _Fused((query, key_value)), out]


def _feed_forward(feed_forward: Any, lacking: int) -> list[_Fused]:
    """In the order of `FeedForwardWeights`."""
    norm, up_gate, _, _, down = feed_forward
    return [
        _Fused((norm.gamma,)),
        _Fused((up_gate.weight,), lacking),
        _Fused((up_gate.bias,), lacking),
        _Fused((down.weight,), lacking, columns=True),
        _Fused((down.bias,)),
    ]
