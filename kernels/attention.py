"""Attention over whole sequences and its gradients: what is launched, with which sizes."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .attention_backward_key_value import attention_backward_key_value_kernel
from .attention_backward_query import attention_backward_query_kernel
from .attention_forward import attention_forward_kernel
from .attention_rotation import rotated
from .blocks import INTERPRETED, padded, rows_apart
from .tiles import tile


def _strides(x: Tensor) -> tuple[int, ...]:
    """Returns how far rows, positions and heads are apart; packed rows have offsets instead."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]


def _sizes(query: Tensor, key: Tensor, cu_query: Tensor | None, max_query: int, max_key: int) -> tuple[int, int, int]:
    """Returns the number of rows and the lengths of the longest."""
    if cu_query is not None:
        return cu_query.shape[0] - 1, max_query, max_key
    return query.shape[0], query.shape[1], key.shape[1]


def _settings(
    query: Tensor, causal: bool, modulo_heads: bool, dropout: float, kernel: str
) -> tuple[tuple[float, int, float], dict]:
    """Returns the kernel's last three numbers (scale in base 2, what dropout keeps and how much), and its constants."""
    size = query.shape[-1]
    # random numbers take registers: without them blocks are larger
    row = kernel if dropout > 0 or query.dtype.itemsize > 2 else f"{kernel}_plain"
    constants = {
        "CAUSAL": causal,
        "MODULO": modulo_heads,
        "INTERPRETED": INTERPRETED,
        "HEAD_DIM": size,
        "SIZE": padded(size),
        **tile(row, query.device, size, query.dtype),
    }
    return (size**-0.5 * math.log2(math.e), math.ceil(dropout * 2**24), 1 / (1 - dropout)), constants


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_query: Tensor | None,
    cu_key: Tensor | None,
    max_query: int,
    max_key: int,
    null_key: Tensor | None,
    null_value: Tensor | None,
    freqs: Tensor | None,
    causal: bool,
    modulo_heads: bool,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns the output, like query, and the log-sum-exp; see the op."""
    heads, kv_heads = query.shape[-2], key.shape[-2]
    rows, longest, longest_key = _sizes(query, key, cu_query, max_query, max_key)
    out = query.new_empty(query.shape)
    lse = query.new_empty((*query.shape[:-3], heads, query.shape[-3]), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query, key, value = rows_apart(query), rows_apart(key), rows_apart(value)
    key = rotated(key, freqs, cu_key, longest_key)
    numbers, constants = _settings(query, causal, modulo_heads, dropout, "attention_forward")
    blocks = triton.cdiv(longest, constants["BLOCK_QUERY"])
    attention_forward_kernel[(blocks * heads * rows,)](
        query,
        key,
        value,
        out,
        lse,
        key_mask,
        cu_query,
        cu_key,
        None if null_key is None else null_key.contiguous(),
        None if null_value is None else null_value.contiguous(),
        freqs,
        seed if dropout > 0 else None,
        *_strides(query),
        *_strides(key),
        *_strides(value),
        *((0, 0) if key_mask is None else key_mask.stride()),
        query.shape[-3],
        key.shape[-3],
        heads,
        kv_heads,
        blocks,
        *numbers,
        **constants,
    )
    return out, lse


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    cu_query: Tensor | None,
    cu_key: Tensor | None,
    max_query: int,
    max_key: int,
    null_key: Tensor | None,
    null_value: Tensor | None,
    freqs: Tensor | None,
    causal: bool,
    modulo_heads: bool,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key, value, null key and null value; see the op."""
    heads, kv_heads, size = query.shape[-2], key.shape[-2], query.shape[-1]
    rows, longest, longest_key = _sizes(query, key, cu_query, max_query, max_key)
    grad_query, grad_key, grad_value = (each.new_empty(each.shape) for each in (query, key, value))
    grad_out, query, key, value = (rows_apart(each) for each in (grad_out, query, key, value))
    query = rotated(query, freqs, cu_query, longest)
    key = rotated(key, freqs, cu_key, longest_key)
    out, lse = out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    null_key = None if null_key is None else null_key.contiguous()
    null_value = None if null_value is None else null_value.contiguous()
    seed = seed if dropout > 0 else None
    strides = *_strides(grad_out), *_strides(query), *_strides(key), *_strides(value)
    strides = *strides, *((0, 0) if key_mask is None else key_mask.stride())
    lengths = query.shape[-3], key.shape[-3]

    numbers, constants = _settings(query, causal, modulo_heads, dropout, "attention_backward_query")
    blocks = triton.cdiv(longest, constants["BLOCK_QUERY"])
    partial_key, partial_value = None, None
    if null_key is not None:
        # blocks past the end of packed rows write nothing
        partial_key, partial_value = query.new_zeros((2, rows, heads, blocks, size), dtype=torch.float32)
    if query.numel() > 0:
        attention_backward_query_kernel[(blocks * heads * rows,)](
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            delta,
            grad_query,
            partial_key,
            partial_value,
            key_mask,
            cu_query,
            cu_key,
            null_key,
            null_value,
            freqs,
            seed,
            *strides,
            *lengths,
            heads,
            kv_heads,
            blocks,
            *numbers,
            **constants,
        )

    numbers, constants = _settings(query, causal, modulo_heads, dropout, "attention_backward_key_value")
    blocks = triton.cdiv(longest_key, constants["BLOCK_KEY"])
    if key.numel() > 0:
        attention_backward_key_value_kernel[(blocks * kv_heads * rows,)](
            grad_out,
            query,
            key,
            value,
            lse,
            delta,
            grad_key,
            grad_value,
            key_mask,
            cu_query,
            cu_key,
            null_key,
            freqs,
            seed,
            *strides,
            *lengths,
            heads,
            kv_heads,
            blocks,
            *numbers,
            **constants,
        )
    grad_null_key = _of_null(partial_key, kv_heads, modulo_heads, query)
    grad_null_value = _of_null(partial_value, kv_heads, modulo_heads, query)
    return grad_query, grad_key, grad_value, grad_null_key, grad_null_value


def _of_null(partial: Tensor | None, kv_heads: int, modulo_heads: bool, like: Tensor) -> Tensor:
    """Returns the gradient `[kv_heads, head_dim]` of a null key or value, `[0]` without one, in like's dtype.

    partial: `[rows, heads, blocks, head_dim]`, what each block of queries adds to it.
    """
    if partial is None:
        return like.new_empty(0)
    by_head = partial.sum((0, 2))
    if modulo_heads:
        by_group = by_head.unflatten(0, (-1, kv_heads)).sum(0)
    else:
        by_group = by_head.unflatten(0, (kv_heads, -1)).sum(1)
    return by_group.to(like.dtype)
