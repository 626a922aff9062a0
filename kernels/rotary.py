"""Rotary positions on their own; inside attention and the caches they are rotated where they are read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import padded, rows_apart
from .declaration import Declaration
from .rotation import cos_sin, rotate
from .tiles import tile


@triton.jit
def rotary_kernel(
    x,
    freqs,
    positions,
    out,
    length,
    heads,
    s_x_row,
    s_x_position,
    s_x_head,
    s_position_row,
    s_position,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Of HEADS heads of one position of one row a program. positions: `[rows, length]`, or None for 0..length - 1."""
    i_row = (tl.program_id(0) // length).to(tl.int64)
    i_position = tl.program_id(0) % length
    o_head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    o_size = tl.arange(0, SIZE)
    o_pair = tl.arange(0, SIZE // 2)
    m_block = (o_head < heads)[:, None] & (o_size < HEAD_DIM)[None, :]
    p_x = x + i_row * s_x_row + i_position * s_x_position + o_head[:, None] * s_x_head + o_size[None, :]
    b_x = tl.load(p_x, mask=m_block, other=0.0).to(tl.float32)
    position = i_position
    if positions is not None:
        position = tl.load(positions + i_row * s_position_row + i_position * s_position)
    b_freqs = tl.load(freqs + o_pair, mask=o_pair < HEAD_DIM // 2, other=0.0).to(tl.float32)
    b_cos, b_sin = cos_sin(position.to(tl.float32) * b_freqs)
    if INVERSE:
        b_sin = -b_sin
    b_out = rotate(b_x, b_cos[None, :], b_sin[None, :])
    p_out = out + (tl.program_id(0).to(tl.int64) * heads + o_head[:, None]) * HEAD_DIM + o_size[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_block)


def rotary(x: Tensor, freqs: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    """Returns `[..., length, heads, head_dim]`; see the op."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    length, heads, size = x.shape[-3:]
    x = rows_apart(x.reshape(-1, length, heads, size))
    of_row = of_position = 0
    if positions is not None:
        of_position = positions.stride(-1)
        if positions.dim() > 1:
            positions = positions.reshape(-1, length)
            of_row, of_position = positions.stride()
    blocks = tile("rotary", x.device, size, x.dtype)
    rotary_kernel[(x.shape[0] * length, triton.cdiv(heads, blocks["HEADS"]))](
        x,
        freqs.contiguous(),
        positions,
        out,
        length,
        heads,
        *x.stride()[:3],
        of_row,
        of_position,
        HEAD_DIM=size,
        SIZE=padded(size, 2),
        INVERSE=inverse,
        **blocks,
    )
    return out


AUDIT = [
    Declaration(
        kernel=rotary_kernel,
        tile="rotary",
        signature={
            **dict.fromkeys(("x", "out"), "*T:16"),
            "freqs": "*fp32:16",
            "positions": "*i64:16",
            **dict.fromkeys(("length", "heads", "s_position_row"), "i32"),
            **dict.fromkeys(("s_x_row", "s_x_position", "s_x_head"), "i32:16"),
        },
        constants=lambda size: {"HEAD_DIM": size, "SIZE": padded(size, 2), "INVERSE": False, "s_position": 1},
        variants={"": {"positions": None}, "positions": {}},
    )
]
