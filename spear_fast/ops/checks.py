"""What the checks of all ops share: one sentence on what is wrong, what was wanted, what came and what to do."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor

# the dtypes that ops compute in; narrower ones torch can store and convert alone
FLOATS = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def shape_of(tensor: Tensor) -> str:
    return str([int(size) for size in tensor.shape])


def refuse(op: str, name: str, wanted: str, got: str, advice: str) -> NoReturn:
    raise ValueError(f"{op}: {name} must be {wanted}, got {got}; {advice}")


def check_float(op: str, name: str, dtype: torch.dtype) -> None:
    """Raises ValueError unless an op computes in `dtype`."""
    if dtype in FLOATS:
        return
    narrow = " of 16 bits or more" if dtype.is_floating_point else ""
    refuse(op, name, f"floating point{narrow}", str(dtype), "convert it, and what goes with it, with .to()")


def refuse_layouts(op: str, arguments: dict[str, Any]) -> None:
    """Raises ValueError where a tensor's numbers do not lie in memory by strides; for calls that have failed."""
    for name, tensor in arguments.items():
        if isinstance(tensor, Tensor) and (tensor.is_nested or tensor.layout != torch.strided):
            got = "a nested tensor" if tensor.is_nested else str(tensor.layout)
            refuse(op, name, "dense", got, "call .to_dense(), or .to_padded_tensor() where it is nested")


def refuse_views(op: str) -> NoReturn:
    """Raises ValueError for a view that stands for other numbers than those in its memory."""
    refuse(
        op,
        "every argument",
        "a tensor whose memory holds its numbers",
        "a negated or conjugated view",
        "call .resolve_neg() or .resolve_conj()",
    )


def remembering(check: Callable[..., None]) -> Callable[..., None]:
    """Returns `check` for calls over and over with the same buffers: arguments like the last that it let pass are not
    looked at again.

    check: takes tensors and None, and depends on nothing but their shapes, dtypes, devices, and whether they are
    contiguous.
    """
    last: tuple = ()

    def checked(*tensors: Tensor | None) -> None:
        nonlocal last
        seen = tuple(
            [None if each is None else (each.shape, each.dtype, each.device, each.is_contiguous()) for each in tensors]
        )
        if seen != last:
            check(*tensors)
            last = seen

    return checked


def check_common(op: str, like: str, tensors: dict[str, Tensor], freqs: Tensor | None, integers: dict) -> None:
    """Raises unless all tensors are on one device, and of the dtypes that they should be of."""
    first = tensors[like]
    dtype, device = first.dtype, first.device
    if (
        dtype in FLOATS
        and all([each.dtype == dtype and each.device == device for each in tensors.values()])
        and all([each.dtype == wanted and each.device == device for each, wanted in integers.values()])
        and (freqs is None or (freqs.dtype in (torch.float32, dtype) and freqs.device == device))
    ):
        return
    check_float(op, like, dtype)
    everything = {
        **tensors,
        **({} if freqs is None else {"freqs": freqs}),
        **{name: t for name, (t, _) in integers.items()},
    }
    for name, tensor in everything.items():
        if tensor.device != first.device:
            refuse(op, name, f"on {like}'s device {first.device}", str(tensor.device), "move it with .to()")
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            refuse(op, name, f"{first.dtype} like {like}", str(tensor.dtype), "convert it with .to()")
    for name, (tensor, dtype) in integers.items():
        if tensor.dtype != dtype:
            refuse(op, name, str(dtype), str(tensor.dtype), "convert it with .to()")
    if freqs is not None and freqs.dtype != torch.float32 and freqs.dtype != first.dtype:
        refuse(op, "freqs", "torch.float32", str(freqs.dtype), "take the angles' precision from the checkpoint")


def check_shapes(op: str, expected: dict[str, tuple[Tensor, str, tuple[int, ...]]]) -> None:
    for name, (tensor, names, shape) in expected.items():
        if tensor.shape != shape:
            refuse(op, name, f"[{names}] = {list(shape)}", shape_of(tensor), "see the op's docstring for the sizes")


def check_residual(op: str, like: Tensor, name: str, leading: int, residual: Tensor | None) -> None:
    """Raises ValueError unless `residual` is None or `[rows, dim]`: a row for each of the first dimensions of `like`.

    name: of `like`. leading: how many dimensions of it are rows.
    """
    if residual is None:
        return
    rows = prod(like.shape[:leading])
    if residual.dim() != 2 or residual.shape[0] != rows or residual.shape[1] == 0:
        refuse(op, "residual", f"[rows, dim] with {rows} rows", shape_of(residual), f"pass what {name} was made of")
    if residual.dtype != like.dtype or residual.device != like.device:
        check_common(op, name, {name: like, "residual": residual}, None, {})
