"""Rotates keys, and queries for the backward pass, once for all the blocks that read them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_blocks import angles, load_rows, span, store_rows
from .blocks import INTERPRETED, padded
from .rotation import rotate
from .tiles import tile


@triton.jit
def attention_rotation_kernel(
    x,
    out,
    offsets,
    freqs,
    s_row,
    s_position,
    s_head,
    length,
    heads,
    blocks,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program rotates one block of positions of one head of one row, each by its position in the row.

    x: strided. out: like it, contiguous. offsets: cumulative lengths of packed rows, or None. length: of padded rows.
    """
    i_program = tl.program_id(0)
    i_block = i_program % blocks
    i_head = i_program // blocks % heads
    row, first, count = span(offsets, i_program // blocks // heads, length)
    if i_block * BLOCK >= count:
        return
    o_position = i_block * BLOCK + tl.arange(0, BLOCK)
    m_position = o_position < count
    x += row * s_row + first * s_position + i_head * s_head
    out += ((row * length + first) * heads + i_head) * HEAD_DIM
    block = load_rows(x, o_position, s_position, m_position, HEAD_DIM, SIZE).to(tl.float32)
    b_cos, b_sin = angles(freqs, o_position, HEAD_DIM, SIZE)
    block = rotate(block, b_cos, b_sin)
    store_rows(out, o_position, heads * HEAD_DIM, m_position, block, HEAD_DIM, SIZE, INTERPRETED)


def rotated(x: Tensor, freqs: Tensor | None, offsets: Tensor | None, longest: int) -> Tensor:
    """Returns x with each position rotated by its angles, contiguous; x itself where there are no freqs.

    x: `[rows, length, heads, head_dim]`, or `[total, heads, head_dim]` with offsets `[rows + 1]`, int32, and the
        longest row's length.
    """
    if freqs is None or x.numel() == 0:
        return x
    out = x.new_empty(x.shape)
    packed = offsets is not None
    rows, longest = x.shape[:2] if offsets is None else (offsets.shape[0] - 1, longest)
    heads, size = x.shape[-2:]
    launch = tile("attention_rotation", x.device, size, x.dtype)
    blocks = triton.cdiv(longest, launch["BLOCK"])
    attention_rotation_kernel[(blocks * heads * rows,)](
        x,
        out,
        offsets,
        freqs,
        *((0, *x.stride()[:2]) if packed else x.stride()[:3]),
        x.shape[0] if packed else longest,
        heads,
        blocks,
        HEAD_DIM=size,
        SIZE=padded(size),
        INTERPRETED=INTERPRETED,
        **launch,
    )
    return out
