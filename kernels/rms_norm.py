"""The norm of rows, with what is added before it, forward and backward; a program holds whole rows in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import INTERPRETED, padded, rows_apart
from .column_sums import column_sums, parts_of
from .declaration import Declaration
from .precision import cast
from .tiles import tile

SMALLEST_NORM = tl.constexpr(1e-12)


@triton.jit
def rms_norm_kernel(
    x,
    gamma,
    residual,
    normed,
    total,
    inverse,
    rows,
    root,
    s_x,
    s_residual,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Of ROWS rows a program. residual and total, `[rows, DIM]`: both or neither. root: the square root of DIM."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_size = tl.arange(0, SIZE)
    m_row = o_row < rows
    m_size = o_size < DIM
    m_block = m_row[:, None] & m_size[None, :]
    b_x = tl.load(x + o_row[:, None] * s_x + o_size[None, :], mask=m_block, other=0.0).to(tl.float32)
    o_out = o_row[:, None] * DIM + o_size[None, :]
    if residual is not None:
        p_residual = residual + o_row[:, None] * s_residual + o_size[None, :]
        b_x += tl.load(p_residual, mask=m_block, other=0.0).to(tl.float32)
        # the norm is of the sum as it is kept, so that the backward pass finds the same
        b_total = cast(b_x, total.dtype.element_ty, INTERPRETED)
        tl.store(total + o_out, b_total, mask=m_block)
        b_x = b_total.to(tl.float32)
    b_inverse = root / tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), SMALLEST_NORM)
    b_gamma = tl.load(gamma + o_size, mask=m_size, other=0.0).to(tl.float32)
    b_normed = b_x * b_inverse[:, None] * b_gamma[None, :]
    tl.store(normed + o_out, b_normed.to(normed.dtype.element_ty), mask=m_block)
    tl.store(inverse + o_row, b_inverse, mask=m_row)


@triton.jit
def rms_norm_backward_kernel(
    grad_normed,
    grad_sum,
    x,
    gamma,
    inverse,
    grad_x,
    parts,
    rows,
    rows_of_part,
    largest,
    s_grad_normed,
    s_grad_sum,
    s_x,
    s_inverse,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of one part of the rows a program, ROWS at a time.

    grad_sum: `[rows, DIM]` or None. parts: `[programs, DIM]`, float32; gamma's gradient from each part.
    largest: inverses from here on belong to rows whose norm is held at the smallest, and so constant.
    """
    o_size = tl.arange(0, SIZE)
    m_size = o_size < DIM
    b_gamma = tl.load(gamma + o_size, mask=m_size, other=0.0).to(tl.float32)[None, :]
    b_part = tl.zeros([ROWS, SIZE], tl.float32)
    begin = tl.program_id(0) * rows_of_part
    for start in range(begin, tl.minimum(begin + rows_of_part, rows), ROWS):
        o_row = (start + tl.arange(0, ROWS)).to(tl.int64)
        m_row = o_row < rows
        m_block = m_row[:, None] & m_size[None, :]
        b_inverse = tl.load(inverse + o_row * s_inverse, mask=m_row, other=0.0)
        p_grad = grad_normed + o_row[:, None] * s_grad_normed + o_size[None, :]
        b_grad = tl.load(p_grad, mask=m_block, other=0.0).to(tl.float32)
        b_x = tl.load(x + o_row[:, None] * s_x + o_size[None, :], mask=m_block, other=0.0).to(tl.float32)
        b_unscaled = b_x * b_inverse[:, None]
        b_part += b_grad * b_unscaled
        b_along = b_grad * b_gamma
        b_share = tl.where(b_inverse >= largest, 0.0, tl.sum(b_along * b_unscaled, 1) / DIM)
        b_grad_x = b_inverse[:, None] * (b_along - b_unscaled * b_share[:, None])
        if grad_sum is not None:
            p_grad_sum = grad_sum + o_row[:, None] * s_grad_sum + o_size[None, :]
            b_grad_x += tl.load(p_grad_sum, mask=m_block, other=0.0).to(tl.float32)
        p_grad_x = grad_x + o_row[:, None] * DIM + o_size[None, :]
        tl.store(p_grad_x, b_grad_x.to(grad_x.dtype.element_ty), mask=m_block)
    p_part = parts + tl.program_id(0).to(tl.int64) * DIM + o_size
    tl.store(p_part, tl.sum(b_part, 0), mask=m_size)


