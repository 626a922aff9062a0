"""The backward pass of attention for queries: a block of queries passes over the keys, as in the forward pass.

Weights are computed again from the log-sum-exp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_blocks import (
    LOG2E,
    angles,
    dropout_mask,
    key_bounds,
    load_lse,
    load_rows,
    load_size,
    span,
    store_rows,
)
from .blocks import product
from .precision import cast
from .rotation import rotate


@triton.jit
def _pass_over_keys(
    b_query,
    b_grad_out,
    b_lse,
    b_delta,
    b_grad_query,
    key,
    value,
    key_mask,
    s_key,
    s_value,
    s_mask,
    start,
    end,
    n_keys,
    scale,
    o_query,
    i_line,
    b_seed,
    threshold,
    share,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    NULLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
):
    """Adds what the keys start..end - 1 give to the gradient of the queries; see the forward pass."""
    for i_key in range(start, end, BLOCK_KEY):
        o_key = i_key + tl.arange(0, BLOCK_KEY)
        m_key = None
        if MASKED:
            m_key = o_key < n_keys
            if key_mask is not None:
                m_key = m_key & (tl.load(key_mask + o_key * s_mask, mask=m_key, other=0) != 0)
        b_key = load_rows(key, o_key, s_key, m_key, HEAD_DIM, SIZE)
        b_value = load_rows(value, o_key, s_value, m_key, HEAD_DIM, SIZE)
        b_weights = tl.exp2(product(b_query, tl.trans(b_key), INTERPRETED) * scale - b_lse[:, None])
        if MASKED:
            m_read = m_key[None, :]  # type: ignore[index]
            if CAUSAL:
                m_read = m_read & (o_query[:, None] >= o_key[None, :])
            b_weights = tl.where(m_read, b_weights, 0.0)
        b_grad = product(b_grad_out, tl.trans(b_value), INTERPRETED)
        if b_seed is not None:
            m_dropout = dropout_mask(b_seed, threshold, o_query[:, None], o_key[None, :] + NULLS, i_line)
            b_grad = tl.where(m_dropout, b_grad * share, 0.0)
        b_grad = b_weights * (b_grad - b_delta[:, None])
        b_grad_query += product(cast(b_grad, b_key.dtype, INTERPRETED), b_key, INTERPRETED)
    return b_grad_query


@triton.jit(do_not_specialize=["threshold"])
def attention_backward_query_kernel(
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
    s_grad_row,
    s_grad,
    s_grad_head,
    s_query_row,
    s_query,
    s_query_head,
    s_key_row,
    s_key,
    s_key_head,
    s_value_row,
    s_value,
    s_value_head,
    s_mask_row,
    s_mask,
    length,
    key_length,
    heads,
    kv_heads,
    blocks,
    scale,
    threshold,
    share,
    CAUSAL: tl.constexpr,
    MODULO: tl.constexpr,
    INTERPRETED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
):
    """A program computes the gradient of one block of queries of one head of one row; see the forward kernel.

    query, key: rotated already where there are freqs. out, grad_query: contiguous.
    delta: float32, like lse; written here: the sum over head_dim of out * grad_out.
    partial_key, partial_value: float32, `[programs, HEAD_DIM]`; written here: what this block adds to the gradients of
        the null key and value. None without.
    """
    i_program = tl.program_id(0)
    i_block = i_program % blocks
    i_head = i_program // blocks % heads
    i_row = i_program // blocks // heads
    if CAUSAL:
        i_block = blocks - 1 - i_block
    row, first, n_queries = span(cu_query, i_row, length)
    start = i_block * BLOCK_QUERY
    if start >= n_queries:
        return
    key_row, first_key, n_keys = span(cu_key, i_row, key_length)
    i_kv_head = i_head % kv_heads if MODULO else i_head // (heads // kv_heads)
    i_line = i_row * heads + i_head
    grad_out += row * s_grad_row + first * s_grad + i_head * s_grad_head
    query += row * s_query_row + first * s_query + i_head * s_query_head
    key += key_row * s_key_row + first_key * s_key + i_kv_head * s_key_head
    value += key_row * s_value_row + first_key * s_value + i_kv_head * s_value_head
    out += ((row * length + first) * heads + i_head) * HEAD_DIM
    grad_query += ((row * length + first) * heads + i_head) * HEAD_DIM
    lse += (row * heads + i_head) * length + first
    delta += (row * heads + i_head) * length + first
    if key_mask is not None:
        key_mask += row * s_mask_row
    b_seed = None
    if seed is not None:
        b_seed = tl.load(seed)

    o_query = start + tl.arange(0, BLOCK_QUERY)
    m_query = o_query < n_queries
    b_query = load_rows(query, o_query, s_query, m_query, HEAD_DIM, SIZE)
    b_grad_out = load_rows(grad_out, o_query, s_grad, m_query, HEAD_DIM, SIZE)
    b_out = load_rows(out, o_query, heads * HEAD_DIM, m_query, HEAD_DIM, SIZE)
    b_delta = tl.sum(b_out.to(tl.float32) * b_grad_out.to(tl.float32), 1)
    tl.store(delta + o_query, b_delta, mask=m_query)
    b_lse = load_lse(lse, o_query, m_query)

    NULLS: tl.constexpr = 0 if null_key is None else 1
    b_grad_query = tl.zeros([BLOCK_QUERY, SIZE], tl.float32)
    if null_key is not None:
        b_null_key = load_size(null_key + i_kv_head * HEAD_DIM, HEAD_DIM, SIZE)
        b_null_value = load_size(null_value + i_kv_head * HEAD_DIM, HEAD_DIM, SIZE)
        b_weight = tl.exp2(tl.sum(b_query.to(tl.float32) * b_null_key[None, :], 1) * scale - b_lse)
        b_grad = tl.sum(b_grad_out.to(tl.float32) * b_null_value[None, :], 1)
        b_dropped = b_weight
        if b_seed is not None:
            m_dropout = dropout_mask(b_seed, threshold, o_query, tl.zeros([], tl.int32), i_line)
            b_grad = tl.where(m_dropout, b_grad * share, 0.0)
            b_dropped = tl.where(m_dropout, b_weight * share, 0.0)
        b_grad = b_weight * (b_grad - b_delta)
        o_size = tl.arange(0, SIZE)
        o_partial = i_program.to(tl.int64) * HEAD_DIM + o_size
        b_partial = tl.sum(b_query.to(tl.float32) * b_grad[:, None], 0) * (scale / LOG2E)
        tl.store(partial_key + o_partial, b_partial, mask=o_size < HEAD_DIM)
        b_partial = tl.sum(b_grad_out.to(tl.float32) * b_dropped[:, None], 0)
        tl.store(partial_value + o_partial, b_partial, mask=o_size < HEAD_DIM)
        b_grad_query = b_grad[:, None] * b_null_key[None, :]

    full, bound = key_bounds(key_mask, s_mask, n_keys, 1024)
    if CAUSAL:
        full = tl.minimum(full, start + 1)
        bound = tl.minimum(bound, start + BLOCK_QUERY)
    full = full // BLOCK_KEY * BLOCK_KEY
    b_grad_query = _pass_over_keys(
        b_query, b_grad_out, b_lse, b_delta, b_grad_query, key, value, key_mask, s_key, s_value, s_mask, 0, full,
        n_keys, scale, o_query, i_line, b_seed, threshold, share, False, CAUSAL, NULLS, INTERPRETED, HEAD_DIM, SIZE,
        BLOCK_KEY,
    )  # fmt: skip
    b_grad_query = _pass_over_keys(
        b_query, b_grad_out, b_lse, b_delta, b_grad_query, key, value, key_mask, s_key, s_value, s_mask, full, bound,
        n_keys, scale, o_query, i_line, b_seed, threshold, share, True, CAUSAL, NULLS, INTERPRETED, HEAD_DIM, SIZE,
        BLOCK_KEY,
    )  # fmt: skip

    b_grad_query = b_grad_query * (scale / LOG2E)
    if freqs is not None:
        b_cos, b_sin = angles(freqs, o_query, HEAD_DIM, SIZE)
        b_grad_query = rotate(b_grad_query, b_cos, -b_sin)
    store_rows(grad_query, o_query, heads * HEAD_DIM, m_query, b_grad_query, HEAD_DIM, SIZE, INTERPRETED)
