"""The reference's layers: norm, feed-forward and attention, with its class and parameter names and its numerics.

Each layer with a norm of its own also has `after_norm`, for a norm that has been computed with the sum before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear_fast import ops
from spear_fast.layer_weights import AttentionWeights, FeedForwardWeights, feed_forward_weights
from spear_fast.packing import Reads

# of the inner features of a feed-forward on a GPU: others make all its matrices unaligned
ALIGNMENT = 64


class RMSNorm(nn.Module):
    """`x / max(||x||, 1e-12) * sqrt(dim) * gamma`, over the last dimension (reference line 140).

    x: `[..., dim]`, floating point; where its type differs from gamma's, the result has the larger of both, but x's
    under autocast.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = self._dtype(x, x.dtype)
        return ops.rms_norm(x.to(dtype), self.gamma.to(dtype))

    def after_sum(self, x: Tensor, added: Tensor | None, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the norm of `x + added` and the sum itself, computed together; without `added` the norm of x and x.

        added: like x, but perhaps of another type. gamma: this norm's, perhaps of another type.
        """
        gamma = self.gamma if gamma is None else gamma
        dtype = self._dtype(x, x.dtype if added is None else torch.promote_types(x.dtype, added.dtype))
        if added is None:
            return ops.rms_norm(x.to(dtype), gamma.to(dtype)), x
        return ops.rms_norm(added.to(dtype), gamma.to(dtype), x.to(dtype))  # type: ignore[no-any-return]

    def _dtype(self, x: Tensor, stream: torch.dtype) -> torch.dtype:
        return torch.promote_types(stream, self.gamma.dtype) if autocast_dtype(x) is None else stream


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the type that autocast multiplies in where x is; None where it is off."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


class GEGLU(nn.Module):
    """First half times the exact GELU of the second half of the last dimension (reference line 151)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(x)


class FeedForward(nn.Sequential):
    """Norm, linear, GEGLU, dropout, linear, with `int(dim * mult * 2 / 3)` inner features (reference line 156).

    The bias of the first linear is added inside the GEGLU, unless another kind of module has replaced a linear
    or a hook wants to see its result.
    """

    def __init__(self, dim: int, mult: float = 4, dropout: float = 0.0) -> None:
        inner = int(dim * mult * 2 / 3)
        super().__init__(RMSNorm(dim), nn.Linear(dim, inner * 2), GEGLU(), nn.Dropout(dropout), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        norm, up_gate, activation, _, down = self
        if not (is_plain(up_gate) and is_plain(down)) or type(activation) is not GEGLU:
            return super().forward(x)
        return self.after_norm(norm(x), feed_forward_weights(self, alignment=alignment_of(x)))

    def after_norm(self, normed: Tensor, weights: FeedForwardWeights) -> Tensor:
        """Returns what the linears make of the norm's result, of the same shape; they are torch's own."""
        dropout: Any = self[3]
        projected = F.linear(normed, weights.up_gate)
        activated = dropout(ops.geglu(projected, weights.bias.to(projected.dtype)))
        return F.linear(activated, weights.down, weights.down_bias)


def alignment_of(x: Tensor) -> int:
    """Returns of what a feed-forward's inner features are a multiple where x is: a GPU's matrices want alignment."""
    return ALIGNMENT if x.is_cuda else 1


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Returns whether `module` is torch's linear and nobody watches it: its weights may then be used without it."""
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


class Residual(nn.Module):
    """`fn(x) + x` (reference line 131)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class RotaryEmbedding(nn.Module):
    """Rotary positions over interleaved pairs, from frequencies that the state dict carries.

    The frequencies stay in float32 at least when the model moves to a half type: rounded ones rotate positions
    past a few hundred to a wrong angle.
    """

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        # computed as rotary_embedding_torch does, so that fresh models agree to the bit
        freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim))
        self.freqs = nn.Parameter(freqs, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        before = self.freqs.data
        super()._apply(fn, recurse)
        if self.freqs.dtype in (torch.float16, torch.bfloat16):
            self.freqs.data = before.to(self.freqs.device)
        return self


class Attention(nn.Module):
    """Self-attention with rotary positions, or cross-attention with a learned null key and value before the context's.

    The norm is of the query side only: a context comes in as it is (reference line 168).

    dim_head, heads: size and number of query heads. kv_heads: key/value heads, of which `heads` is a multiple; query
        head i reads key/value head i modulo kv_heads. dropout: of attention weights, in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_head: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        rotary_emb: RotaryEmbedding | None = None,
        add_null_kv: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {self.kv_heads}.")
        self.dim_head = dim_head
        self.causal = causal
        self.dropout = dropout
        self.rotary_emb = rotary_emb
        self.add_null_kv = add_null_kv
        self.norm = RMSNorm(dim)
        # in a Sequential because the reference's state dict names them to_q.0 and to_kv.0
        self.to_q = nn.Sequential(nn.Linear(dim, heads * dim_head, bias=False))
        self.to_kv = nn.Sequential(nn.Linear(dim, self.kv_heads * dim_head * 2, bias=False))
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        if add_null_kv:
            self.null_kv = nn.Parameter(torch.randn(2, self.kv_heads, 1, dim_head))

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns `[batch, length, dim]`.

        x: `[batch, length, dim]`. context: `[batch, context_length, dim]`, or None for self-attention.
        mask: `[batch, key length]`, bool, False where a key must not be read; the null key always is.
        """
        x = self.norm(x)
        query, context = self.to_q(x), x if context is None else context
        null = self.null_kv if self.add_null_kv else None
        return self.to_out(self._attend(query, self.to_kv(context), null, Reads(key_mask=mask)))

    def after_norm(
        self, normed: Tensor, weights: AttentionWeights, reads: Reads, context: Tensor | None = None
    ) -> Tensor:
        """Returns what attention makes of the norm's result, of the same shape; the linears are torch's own.

        normed: `[batch, length, dim]` or packed, `[total, dim]`. context: likewise, or None for self-attention, whose
        queries, keys and values are one matmul.
        """
        query = F.linear(normed, weights.query)
        if weights.key_value is None or context is None:
            query, key_value = query.split([self.heads * self.dim_head, 2 * self.kv_heads * self.dim_head], dim=-1)
        else:
            key_value = F.linear(context, weights.key_value)
        return F.linear(self._attend(query, key_value, weights.null_key_value, reads), weights.out)

    def _attend(self, query: Tensor, key_value: Tensor, null_key_value: Tensor | None, reads: Reads) -> Tensor:
        query = query.unflatten(-1, (self.heads, -1))
        key, value = key_value.unflatten(-1, (2, self.kv_heads, -1)).unbind(-3)
        shape = query.shape
        if reads.cu_query is not None:
            # of a packed batch one side's rows may be of one length
            query, key, value = (each.flatten(0, 1) if each.dim() == 4 else each for each in (query, key, value))
        # under autocast the projections are of another type than the parameters
        null_key, null_value = (None, None) if null_key_value is None else null_key_value[:, :, 0].to(key.dtype)
        out = ops.attention(
            query,
            key,
            value,
            **reads._asdict(),
            null_key=null_key,
            null_value=null_value,
            freqs=None if self.rotary_emb is None else self.rotary_emb.freqs,
            causal=self.causal,
            # the reference's grouping (its attend.py:139)
            modulo_heads=True,
            dropout=self.dropout if self.training else 0.0,
        )
        return out.reshape(shape).flatten(-2)
