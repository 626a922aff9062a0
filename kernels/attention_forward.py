"""The forward pass of attention: a block of queries passes over the keys with a running softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_blocks import angles, dropout_mask, key_bounds, load_rows, load_size, span, store_rows
from .blocks import product
from .precision import cast
from .rotation import rotate

# what log2 is multiplied by to be a natural logarithm
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _pass_over_keys(
    b_query,
    b_max,
    b_sum,
    b_out,
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
    i_head,
    b_seed,
    threshold,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    NULLS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
):
    """Takes the keys start..end - 1 into the running maximum (base 2), sum and output of the queries.

    MASKED: whether some of them may not be read; else `end - start` is a multiple of the block.
    """
    for i_key in range(start, end, BLOCK_KEY):
        o_key = i_key + tl.arange(0, BLOCK_KEY)
        m_key = None
        if MASKED:
            m_key = o_key < n_keys
            if key_mask is not None:
                m_key = m_key & (tl.load(key_mask + o_key * s_mask, mask=m_key, other=0) != 0)
        b_key = load_rows(key, o_key, s_key, m_key, HEAD_DIM, SIZE)
        b_scores = product(b_query, tl.trans(b_key), INTERPRETED)
        if MASKED:
            m_read = m_key[None, :]  # type: ignore[index]
            if CAUSAL:
                m_read = m_read & (o_query[:, None] >= o_key[None, :])
            b_scores = tl.where(m_read, b_scores, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, 1) * scale)
        b_base = b_new
        if MASKED:
            # a row that has read nothing yet has no largest score to subtract
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weights = tl.exp2(b_scores * scale - b_base[:, None])
        b_shrink = tl.exp2(b_max - b_base)
        b_max = b_new
        b_sum = b_sum * b_shrink + tl.sum(b_weights, 1)
        if b_seed is not None:
            m_dropout = dropout_mask(b_seed, threshold, o_query[:, None], o_key[None, :] + NULLS, i_head)
            b_weights = tl.where(m_dropout, b_weights, 0.0)
        b_value = load_rows(value, o_key, s_value, m_key, HEAD_DIM, SIZE)
        b_out = b_out * b_shrink[:, None]
        b_out += product(cast(b_weights, b_value.dtype, INTERPRETED), b_value, INTERPRETED)
    return b_max, b_sum, b_out


@triton.jit(do_not_specialize=["threshold"])
def attention_forward_kernel(
    query,
    key,
    value,
    out,
    lse,
    key_mask,
    cu_query,
    cu_key,
    null_key,
    null_value,
    freqs,
    seed,
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
    """A program computes one block of queries of one head of one row.

    query, key, value: strided over rows, positions and heads; key is rotated already where there are freqs, query is
        rotated here. key_mask, cu_query, cu_key, null_key, null_value, freqs, seed: None where the option is off.
    out: like query, contiguous. lse: float32, `[rows, heads, length]` or `[heads, total]`.
    length, key_length: of padded rows; of all packed rows together. blocks: of queries in the longest row.
    scale: of the scores, times log2(e). threshold, share: the chance and the weight of what dropout keeps, see
        `dropout_mask`.
    """
    i_program = tl.program_id(0)
    i_block = i_program % blocks
    i_head = i_program // blocks % heads
    i_row = i_program // blocks // heads
    if CAUSAL:
        # the longest pass first, so that no processor ends alone
        i_block = blocks - 1 - i_block
    row, first, n_queries = span(cu_query, i_row, length)
    start = i_block * BLOCK_QUERY
    if start >= n_queries:
        return
    key_row, first_key, n_keys = span(cu_key, i_row, key_length)
    i_kv_head = i_head % kv_heads if MODULO else i_head // (heads // kv_heads)
    i_line = i_row * heads + i_head
    query += row * s_query_row + first * s_query + i_head * s_query_head
    key += key_row * s_key_row + first_key * s_key + i_kv_head * s_key_head
    value += key_row * s_value_row + first_key * s_value + i_kv_head * s_value_head
    out += ((row * length + first) * heads + i_head) * HEAD_DIM
    lse += (row * heads + i_head) * length + first
    if key_mask is not None:
        key_mask += row * s_mask_row
    b_seed = None
    if seed is not None:
        b_seed = tl.load(seed)

    o_query = start + tl.arange(0, BLOCK_QUERY)
    m_query = o_query < n_queries
    b_query = load_rows(query, o_query, s_query, m_query, HEAD_DIM, SIZE)
    if freqs is not None:
        b_cos, b_sin = angles(freqs, o_query, HEAD_DIM, SIZE)
        b_query = cast(rotate(b_query.to(tl.float32), b_cos, b_sin), b_query.dtype, INTERPRETED)

    NULLS: tl.constexpr = 0 if null_key is None else 1
    if null_key is None:
        b_max = tl.full([BLOCK_QUERY], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_QUERY], tl.float32)
        b_out = tl.zeros([BLOCK_QUERY, SIZE], tl.float32)
    else:
        b_null_key = load_size(null_key + i_kv_head * HEAD_DIM, HEAD_DIM, SIZE)
        b_null_value = load_size(null_value + i_kv_head * HEAD_DIM, HEAD_DIM, SIZE)
        b_max = tl.sum(b_query.to(tl.float32) * b_null_key[None, :], 1) * scale
        b_sum = tl.full([BLOCK_QUERY], 1.0, tl.float32)
        b_out = tl.zeros([BLOCK_QUERY, SIZE], tl.float32) + b_null_value[None, :]
        if b_seed is not None:
            m_dropout = dropout_mask(b_seed, threshold, o_query, tl.zeros([], tl.int32), i_line)
            b_out = tl.where(m_dropout[:, None], b_out, 0.0)

    full, bound = key_bounds(key_mask, s_mask, n_keys, 1024)
    if CAUSAL:
        full = tl.minimum(full, start + 1)
        bound = tl.minimum(bound, start + BLOCK_QUERY)
    full = full // BLOCK_KEY * BLOCK_KEY
    b_max, b_sum, b_out = _pass_over_keys(
        b_query, b_max, b_sum, b_out, key, value, key_mask, s_key, s_value, s_mask, 0, full, n_keys, scale,
        o_query, i_line, b_seed, threshold, False, CAUSAL, NULLS, INTERPRETED, HEAD_DIM, SIZE, BLOCK_KEY,
    )  # fmt: skip
    b_max, b_sum, b_out = _pass_over_keys(
        b_query, b_max, b_sum, b_out, key, value, key_mask, s_key, s_value, s_mask, full, bound, n_keys, scale,
        o_query, i_line, b_seed, threshold, True, CAUSAL, NULLS, INTERPRETED, HEAD_DIM, SIZE, BLOCK_KEY,
    )  # fmt: skip

    m_empty = b_sum == 0.0
    b_divisor = tl.where(m_empty, 1.0, b_sum)
    b_lse = tl.where(m_empty, float("-inf"), (b_max + tl.log2(b_divisor)) * LN2)
    tl.store(lse + o_query, b_lse, mask=m_query)
    store_rows(
        out, o_query, heads * HEAD_DIM, m_query, b_out * (share / b_divisor)[:, None], HEAD_DIM, SIZE, INTERPRETED
    )
