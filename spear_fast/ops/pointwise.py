"""What stands between the matmuls: norm, gated activation, rotary positions, forward and backward."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from spear_fast.ops import backends
from spear_fast.ops.checks import FLOATS, check_common, check_residual, check_shapes, refuse, shape_of
from spear_fast.ops.providers import ProviderQuery, register
from spear_fast.ops.reference import pointwise as reference
from spear_fast.ops.registry import define, differentiate


def rms_norm(x: Tensor, gamma: Tensor, residual: Tensor | None = None) -> Any:
    """Returns `s / max(||s||, 1e-12) * sqrt(dim) * gamma` over the last dimension of `s = x`, like x, contiguous.

    With a residual, `s = x + residual` and the result is the pair (norm, s), both like x.
    Norms are computed in float32, of float64 in float64 (reference line 147).

    x: `[..., dim]`, floating point. gamma: `[dim]`, like x. residual: `[..., dim]`, like x, or None.

    Raises ValueError where the arguments do not fit each other.
    """
    normed, total, _ = _rms_norm(x, gamma, residual)
    return normed if residual is None else (normed, total)


def geglu(x: Tensor, bias: Tensor | None = None, width: int | None = None, residual: Tensor | None = None) -> Tensor:
    """Returns the first half of `x + bias` times the exact GELU of the second half, `[..., width]`, like x, contiguous.

    x: `[..., 2 * inner]`, floating point. bias: `[2 * inner]`, like x, or None: that of the linear layer before it.
    width: at least inner, which it is by default; what lies past inner is zero, to align the matmul after it.
    residual: `[rows, dim]`, like x, a row for each of x; or None. x was projected from its rows without the norm
        before: here it is multiplied by `sqrt(dim) / max(||row||, 1e-12)`, in float32. Without gradients.

    Raises ValueError where the arguments do not fit each other. Source: reference line 151.
    """
    return _geglu(x, bias, x.shape[-1] // 2 if width is None else width, residual)


def rotary(x: Tensor, freqs: Tensor, positions: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Returns `x` with its pairs (2i, 2i + 1) rotated by `position * freqs[i]`, like x, contiguous.

    x: `[..., length, heads, head_dim]`, floating point.
    freqs: `[head_dim / 2]`, float32; it gets no gradient.
    positions: int64, `[length]` or `[..., length]` like x, any sign; None for 0..length - 1.
    inverse: rotate the other way.

    Raises ValueError where the arguments do not fit each other. Source: arXiv 2104.09864, with the frequencies of
    rotary-embedding-torch, as the reference has them (reference line 247).
    """
    return _rotary(x, freqs, positions, inverse)


