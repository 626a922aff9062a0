"""Matmuls over weights that are read many times: for few rows, packed once."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast import ops
from spear_fast.ops import extension

# halves of the feed-forward are padded to it, as a GPU's matmuls need; zeros change nothing: their gate is gelu(0) = 0
ALIGNMENT = 16

# how weights are held: as they are, or rounded to 8 bits with a scale for each output, on x86 CPUs
Weights = Literal["exact", "int8"]


def packs(weight: Tensor) -> bool:
    """Returns whether the extension takes this weight to pack it: float32 on a CPU, whose vectors it was built for."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or extension.missing() is not None:
        return False
    built = extension.facts()
    # of x86 without AVX2 there are no vectors to multiply with: torch has better ones, chosen when it runs
    return built["capability"] != "DEFAULT" or built["machine"] not in ("x86_64", "AMD64")


def defers_norm(weight: Tensor) -> bool:
    """Returns whether the norm before a matmul by this weight costs no launch: who reads the result makes up for it.

    The gamma is then folded into the weight and the matmul takes the raw rows, whose size its result keeps, until a
    kernel multiplies it by their inverse RMS. bfloat16 reaches as far as float32, so nothing overflows, and a factor
    for a row leaves relative errors as they are: the weight is rounded once more, the normed row no longer. float16
    ends at 65504, which the raw result can pass: there the norm stays.
    """
    return not packs(weight) and weight.dtype != torch.float16


def check_weights(weights: str, weight: Tensor) -> None:
    """Raises ValueError unless a model with such parameters can hold its weights so."""
    if weights not in ("exact", "int8"):
        raise ValueError(f"weights must be 'exact' or 'int8', got {weights!r}.")
    if weights == "exact":
        return
    missing = extension.missing()
    capability = None if missing is not None else extension.facts()["capability"]
    if not packs(weight) or capability == "DEFAULT":
        built = missing or f"an extension built for {capability}"
        raise ValueError(
            "weights='int8' needs a float32 model on a CPU and the C++ extension built for AVX2 or AVX512, got "
            f"{weight.dtype} on {weight.device.type} and {built}."
        )


class Linear:
    """`x @ weight.T + bias` for `x` `[rows, features]`; `add_to` adds it to a residual, in place.

    weight: `[outputs, features]`. pack: for few rows; many are as fast over the weight as it lies.
    packed: the extension's object that holds it, or None where torch computes.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, weights: Weights = "exact", *, pack: bool = True
    ) -> None:
        self.packed: Any = None
        if packs(weight) and (pack or weights == "int8"):
            kind = "int8" if weights == "int8" else "float32"
            self.packed = torch.classes.spear_fast.PackedLinear(weight, bias, kind)
            return
        self.bias = None if bias is None else bias.contiguous()
        self.weight = weight.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if self.packed is None else self.packed.forward(x)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Returns `residual`, `[rows, outputs]` and contiguous, the result for `x` added to it: one launch on a GPU."""
        if self.packed is not None:
            return self.packed.added(x, residual)
        if self.bias is not None:
            return residual.add_(F.linear(x, self.weight, self.bias))
        return residual.addmm_(x, self.weight.t())


class PackedFeedForward:
    """`residual + linear(x_half * gelu(gate_half))`: the reference's GEGLU with the exact GELU of the second half.

    weight: `[2 * inner, features]`, bias: `[2 * inner]`, first the values, then the gates. out_weight: `[dim, inner]`.
    Where torch computes, the last bias is a column of the last matmul, so that it costs no launch: a padded value of
    1/16 whose gate is 16, and gelu(16) = 16.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        out_weight: Tensor,
        out_bias: Tensor,
        weights: Weights = "exact",
        *,
        pack: bool = True,
    ) -> None:
        inner = weight.shape[0] // 2
        by_torch, pads = not packs(weight), pack or weight.device.type != "cpu"
        padding = (-inner % ALIGNMENT or ALIGNMENT * by_torch) if pads else 0
        if padding:
            weight = F.pad(weight.unflatten(0, (2, -1)), (0, 0, 0, padding)).flatten(0, 1)
            bias = F.pad(bias.unflatten(0, (2, -1)), (0, padding)).flatten()
            out_weight = F.pad(out_weight, (0, padding))
        in_column = by_torch and padding > 0
        if in_column:
            bias.view(2, -1)[:, inner] = torch.tensor([1 / 16, 16], dtype=bias.dtype, device=bias.device)
            out_weight[:, inner] = out_bias
        self.bias = bias
        self.up_gate = Linear(weight, weights=weights, pack=pack)
        self.down = Linear(out_weight, None if in_column else out_bias, weights, pack=pack)

    def add_to(self, residual: Tensor, x: Tensor | None) -> Tensor:
        """Returns `residual`, `[rows, dim]` and contiguous, the result for `x` added to it.

        x: `residual` normed, like it; or None, where `defers_norm`: it is normed on the way.
        """
        if x is None:
            return self.down.add_to(residual, ops.geglu(self.up_gate(residual), self.bias, residual=residual))
        return self.down.add_to(residual, ops.geglu(self.up_gate(x), self.bias))


def normalize(x: Tensor, gamma: Tensor | None) -> Tensor:
    """Returns the norm before a matmul: RMSNorm by `gamma` `[dim]`, one launch, or where it is folded into the weights
    (`gamma` None) what is left of it, `l2_normalize`."""
    return l2_normalize(x) if gamma is None else ops.rms_norm(x, gamma)


def l2_normalize(x: Tensor) -> Tensor:
    """Returns `x / max(||x||, 1e-12)` over the last dimension, in the dtype of `x`; norms of halves are float32."""
    if x.dtype in (torch.float16, torch.bfloat16):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
        return (x / norm).to(x.dtype)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
