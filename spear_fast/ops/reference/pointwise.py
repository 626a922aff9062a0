"""Norm, gated activation and rotation, in plain torch; what is added up or looked up is float32 at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.ops.reference.decode_attention import rotate
from spear_fast.ops.reference.residual import SMALLEST_NORM, inverse_rms


def _sum_rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2).sum(0) if x.dim() > 1 else x


def rms_norm(x: Tensor, gamma: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    total = x if residual is None else (x + residual).contiguous()
    precision = torch.promote_types(torch.float32, x.dtype)
    precise = total.to(precision)
    inverse = x.shape[-1] ** 0.5 / torch.linalg.vector_norm(precise, dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
    normed = (precise * inverse * gamma.to(precision)).to(x.dtype).contiguous()
    return normed, x.new_empty(0) if residual is None else total, inverse.flatten()


def rms_norm_backward(
    grad_normed: Tensor, grad_sum: Tensor | None, x: Tensor, gamma: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    precision = torch.promote_types(torch.float32, x.dtype)
    grad, scale = grad_normed.to(precision), inverse.view(*x.shape[:-1], 1)
    unscaled = x.to(precision) * scale
    along = grad * gamma.to(precision)
    # a norm below the smallest is a constant; the inverse is not cubed, which could overflow
    constant = scale >= x.shape[-1] ** 0.5 / SMALLEST_NORM * (1 - 1e-6)
    share = (along * unscaled).mean(-1, keepdim=True).masked_fill(constant, 0)
    grad_x = scale * (along - unscaled * share)
    grad_x = grad_x if grad_sum is None else grad_x + grad_sum
    return grad_x.to(x.dtype).contiguous(), _sum_rows(grad * unscaled).to(gamma.dtype)


def _halves(x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    precision = torch.promote_types(torch.float32, x.dtype)
    both = x.to(precision)
    if residual is not None:
        both = both * inverse_rms(residual).view(*x.shape[:-1], 1)
    both = both if bias is None else both + bias.to(precision)
    values, gates = both.chunk(2, dim=-1)
    return values, gates


def geglu(x: Tensor, bias: Tensor | None, width: int, residual: Tensor | None = None) -> Tensor:
    values, gates = _halves(x, bias, residual)
    return F.pad((values * F.gelu(gates)).to(x.dtype), (0, width - x.shape[-1] // 2)).contiguous()


def geglu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    values, gates = _halves(x, bias)
    grad = grad[..., : x.shape[-1] // 2].to(values.dtype)
    below = 0.5 * (1 + torch.erf(gates * 0.5**0.5))
    density = torch.exp(-0.5 * gates * gates) * (2 * torch.pi) ** -0.5
    grad_x = torch.cat((grad * gates * below, grad * values * (below + gates * density)), dim=-1)
    grad_bias = x.new_empty(0) if bias is None else _sum_rows(grad_x).to(bias.dtype)
    return grad_x.to(x.dtype).contiguous(), grad_bias


def rotary(x: Tensor, freqs: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    if positions is None:
        positions = torch.arange(x.shape[-3], device=x.device)
    return rotate(x, -freqs if inverse else freqs, positions).contiguous()
