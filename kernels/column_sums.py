"""Gradients of what every row shares: parts of the rows are added up by the kernels that have them at hand, and the
parts by the kernel here, always in the same order, so that the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .declaration import Declaration
from .tiles import tile


@triton.jit
def column_sums_kernel(parts, out, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out: `[columns]`; the sums over rows of `parts`, `[rows, columns]`, float32; BLOCK columns a program."""
    o_column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_column = (o_column < columns)[None, :]
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        o_row = start + tl.arange(0, ROWS)
        p_part = parts + o_row[:, None] * columns + o_column[None, :]
        b_sum += tl.load(p_part, mask=(o_row < rows)[:, None] & m_column, other=0.0)
    b_total = tl.sum(b_sum, 0)
    tl.store(out + o_column, b_total.to(out.dtype.element_ty), mask=o_column < columns)


def column_sums(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sums over the first dimension of `[parts, columns]`, float32, in another dtype."""
    rows, columns = parts.shape
    out = torch.empty(columns, dtype=dtype, device=parts.device)
    blocks = tile("column_sums", parts.device, columns, dtype)
    column_sums_kernel[(triton.cdiv(columns, blocks["BLOCK"]),)](parts, out, rows, columns, **blocks)
    return out


def parts_of(rows: int, block: int, most: int) -> tuple[int, int]:
    """Returns into how many parts rows are divided, and the rows of each, a multiple of `block`.

    It depends on the number of rows alone. most: the largest number of parts, enough to fill the device.
    """
    blocks = triton.cdiv(rows, block)
    per_part = block * triton.cdiv(blocks, most)
    return triton.cdiv(rows, per_part), per_part


AUDIT = [
    Declaration(
        kernel=column_sums_kernel,
        tile="column_sums",
        signature={"parts": "*fp32:16", "out": "*T:16", "rows": "i32", "columns": "i32"},
    )
]
