"""What the forward and backward kernels of attention share: blocks of rows, where to read, who is dropped.

Programs work on one block of positions of one head of one row. Rows are padded, `[rows, length, heads, head_dim]`, or
packed, `[total, heads, head_dim]` with cumulative lengths; `span` hides the difference.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl

from .precision import cast
from .rotation import cos_sin

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def span(offsets, i_row, length):
    """Returns the row that strides count, the position there at which row i_row starts, and how long it is."""
    if offsets is None:
        row = i_row.to(tl.int64)
        first = tl.zeros([], tl.int64)
        count = length
    else:
        row = tl.zeros([], tl.int64)
        first = tl.load(offsets + i_row).to(tl.int64)
        count = (tl.load(offsets + i_row + 1) - first).to(tl.int32)
    return row, first, count


@triton.jit
def load_rows(pointer, o_row, stride, m_row, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr):
    """Returns `[ROWS, SIZE]`, zeros past HEAD_DIM and where m_row is False (None: all rows are there)."""
    o_size = tl.arange(0, SIZE)
    p_block = pointer + o_row[:, None] * stride + o_size[None, :]
    if m_row is None:
        if SIZE == HEAD_DIM:
            block = tl.load(p_block)
        else:
            block = tl.load(p_block, mask=(o_size < HEAD_DIM)[None, :], other=0.0)
    else:
        if SIZE == HEAD_DIM:
            block = tl.load(p_block, mask=m_row[:, None], other=0.0)
        else:
            block = tl.load(p_block, mask=m_row[:, None] & (o_size < HEAD_DIM)[None, :], other=0.0)
    return block


@triton.jit
def store_rows(
    pointer, o_row, stride, m_row, block, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Writes `[ROWS, SIZE]` in the pointer's dtype, but for what is past HEAD_DIM and where m_row is False."""
    o_size = tl.arange(0, SIZE)
    mask = m_row[:, None]
    if SIZE != HEAD_DIM:
        mask = mask & (o_size < HEAD_DIM)[None, :]
    block = cast(block, pointer.dtype.element_ty, INTERPRETED)
    tl.store(pointer + o_row[:, None] * stride + o_size[None, :], block, mask=mask)


@triton.jit
def load_size(pointer, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr):
    """Returns one vector `[SIZE]` in float32, zeros past HEAD_DIM."""
    o_size = tl.arange(0, SIZE)
    return tl.load(pointer + o_size, mask=o_size < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def load_lse(lse, o_query, m_query):
    """Returns the log-sum-exp in base 2; +inf, so that weights come out zero, where nothing is read."""
    b_lse = tl.load(lse + o_query, mask=m_query, other=float("inf")) * LOG2E
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse)


@triton.jit
def angles(freqs, o_row, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr):
    """Returns cosines and sines `[ROWS, SIZE / 2]` of the positions o_row."""
    o_pair = tl.arange(0, SIZE // 2)
    b_freqs = tl.load(freqs + o_pair, mask=o_pair < HEAD_DIM // 2, other=0.0).to(tl.float32)
    return cos_sin(o_row.to(tl.float32)[:, None] * b_freqs[None, :])


@triton.jit
def key_bounds(key_mask, stride, n_keys, BLOCK: tl.constexpr):
    """Returns how many keys, from the first, are all read, and the number of keys up to the last that is read.

    Without a mask both are n_keys. Blocks before the first bound need no mask, blocks after the second no work.
    """
    full = n_keys
    bound = n_keys
    if key_mask is not None:
        bound = 0
        for start in range(0, n_keys, BLOCK):
            o_key = start + tl.arange(0, BLOCK)
            read = tl.load(key_mask + o_key * stride, mask=o_key < n_keys, other=0) != 0
            full = tl.minimum(full, tl.min(tl.where(read, n_keys, o_key), 0))
            bound = tl.maximum(bound, tl.max(tl.where(read, o_key + 1, 0), 0))
    return full, bound


@triton.jit
def dropout_mask(b_seed, threshold, o_query, o_key, i_head):
    """Returns which weights dropout keeps: the upper 24 bits of Philox-4x32-10's first word are at least threshold.

    b_seed: int64, the generator's key. o_query, o_key, i_head: int32, in shapes that broadcast; the generator's
    counter is (key, query, head, 0). The first rounds work on rows and columns alone, as broadcasting allows.
    """
    word, _, _, _ = philox_impl(
        o_key.to(tl.uint32),
        o_query.to(tl.uint32),
        i_head.to(tl.uint32),
        tl.zeros([], tl.uint32),
        b_seed.to(tl.uint32),
        (b_seed >> 32).to(tl.uint32),
    )
    return (word >> 8).to(tl.int32) >= threshold
