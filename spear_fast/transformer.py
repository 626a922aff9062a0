"""The reference's transformer: same parameter names and numerics, without its caches.

Decoding does not go through these modules: `spear_fast.decoding` packs their weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spear_fast.layer_weights import LayerWeights, layer_weights
from spear_fast.layers import (
    GEGLU,
    Attention,
    FeedForward,
    Residual,
    RMSNorm,
    RotaryEmbedding,
    alignment_of,
    autocast_dtype,
)  # fmt: skip
from spear_fast.packing import Reads


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
        # whether training keeps each layer's input alone and computes the rest again for the gradients
        self.checkpoint_activations = False
        # whether under autocast the residual stream has autocast's type, as the matmuls, instead of the weights'
        self.half_residual = False

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        return_hiddens: bool = False,
        early_exit_at_layer: int | None = None,
        *,
        reads: Reads | None = None,
        context_reads: Reads | None = None,
        hidden_of: int | None = None,
    ) -> Any:
        """Returns `[batch, length, dim]` after the final norm.

        x: `[batch, length, dim]`. mask: `[batch, length]`, bool. context: `[batch, context_length, dim]`.
        context_mask: `[batch, context_length]`, bool.
        return_hiddens: also return `[depth, batch, length, dim]`, each layer's output before the norm.
        early_exit_at_layer: return that layer's output, counted from 1, without the norm.
        hidden_of: instead of return_hiddens, also return that one layer's output, counted from 1, before the norm.
        reads, context_reads: instead of the masks, for packed rows: x, context and the results are then `[total, dim]`
            where their rows differ in length. Not for a transformer that is `unpackable`.
        """
        reads = Reads(key_mask=mask) if reads is None else reads
        context_reads = Reads(key_mask=context_mask) if context_reads is None else context_reads
        as_modules = unpackable(self) is not None
        half = autocast_dtype(x) if self.half_residual else None
        x = x if half is None else x.to(half)
        hiddens: list[Tensor] = []
        added: Tensor | None = None
        layers: Any = self.layers
        for number, layer in enumerate(layers, start=1):
            if as_modules:
                x = _by_modules(layer, x, reads.key_mask, context, context_reads.key_mask)
            else:
                weights = layer_weights(layer, half, alignment=alignment_of(x))
                given = (layer, weights, x, added, context, reads, context_reads)
                if self.checkpoint_activations and torch.is_grad_enabled():
                    x, added = checkpoint(_layer, *given, use_reentrant=False)
                else:
                    x, added = _layer(*given)
            if number in (early_exit_at_layer, hidden_of) or return_hiddens:
                x, added = x if added is None else x + added, None
            if number == early_exit_at_layer:
                return x
            if return_hiddens or number == hidden_of:
                hiddens.append(x)
        out, _ = self.final_norm.after_sum(x, added) if added is not None else (self.final_norm(x), x)
        if hidden_of is not None:
            return out, hiddens[0]
        return (out, torch.stack(hiddens)) if return_hiddens else out


def _layer(
    layer: Any,
    weights: LayerWeights,
    x: Tensor,
    added: Tensor | None,
    context: Tensor | None,
    reads: Reads,
    context_reads: Reads,
) -> tuple[Tensor, Tensor]:
    """Returns the residual stream after a layer as two terms, of which the next norm takes the sum.

    The layer's input is `x + added`.
    """
    self_attention, cross_attention, feed_forward = layer
    own, cross, forward = weights
    normed, x = self_attention.norm.after_sum(x, added, own.gamma)
    added = self_attention.after_norm(normed, own, reads)
    if cross is not None:
        normed, x = cross_attention.norm.after_sum(x, added, cross.gamma)
        added = cross_attention.after_norm(normed, cross, context_reads, context)
    normed, x = feed_forward[0].after_sum(x, added, forward.gamma)
    return x, feed_forward.after_norm(normed, forward)


def _by_modules(layer: Any, x: Tensor, mask: Tensor | None, context: Tensor | None, context_mask: Tensor | None) -> Any:
    """Returns a layer's output, every module called: some have been replaced or are watched."""
    self_attention, cross_attention, feed_forward = layer
    x = self_attention(x, mask=mask) + x
    if cross_attention is not None:
        x = cross_attention(x, context=context, mask=context_mask) + x
    return feed_forward(x) + x


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
