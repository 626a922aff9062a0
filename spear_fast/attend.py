"""Scaled dot-product attention over heads, with the reference's grouping of query heads and its masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Returns `softmax(query @ key.T / sqrt(head_dim)) @ value`, `[batch, heads, length, head_dim]`.

    query: `[batch, heads, length, head_dim]`.
    key, value: `[batch, kv_heads, key_length, head_dim]`; query head i reads head `i % kv_heads` (the reference's
        attend.py:139).
    key_mask: `[batch, key_length]`, bool, False where a key must not be read; a row without any readable key gives
        zeros.
    causal: position i reads keys up to i; needs `length == key_length`.
    dropout: probability with which an attention weight is dropped.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat(1, groups, 1, 1) for tensor in (key, value))
    if key_mask is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=causal)
    mask = key_mask[:, None, None, :]
    if causal:
        length = query.shape[-2]
        mask = mask & torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
