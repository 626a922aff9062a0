"""Matrix products over weights that are packed once and read many times, for few rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# rows that oneDNN lays the weights out for; measured on AVX2: good from 1 row to 128
ROWS = 32
# halves of the feed-forward start and end on these many elements where the layout is plain
ALIGNMENT = 16


def packs(weight: Tensor) -> bool:
    """Returns whether oneDNN's packed product takes this weight: float32 on a CPU, and the operators are there.

    The operators are those that torch's own compiler emits for frozen weights; a torch without them falls back to
    `torch.nn.functional.linear`.
    """
    return bool(
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def rounded_rows(count: int) -> int:
    """Returns `count` rounded up to one of eight sizes between powers of two, and to a multiple of 8.

    Each number of rows has a product planned and kept for it: with any number they would be without end.
    """
    step = max(8, (1 << max(count - 1, 0).bit_length()) // 16)
    return -(-count // step) * step


class Linear:
    """`x @ weight.T + bias`, optionally plus a residual, for `x` `[rows, features]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = packs(weight)
        self.bias = None if bias is None else bias.contiguous()
        weight = weight.contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if self.packed else weight

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.packed:
            out = F.linear(x, self.weight, self.bias)
            return out if residual is None else out.add_(residual)
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


class FeedForward:
    """`residual + linear(x_half * gelu(gate_half))`: the reference's GEGLU with the exact GELU of the second half.

    weight: `[2 * inner, features]`, bias: `[2 * inner]`, first the values, then the gates. out_weight: `[dim, inner]`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> None:
        self.packed = packs(weight)
        (values, gates), (value_bias, gate_bias) = weight.chunk(2), bias.chunk(2)
        if self.packed:
            # two products with the activation and the gating fused into them beat one with both outside
            self.values, self.gates = Linear(values, value_bias), Linear(gates, gate_bias)
            self.out = Linear(out_weight, out_bias)
            return
        # zeros change nothing: their gate is gelu(0) = 0
        padding = -values.shape[0] % ALIGNMENT
        wider = F.pad(torch.stack((values, gates)), (0, 0, 0, padding)).flatten(0, 1)
        wider_bias = F.pad(torch.stack((value_bias, gate_bias)), (0, padding)).flatten()
        self.both, self.out = Linear(wider, wider_bias), Linear(F.pad(out_weight, (0, padding)), out_bias)

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.packed:
            gate = torch.ops.mkldnn._linear_pointwise(x, self.gates.weight, self.gates.bias, "gelu", [], "none")
            inner = torch.ops.mkldnn._linear_pointwise.binary(x, gate, self.values.weight, self.values.bias, "mul")
        else:
            values, gate = self.both(x).chunk(2, dim=-1)
            inner = F.gelu(gate).mul_(values)
        return self.out(inner, residual)


def unit(x: Tensor) -> Tensor:
    """Returns `x / max(||x||, 1e-12)` over the last dimension, in the dtype of `x`; norms of halves are float32."""
    if x.dtype in (torch.float16, torch.bfloat16):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
        return (x / norm).to(x.dtype)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)


def folded(weight: Tensor, norm: Any) -> Tensor:
    """Returns `weight` `[out, dim]` times the norm's gamma and sqrt(dim), rounded once."""
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return (exact * (norm.gamma.detach() * exact.shape[-1] ** 0.5)).to(weight.dtype)


def fed_forward(feed_forward: Any) -> FeedForward:
    """Returns the packed products of a reference's feed-forward, its norm folded in."""
    norm, first, _, _, last = feed_forward
    return FeedForward(folded(first.weight, norm), first.bias.detach(), last.weight.detach(), last.bias.detach())


def head_order(heads: int, kv_heads: int) -> Tensor:
    """Returns the reference's query heads, `[heads]`, so ordered that those of one key head stand together.

    Head i of the reference reads key head `i % kv_heads`.
    """
    return torch.arange(heads).view(-1, kv_heads).t().flatten()
