"""What the checks of all ops share: one sentence on what is wrong, what was wanted, what came and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor


def shape_of(tensor: Tensor) -> str:
    return str([int(size) for size in tensor.shape])


def refuse(op: str, name: str, wanted: str, got: str, advice: str) -> NoReturn:
    raise ValueError(f"{op}: {name} must be {wanted}, got {got}; {advice}")


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
        dtype.is_floating_point
        and all([each.dtype == dtype and each.device == device for each in tensors.values()])
        and all([each.dtype == wanted and each.device == device for each, wanted in integers.values()])
        and (freqs is None or (freqs.dtype in (torch.float32, dtype) and freqs.device == device))
    ):
        return
    if not first.dtype.is_floating_point:
        refuse(op, like, "floating point", str(first.dtype), "convert it, and what goes with it, with .to()")
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