def _flat(tensor: Tensor) -> Tensor:
    return rows_apart(tensor.reshape(-1, tensor.shape[-1]))


def rms_norm(x: Tensor, gamma: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the norm, `[..., dim]`, the sum or `[0]`, and the inverse norms, `[rows]`; see the op."""
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x.new_empty(0) if residual is None else torch.empty_like(normed)
    dim = x.shape[-1]
    rows = x.numel() // dim
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return normed, total, inverse
    x, gamma = _flat(x), gamma.contiguous()
    residual = None if residual is None else _flat(residual)
    blocks = tile("rms_norm", x.device, dim, x.dtype)
    rms_norm_kernel[(triton.cdiv(rows, blocks["ROWS"]),)](
        x,
        gamma,
        residual,
        normed,
        None if residual is None else total,
        inverse,
        rows,
        dim**0.5,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        DIM=dim,
        SIZE=padded(dim, 2),
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    return normed, total, inverse


def rms_norm_backward(
    grad_normed: Tensor, grad_sum: Tensor | None, x: Tensor, gamma: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x, `[..., dim]`, and gamma, `[dim]`; see the op."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dim = x.shape[-1]
    rows = x.numel() // dim
    if rows == 0:
        return grad_x, torch.zeros_like(gamma, memory_format=torch.contiguous_format)
    x, grad_normed, gamma = _flat(x), _flat(grad_normed), gamma.contiguous()
    grad_sum = None if grad_sum is None else _flat(grad_sum)
    blocks = tile("rms_norm_backward", x.device, dim, x.dtype)
    count, rows_of_part = parts_of(rows, blocks["ROWS"], blocks.pop("PARTS"))
    parts = torch.empty(count, dim, dtype=torch.float32, device=x.device)
    rms_norm_backward_kernel[(count,)](
        grad_normed,
        grad_sum,
        x,
        gamma,
        inverse,
        grad_x,
        parts,
        rows,
        rows_of_part,
        dim**0.5 / SMALLEST_NORM.value * (1 - 1e-6),
        grad_normed.stride(0),
        0 if grad_sum is None else grad_sum.stride(0),
        x.stride(0),
        inverse.stride(0),
        DIM=dim,
        SIZE=padded(dim, 2),
        **blocks,
    )
    return grad_x, column_sums(parts, gamma.dtype)


AUDIT = [
    Declaration(
        kernel=rms_norm_kernel,
        tile="rms_norm",
        signature={
            **dict.fromkeys(("x", "gamma", "residual", "normed", "total"), "*T:16"),
            "inverse": "*fp32:16",
            "rows": "i32",
            "root": "fp32",
            **dict.fromkeys(("s_x", "s_residual"), "i32:16"),
        },
        constants=lambda size: {"DIM": size, "SIZE": padded(size, 2), "INTERPRETED": False},
        variants={"": {"residual": None, "total": None}, "residual": {}},
    ),
    Declaration(
        kernel=rms_norm_backward_kernel,
        tile="rms_norm_backward",
        signature={
            **dict.fromkeys(("grad_normed", "grad_sum", "x", "gamma", "grad_x"), "*T:16"),
            **dict.fromkeys(("inverse", "parts"), "*fp32:16"),
            **dict.fromkeys(("rows", "rows_of_part"), "i32"),
            "largest": "fp32",
            **dict.fromkeys(("s_grad_normed", "s_grad_sum", "s_x"), "i32:16"),
        },
        constants=lambda size: {"DIM": size, "SIZE": padded(size, 2), "s_inverse": 1},
        variants={"": {"grad_sum": None}, "residual": {}},
    ),
]
