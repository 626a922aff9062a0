"""The reference's transformer: same classes, parameter names and numerics, without its caches.

Decoding does not go through these modules: `spear_fast.decoding` packs their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear_fast import ops


class RMSNorm(nn.Module):
    """`x / max(||x||, 1e-12) * sqrt(dim) * gamma`, over the last dimension (reference line 140).

    x: `[..., dim]`, floating point; where its type differs from gamma's, the result has the larger of both.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # under autocast x may be of another precision than the weights
        dtype = torch.promote_types(x.dtype, self.gamma.dtype)
        return ops.rms_norm(x.to(dtype), self.gamma.to(dtype))


class GEGLU(nn.Module):
    """First half times the exact GELU of the second half of the last dimension (reference line 151)."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(x)


class FeedForward(nn.Sequential):
    """Norm, linear, GEGLU, dropout, linear, with `int(dim * mult * 2 / 3)` inner features (reference line 156).

    The bias of the first linear is added inside the GEGLU, unless another kind of module has replaced the linear
    or a hook wants to see its result.
    """

    def __init__(self, dim: int, mult: float = 4, dropout: float = 0.0) -> None:
        inner = int(dim * mult * 2 / 3)
        super().__init__(RMSNorm(dim), nn.Linear(dim, inner * 2), GEGLU(), nn.Dropout(dropout), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        norm, up_gate, activation, dropout, down = self
        if not is_plain(up_gate) or type(activation) is not GEGLU:
            return super().forward(x)
        projected = F.linear(norm(x), up_gate.weight)
        return down(dropout(ops.geglu(projected, up_gate.bias.to(projected.dtype))))


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
        query = self.to_q(x).unflatten(-1, (self.heads, -1))
        key, value = self.to_kv(x if context is None else context).unflatten(-1, (2, self.kv_heads, -1)).unbind(-3)
        # under autocast the projections are of another type than the parameters
        null_key, null_value = self.null_kv[:, :, 0].to(key.dtype) if self.add_null_kv else (None, None)
        out = ops.attention(
            query,
            key,
            value,
            key_mask=mask,
            null_key=null_key,
            null_value=null_value,
            freqs=None if self.rotary_emb is None else self.rotary_emb.freqs,
            causal=self.causal,
            # the reference's grouping (its attend.py:139)
            modulo_heads=True,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.to_out(out.flatten(-2))


class Transformer(nn.Module):
    """`depth` layers of self-attention, optional cross-attention and feed-forward, each with its residual.

    Without the caches of the reference (reference line 270). The arguments are those of `Attention` and `FeedForward`.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        kv_heads: int | None = None,
        causal: bool = False,
        attn_dropout: float = 0.0,
        ff_mult: float = 4,
        ff_dropout: float = 0.0,
        cross_attend: bool = False,
        attn_flash: bool = False,
    ) -> None:
        super().__init__()
        # attn_flash is the reference's; torch picks the fastest exact attention by itself
        del attn_flash
        rotary_emb = RotaryEmbedding(dim_head)
        shared: dict[str, Any] = {"dim": dim, "dim_head": dim_head, "heads": heads, "dropout": attn_dropout}
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Attention(**shared, kv_heads=kv_heads, causal=causal, rotary_emb=rotary_emb),
                    Attention(**shared, add_null_kv=True) if cross_attend else None,  # type: ignore[list-item]
                    FeedForward(dim=dim, mult=ff_mult, dropout=ff_dropout),
                ]
            )
            for _ in range(depth)
        )
        self.final_norm = RMSNorm(dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        return_hiddens: bool = False,
        early_exit_at_layer: int | None = None,
    ) -> Any:
        """Returns `[batch, length, dim]` after the final norm.

        x: `[batch, length, dim]`. mask: `[batch, length]`, bool. context: `[batch, context_length, dim]`.
        context_mask: `[batch, context_length]`, bool.
        return_hiddens: also return `[depth, batch, length, dim]`, each layer's output before the norm.
        early_exit_at_layer: return that layer's output, counted from 1, without the norm.
        """
        hiddens = []
        layers: Any = self.layers
        for number, (self_attention, cross_attention, feed_forward) in enumerate(layers, start=1):
            x = self_attention(x, mask=mask) + x
            if cross_attention is not None:
                x = cross_attention(x, context=context, mask=context_mask) + x
            x = feed_forward(x) + x
            if number == early_exit_at_layer:
                return x
            if return_hiddens:
                hiddens.append(x)
        out = self.final_norm(x)
        return (out, torch.stack(hiddens)) if return_hiddens else out


# what a transformer is made of, and no other kind of module
_OWN = (
    Attention, FeedForward, GEGLU, RMSNorm, Residual, RotaryEmbedding, Transformer,
    nn.Dropout, nn.Linear, nn.ModuleList, nn.Sequential,
)  # fmt: skip


def unpackable(transformer: Transformer) -> str | None:
    """Returns what a transformer does beyond what its weights say, None for nothing.

    That is a module that has been replaced, as adapters do, or one that calls a hook.
    """
    for name, module in transformer.named_modules():
        if type(module) not in _OWN:
            return f"{name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'it'} has a forward hook"
    return None
