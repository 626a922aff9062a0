"""The gated activation with the bias before it and the zeros after it, forward and backward."""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import inverse_rms_of_rows, padded, rows_apart
from .column_sums import column_sums, parts_of
from .declaration import Declaration
from .tiles import tile


@triton.jit
def _below(b_gate):
    """Returns how much of the normal distribution lies below: the gate's share of what it lets through."""
    return 0.5 * (1.0 + tl.erf(b_gate * 0.7071067811865476))


@triton.jit
def geglu_kernel(
    x,
    bias,
    residual,
    out,
    rows,
    inner,
    width,
    dim,
    root,
    s_x,
    s_residual,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of ROWS rows and BLOCK columns a program. x: `[rows, 2 * inner]`. bias: `[2 * inner]` or None.

    residual: `[rows, dim]`, see `inverse_rms`, or None. root: the square root of dim.
    """
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_row = (o_row < rows)[:, None]
    m_inner = o_column < inner
    m_block = m_row & m_inner[None, :]
    p_value = x + o_row[:, None] * s_x + o_column[None, :]
    b_value = tl.load(p_value, mask=m_block, other=0.0).to(tl.float32)
    b_gate = tl.load(p_value + inner, mask=m_block, other=0.0).to(tl.float32)
    if residual is not None:
        b_inverse = inverse_rms_of_rows(residual + o_row * s_residual, o_row < rows, dim, root, WIDTH, ROWS)[:, None]
        b_value = b_value * b_inverse
        b_gate = b_gate * b_inverse
    if bias is not None:
        b_value += tl.load(bias + o_column, mask=m_inner, other=0.0).to(tl.float32)[None, :]
        b_gate += tl.load(bias + inner + o_column, mask=m_inner, other=0.0).to(tl.float32)[None, :]
    b_out = b_value * b_gate * _below(b_gate)
    p_out = out + o_row[:, None] * width + o_column[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_row & (o_column < width)[None, :])


@triton.jit
def geglu_backward_kernel(
    grad, x, bias, grad_x, parts, rows, rows_of_part, inner, s_grad, s_x, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of one part of the rows and BLOCK columns of both halves a program, ROWS rows at a time.

    bias and parts: `[2 * inner]` and `[parts, 2 * inner]` in float32, the bias' gradient from each part; or None.
    """
    o_column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_inner = o_column < inner
    b_bias_value = tl.zeros([BLOCK], tl.float32)
    b_bias_gate = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        b_bias_value = tl.load(bias + o_column, mask=m_inner, other=0.0).to(tl.float32)
        b_bias_gate = tl.load(bias + inner + o_column, mask=m_inner, other=0.0).to(tl.float32)
    b_part_value = tl.zeros([ROWS, BLOCK], tl.float32)
    b_part_gate = tl.zeros([ROWS, BLOCK], tl.float32)
    begin = tl.program_id(1) * rows_of_part
    for start in range(begin, tl.minimum(begin + rows_of_part, rows), ROWS):
        o_row = (start + tl.arange(0, ROWS)).to(tl.int64)
        m_block = (o_row < rows)[:, None] & m_inner[None, :]
        p_value = x + o_row[:, None] * s_x + o_column[None, :]
        b_value = tl.load(p_value, mask=m_block, other=0.0).to(tl.float32) + b_bias_value[None, :]
        b_gate = tl.load(p_value + inner, mask=m_block, other=0.0).to(tl.float32) + b_bias_gate[None, :]
        b_grad = tl.load(grad + o_row[:, None] * s_grad + o_column[None, :], mask=m_block, other=0.0).to(tl.float32)
        b_below = _below(b_gate)
        b_density = tl.exp(-0.5 * b_gate * b_gate) * 0.3989422804014327
        b_grad_value = b_grad * b_gate * b_below
        b_grad_gate = b_grad * b_value * (b_below + b_gate * b_density)
        p_grad = grad_x + o_row[:, None] * (2 * inner) + o_column[None, :]
        tl.store(p_grad, b_grad_value.to(grad_x.dtype.element_ty), mask=m_block)
        tl.store(p_grad + inner, b_grad_gate.to(grad_x.dtype.element_ty), mask=m_block)
        b_part_value += b_grad_value
        b_part_gate += b_grad_gate
    if parts is not None:
        p_part = parts + tl.program_id(1).to(tl.int64) * (2 * inner) + o_column
        tl.store(p_part, tl.sum(b_part_value, 0), mask=m_inner)
        tl.store(p_part + inner, tl.sum(b_part_gate, 0), mask=m_inner)


def geglu(x: Tensor, bias: Tensor | None, width: int, residual: Tensor | None = None) -> Tensor:
    """Returns `[..., width]`; see the op."""
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = prod(x.shape[:-1])
    x = rows_apart(x.reshape(rows, x.shape[-1]))
    blocks = tile("geglu", x.device, width, x.dtype)
    residual = None if residual is None else rows_apart(residual)
    dim = 1 if residual is None else residual.shape[1]
    geglu_kernel[(triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(width, blocks["BLOCK"]))](
        x,
        None if bias is None else bias.contiguous(),
        residual,
        out,
        rows,
        x.shape[-1] // 2,
        width,
        dim,
        dim**0.5,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        WIDTH=padded(dim, 128),
        **blocks,
    )
    return out


def geglu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x, `[..., 2 * inner]`, and of the bias, `[2 * inner]` or `[0]`; see the op."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grad_x.numel() == 0:
        return grad_x, x.new_zeros(0 if bias is None else bias.shape)
    rows, inner = prod(x.shape[:-1]), x.shape[-1] // 2
    x, grad = rows_apart(x.reshape(rows, 2 * inner)), rows_apart(grad.reshape(rows, grad.shape[-1]))
    blocks = tile("geglu_backward", x.device, inner, x.dtype)
    count, rows_of_part = parts_of(rows, blocks["ROWS"], blocks.pop("PARTS"))
    parts = None if bias is None else torch.empty(count, 2 * inner, dtype=torch.float32, device=x.device)
    geglu_backward_kernel[(triton.cdiv(inner, blocks["BLOCK"]), count)](
        grad,
        x,
        None if bias is None else bias.contiguous(),
        grad_x,
        parts,
        rows,
        rows_of_part,
        inner,
        grad.stride(0),
        x.stride(0),
        **blocks,
    )
    return grad_x, x.new_empty(0) if parts is None else column_sums(parts, x.dtype)


AUDIT = [
    Declaration(
        kernel=geglu_kernel,
        tile="geglu",
        signature={
            **dict.fromkeys(("x", "bias", "residual", "out"), "*T:16"),
            "rows": "i32",
            "root": "fp32",
            **dict.fromkeys(("inner", "width", "dim", "s_x", "s_residual"), "i32:16"),
        },
        constants=lambda size: {"WIDTH": 1024},
        variants={"": {"bias": None, "residual": None}, "bias": {"residual": None}, "residual": {}},
    ),
    Declaration(
        kernel=geglu_backward_kernel,
        tile="geglu_backward",
        signature={
            **dict.fromkeys(("grad", "x", "bias", "grad_x"), "*T:16"),
            "parts": "*fp32:16",
            **dict.fromkeys(("rows", "rows_of_part"), "i32"),
            **dict.fromkeys(("inner", "s_grad", "s_x"), "i32:16"),
        },
        variants={"": {"bias": None, "parts": None}, "bias": {}},
    ),
]
