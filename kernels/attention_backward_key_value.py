"""The backward pass of attention for keys and values: a block of keys passes over all queries that may read it.

Each gradient is summed by the one program that writes it, over the heads that share a key head too: the same input
gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_blocks import LOG2E, angles, dropout_mask, load_lse, load_rows, span, store_rows
from .blocks import product
from .precision import cast
from .rotation import rotate


@triton.jit
def _pass_over_queries(
    b_key,
    b_value,
    b_grad_key,
    b_grad_value,
    query,
    grad_out,
    lse,
    delta,
    s_query,
    s_grad,
    start,
    end,
    n_queries,
    scale,
    o_key,
    i_line,
    b_seed,
    threshold,
    share,
    CAUSAL: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    NULLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
):
    """Adds what the queries start..end - 1 give to the gradients of the keys and values; the matmuls are transposed.

    CAUSAL: whether some of them are before some of the keys. KEY, VALUE: whose gradients are wanted.
    """
    for i_query in range(start, end, BLOCK_QUERY):
        o_query = i_query + tl.arange(0, BLOCK_QUERY)
        m_query = o_query < n_queries
        b_query = load_rows(query, o_query, s_query, m_query, HEAD_DIM, SIZE)
        b_lse = load_lse(lse, o_query, m_query)
        b_weights = tl.exp2(product(b_key, tl.trans(b_query), INTERPRETED) * scale - b_lse[None, :])
        if CAUSAL:
            b_weights = tl.where(o_query[None, :] >= o_key[:, None], b_weights, 0.0)
        b_dropped = b_weights
        if b_seed is not None:
            m_dropout = dropout_mask(b_seed, threshold, o_query[None, :], o_key[:, None] + NULLS, i_line)
            b_dropped = tl.where(m_dropout, b_weights * share, 0.0)
        b_grad_out = load_rows(grad_out, o_query, s_grad, m_query, HEAD_DIM, SIZE)
        if VALUE:
            b_grad_value += product(cast(b_dropped, b_grad_out.dtype, INTERPRETED), b_grad_out, INTERPRETED)
        if KEY:
            b_delta = tl.load(delta + o_query, mask=m_query, other=0.0)
            b_grad = b_dropped * product(b_value, tl.trans(b_grad_out), INTERPRETED) - b_weights * b_delta[None, :]
            b_grad_key += product(cast(b_grad, b_query.dtype, INTERPRETED), b_query, INTERPRETED)
    return b_grad_key, b_grad_value


@triton.jit
def _pass_over_heads(
    b_key,
    b_value,
    b_grad_key,
    b_grad_value,
    query,
    grad_out,
    lse,
    delta,
    s_query,
    s_query_head,
    s_grad,
    s_grad_head,
    start,
    diagonal,
    n_queries,
    scale,
    o_key,
    row,
    i_row,
    i_kv_head,
    first,
    length,
    heads,
    kv_heads,
    b_seed,
    threshold,
    share,
    CAUSAL: tl.constexpr,
    MODULO: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    NULLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
):
    """Adds what all queries of all heads that read this key head give to its gradients."""
    group = heads // kv_heads
    for i_group in range(group):
        i_head = i_group * kv_heads + i_kv_head if MODULO else i_kv_head * group + i_group
        i_line = i_row * heads + i_head
        p_query = query + i_head * s_query_head
        p_grad_out = grad_out + i_head * s_grad_head
        p_lse = lse + (row * heads + i_head) * length + first
        p_delta = delta + (row * heads + i_head) * length + first
        if CAUSAL:
            b_grad_key, b_grad_value = _pass_over_queries(
                b_key, b_value, b_grad_key, b_grad_value, p_query, p_grad_out, p_lse, p_delta, s_query, s_grad, start,
                diagonal, n_queries, scale, o_key, i_line, b_seed, threshold, share, True, KEY, VALUE, NULLS,
                INTERPRETED, HEAD_DIM, SIZE, BLOCK_QUERY,
            )  # fmt: skip
        b_grad_key, b_grad_value = _pass_over_queries(
            b_key, b_value, b_grad_key, b_grad_value, p_query, p_grad_out, p_lse, p_delta, s_query, s_grad, diagonal,
            n_queries, n_queries, scale, o_key, i_line, b_seed, threshold, share, False, KEY, VALUE, NULLS,
            INTERPRETED, HEAD_DIM, SIZE, BLOCK_QUERY,
        )  # fmt: skip
    return b_grad_key, b_grad_value


@triton.jit(do_not_specialize=["threshold"])
def attention_backward_key_value_kernel(
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
    SWEEPS: tl.constexpr,
):
    """A program computes the gradients of one block of keys and values of one key head, from all heads that read it.

    query, key: rotated already where there are freqs. grad_key, grad_value: contiguous. delta: as the kernel of the
    queries wrote it. blocks: of keys in the longest row. SWEEPS: 2 where the registers do not hold both
    gradients at once, and values and keys each get a pass over the queries.
    """
    i_program = tl.program_id(0)
    i_block = i_program % blocks
    i_kv_head = i_program // blocks % kv_heads
    i_row = i_program // blocks // kv_heads
    key_row, first_key, n_keys = span(cu_key, i_row, key_length)
    start_key = i_block * BLOCK_KEY
    if start_key >= n_keys:
        return
    row, first, n_queries = span(cu_query, i_row, length)
    grad_out += row * s_grad_row + first * s_grad
    query += row * s_query_row + first * s_query
    key += key_row * s_key_row + first_key * s_key + i_kv_head * s_key_head
    value += key_row * s_value_row + first_key * s_value + i_kv_head * s_value_head
    grad_key += ((key_row * key_length + first_key) * kv_heads + i_kv_head) * HEAD_DIM
    grad_value += ((key_row * key_length + first_key) * kv_heads + i_kv_head) * HEAD_DIM
    b_seed = None
    if seed is not None:
        b_seed = tl.load(seed)
    NULLS: tl.constexpr = 0 if null_key is None else 1

    o_key = start_key + tl.arange(0, BLOCK_KEY)
    m_key = o_key < n_keys
    m_read = m_key
    start = 0
    diagonal = 0
    if CAUSAL:
        start = start_key // BLOCK_QUERY * BLOCK_QUERY
        diagonal = tl.minimum(tl.cdiv(start_key + BLOCK_KEY, BLOCK_QUERY) * BLOCK_QUERY, n_queries)
    if key_mask is not None:
        m_read = tl.load(key_mask + key_row * s_mask_row + o_key * s_mask, mask=m_key, other=0) != 0
        # a block of keys that nobody reads has no work
        if tl.max(m_read.to(tl.int32), 0) == 0:
            start = n_queries
            diagonal = n_queries
    b_key = load_rows(key, o_key, s_key, m_read, HEAD_DIM, SIZE)
    b_value = load_rows(value, o_key, s_value, m_read, HEAD_DIM, SIZE)
    b_grad_key = tl.zeros([BLOCK_KEY, SIZE], tl.float32)
    b_grad_value = tl.zeros([BLOCK_KEY, SIZE], tl.float32)
    if SWEEPS == 1:
        b_grad_key, b_grad_value = _pass_over_heads(
            b_key, b_value, b_grad_key, b_grad_value, query, grad_out, lse, delta, s_query, s_query_head, s_grad,
            s_grad_head, start, diagonal, n_queries, scale, o_key, row, i_row, i_kv_head, first, length, heads,
            kv_heads, b_seed, threshold, share, CAUSAL, MODULO, True, True, NULLS, INTERPRETED, HEAD_DIM, SIZE,
            BLOCK_QUERY,
        )  # fmt: skip
    else:
        _, b_grad_value = _pass_over_heads(
            b_key, b_value, b_grad_key, b_grad_value, query, grad_out, lse, delta, s_query, s_query_head, s_grad,
            s_grad_head, start, diagonal, n_queries, scale, o_key, row, i_row, i_kv_head, first, length, heads,
            kv_heads, b_seed, threshold, share, CAUSAL, MODULO, False, True, NULLS, INTERPRETED, HEAD_DIM, SIZE,
            BLOCK_QUERY,
        )  # fmt: skip
    # the weights of keys that are not read were never set to zero: only their own gradients saw them
    b_grad_value = tl.where(m_read[:, None], b_grad_value, 0.0)
    store_rows(grad_value, o_key, kv_heads * HEAD_DIM, m_key, b_grad_value, HEAD_DIM, SIZE, INTERPRETED)
    if SWEEPS == 2:
        b_grad_key, _ = _pass_over_heads(
            b_key, b_value, b_grad_key, b_grad_key, query, grad_out, lse, delta, s_query, s_query_head, s_grad,
            s_grad_head, start, diagonal, n_queries, scale, o_key, row, i_row, i_kv_head, first, length, heads,
            kv_heads, b_seed, threshold, share, CAUSAL, MODULO, True, False, NULLS, INTERPRETED, HEAD_DIM, SIZE,
            BLOCK_QUERY,
        )  # fmt: skip
    b_grad_key = tl.where(m_read[:, None], b_grad_key * (scale / LOG2E), 0.0)
    if freqs is not None:
        b_cos, b_sin = angles(freqs, o_key, HEAD_DIM, SIZE)
        b_grad_key = rotate(b_grad_key, b_cos, -b_sin)
    store_rows(grad_key, o_key, kv_heads * HEAD_DIM, m_key, b_grad_key, HEAD_DIM, SIZE, INTERPRETED)
