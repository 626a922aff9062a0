"""What a provider of `attention` is told of the arguments before it says whether it takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class AttentionOptions(NamedTuple):
    """What a provider of `attention` may refuse, beside device, dtype and head size."""

    packed: bool = False
    masked: bool = False
    null: bool = False
    rotary: bool = False
    causal: bool = False
    grouped: bool = False
    modulo: bool = False
    dropout: bool = False


def options_of(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> AttentionOptions:
    """Returns the options of a call of `attention` with these arguments, by position."""
    key_mask, cu_query, _, _, _, null_key, _, freqs, causal, modulo_heads, dropout, _ = others
    kv_heads = key.shape[-2]
    grouped = kv_heads != query.shape[-2]
    return AttentionOptions(
        packed=cu_query is not None,
        masked=key_mask is not None,
        null=null_key is not None,
        rotary=freqs is not None,
        causal=causal,
        grouped=grouped,
        # one key head, or one for each query head, is read alike in either order
        modulo=modulo_heads and grouped and kv_heads > 1,
        dropout=dropout > 0,
    )