def _check_alike(op: str, like: str, tensors: dict[str, Tensor | None]) -> None:
    """Raises unless the tensors that are there have the dtype and device of the one named `like`."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = given[like]
    if first.dtype in FLOATS and all(
        tensor.dtype == first.dtype and tensor.device == first.device for tensor in given.values()
    ):
        return
    check_common(op, like, given, None, {})


def _check_statistic(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    precision = torch.promote_types(torch.float32, like.dtype)
    if tensor.dtype != precision or tensor.device != like.device:
        refuse(op, name, f"{precision} on {like.device}", f"{tensor.dtype} on {tensor.device}", "pass the forward's")


def _check_normed(op: str, x: Tensor, gamma: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        refuse(op, "x", "[..., dim] with dim at least 1", shape_of(x), "the last dimension is normalised")
    check_shapes(op, {"gamma": (gamma, "dim", (x.shape[-1],))})


def _check_rms_norm(x: Tensor, gamma: Tensor, residual: Tensor | None) -> None:
    """Raises ValueError unless the arguments of `rms_norm` fit each other."""
    _check_normed("rms_norm", x, gamma)
    if residual is not None:
        check_shapes("rms_norm", {"residual": (residual, "..., dim", x.shape)})
    _check_alike("rms_norm", "x", {"x": x, "gamma": gamma, "residual": residual})


def _check_rms_norm_backward(
    grad_normed: Tensor, grad_sum: Tensor | None, x: Tensor, gamma: Tensor, inverse: Tensor
) -> None:
    op = "rms_norm_backward"
    _check_normed(op, x, gamma)
    expected = {
        "grad_normed": (grad_normed, "..., dim", x.shape),
        "inverse": (inverse, "rows", (prod(x.shape[:-1]),)),
    }
    check_shapes(op, expected)
    if grad_sum is not None:
        check_shapes(op, {"grad_sum": (grad_sum, "..., dim", x.shape)})
    _check_alike(op, "x", {"x": x, "gamma": gamma, "grad_normed": grad_normed, "grad_sum": grad_sum})
    _check_statistic(op, "inverse", inverse, x)


def _check_geglu_inputs(op: str, x: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] % 2:
        refuse(op, "x", "[..., 2 * inner]", shape_of(x), "pass the values, then as many gates, in the last dimension")
    if bias is not None:
        check_shapes(op, {"bias": (bias, "2 * inner", (x.shape[-1],))})
    _check_alike(op, "x", {"x": x, "bias": bias})


def _check_geglu(x: Tensor, bias: Tensor | None, width: int, residual: Tensor | None = None) -> None:
    """Raises ValueError unless the arguments of `geglu` fit each other."""
    _check_geglu_inputs("geglu", x, bias)
    check_residual("geglu", x, "x", x.dim() - 1, residual)
    if width < x.shape[-1] // 2:
        wanted = f"at least the {x.shape[-1] // 2} that x holds"
        refuse("geglu", "width", wanted, str(width), "zeros are added at the end, nothing is cut off")


def _check_geglu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> None:
    op = "geglu_backward"
    _check_geglu_inputs(op, x, bias)
    if grad.dim() != x.dim() or grad.shape[:-1] != x.shape[:-1] or grad.shape[-1] < x.shape[-1] // 2:
        refuse(op, "grad", "[..., width] with x's leading sizes", shape_of(grad), "pass the gradient of the result")
    _check_alike(op, "x", {"x": x, "grad": grad})


def _check_rotary(x: Tensor, freqs: Tensor, positions: Tensor | None, inverse: bool) -> None:
    """Raises ValueError unless the arguments of `rotary` fit each other."""
    op = "rotary"
    if x.dim() < 3:
        refuse(op, "x", "[..., length, heads, head_dim]", shape_of(x), "split the heads, one is enough")
    if x.shape[-1] % 2:
        refuse(op, "head_dim", "even", str(int(x.shape[-1])), "rotation takes pairs of numbers")
    check_shapes(op, {"freqs": (freqs, "head_dim / 2", (x.shape[-1] // 2,))})
    integers = {}
    if positions is not None:
        if positions.shape != x.shape[-3:-2] and positions.shape != x.shape[:-2]:
            check_shapes(op, {"positions": (positions, "length", (x.shape[-3],))})
        integers = {"positions": (positions, torch.int64)}
    check_common(op, "x", {"x": x}, freqs, integers)


def _fake_rms_norm(x: Tensor, gamma: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check_rms_norm(x, gamma, residual)
    inverse = x.new_empty(prod(x.shape[:-1]), dtype=torch.promote_types(torch.float32, x.dtype))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), inverse


def _fake_rms_norm_backward(
    grad_normed: Tensor, grad_sum: Tensor | None, x: Tensor, gamma: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    _check_rms_norm_backward(grad_normed, grad_sum, x, gamma, inverse)
    return x.new_empty(x.shape), gamma.new_empty(gamma.shape)


def _fake_geglu(x: Tensor, bias: Tensor | None, width: int, residual: Tensor | None = None) -> Tensor:
    _check_geglu(x, bias, width, residual)
    return x.new_empty((*x.shape[:-1], width))


def _fake_geglu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_geglu_backward(grad, x, bias)
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else bias.shape)


def _fake_rotary(x: Tensor, freqs: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    _check_rotary(x, freqs, positions, inverse)
    return x.new_empty(x.shape)


_rms_norm = define(
    "rms_norm",
    "(Tensor x, Tensor gamma, Tensor? residual) -> (Tensor normed, Tensor sum, Tensor inverse)",
    check=_check_rms_norm,
    fake=_fake_rms_norm,
    native=("cpu",),
)
_rms_norm_backward = define(
    "rms_norm_backward",
    "(Tensor grad_normed, Tensor? grad_sum, Tensor x, Tensor gamma, Tensor inverse)"
    " -> (Tensor grad_x, Tensor grad_gamma)",
    check=_check_rms_norm_backward,
    fake=_fake_rms_norm_backward,
    native=("cpu",),
)
_geglu = define(
    "geglu",
    "(Tensor x, Tensor? bias, SymInt width, Tensor? residual) -> Tensor",
    check=_check_geglu,
    fake=_fake_geglu,
    native=("cpu",),
)
_geglu_backward = define(
    "geglu_backward",
    "(Tensor grad, Tensor x, Tensor? bias) -> (Tensor grad_x, Tensor grad_bias)",
    check=_check_geglu_backward,
    fake=_fake_geglu_backward,
    native=("cpu",),
)
_rotary = define(
    "rotary",
    "(Tensor x, Tensor freqs, Tensor? positions, bool inverse) -> Tensor",
    check=_check_rotary,
    fake=_fake_rotary,
    native=("cpu",),
)


def _save_rms_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gamma, residual = inputs
    _, total, inverse = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x if residual is None else total, gamma, inverse)
    ctx.mark_non_differentiable(*([inverse] if ctx.has_residual else [total, inverse]))
    ctx.set_materialize_grads(False)


def _differentiate_rms_norm(
    ctx: Any, grad_normed: Tensor | None, grad_sum: Tensor | None, grad_inverse: None
) -> tuple[Tensor | None, ...]:
    x, gamma, inverse = ctx.saved_tensors
    grad_sum = grad_sum if ctx.has_residual else None
    if grad_normed is None:
        return grad_sum, None, grad_sum
    grad_x, grad_gamma = _rms_norm_backward(grad_normed, grad_sum, x, gamma, inverse)
    return grad_x, grad_gamma, grad_x if ctx.has_residual else None


def _save_geglu(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, bias, _, *residual = inputs
    if any(each is not None for each in residual):
        refuse("geglu", "residual", "None where gradients are wanted", "a tensor", "normalise before the matmul")
    ctx.save_for_backward(x, bias)


def _differentiate_geglu(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = _geglu_backward(grad, x, bias)
    return grad_x, None if bias is None else grad_bias, None, None


def _save_rotary(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, freqs, positions, inverse = inputs
    ctx.save_for_backward(freqs, positions)
    ctx.inverse = inverse


def _differentiate_rotary(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    freqs, positions = ctx.saved_tensors
    return _rotary(grad, freqs, positions, not ctx.inverse), None, None, None


differentiate("rms_norm", _differentiate_rms_norm, _save_rms_norm)
differentiate("geglu", _differentiate_geglu, _save_geglu)
differentiate("rotary", _differentiate_rotary, _save_rotary)


def _rows_too_long(query: ProviderQuery) -> str | None:
    return "holds whole rows, of at most 8192 numbers" if query.size > 8192 else None


for _op in ("rms_norm", "rms_norm_backward", "geglu", "geglu_backward", "rotary"):
    register(backends.cpu(_op))
    _fits = _rows_too_long if "norm" in _op else None
    register(backends.triton(_op, _op.removesuffix("_backward"), _fits))
    register(backends.reference(_op, reference))
