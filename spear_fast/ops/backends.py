"""The kinds of providers: plain torch, C++ on the CPU, CUDA, and Triton; each says for itself why it cannot run."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spear_fast.ops import extension
from spear_fast.ops.checks import refuse_layouts, refuse_views
from spear_fast.ops.cuda import runtime
from spear_fast.ops.providers import Provider, ProviderQuery

WhyNot = Callable[[ProviderQuery], str | None]

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def of_dtypes(*dtypes: torch.dtype) -> WhyNot:
    """Returns a `why_not` that refuses other dtypes."""

    def why_not(query: ProviderQuery) -> str | None:
        return None if query.dtype in dtypes else f"takes {', '.join(map(str, dtypes))}, not {query.dtype}"

    return why_not


def reference(op: str, module: ModuleType) -> Provider:
    """Returns the provider `reference`: the function named like the op in a module of `spear_fast.ops.reference`."""
    function = getattr(module, op)
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def of_dense(*arguments: Any) -> Any:
        # plain torch takes some sparse tensors, and computes something else
        refuse_layouts(op, dict(zip(names, arguments, strict=False)))
        return function(*arguments)

    return Provider(op, "reference", of_dense)


def cpu(op: str, why_not: WhyNot | None = None) -> Provider:
    """Returns the provider `cpu`: the overload of that name, registered from csrc/cpu."""
    function = getattr(torch.ops.spear_fast, op).cpu
    return Provider(op, "cpu", function, ("cpu",), extension.missing, why_not or of_dtypes(*CPU_DTYPES))


@functools.cache
def cuda_missing() -> str | None:
    """Returns why no CUDA kernel of csrc/cuda can run here, from the extension or by CuPy, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the kernels need a device of compute capability 8.0 or newer, and this one has {major}.{minor}"
    if cuda_is_native():
        return None
    reason = runtime.missing()
    return reason and f"the extension was built without nvcc, and {reason}"


def cuda_is_native() -> bool:
    """Returns whether the extension is there and was built with nvcc."""
    return extension.missing() is None and bool(extension.facts().get("cuda"))


def cuda(op: str, why_not: WhyNot | None = None) -> Provider:
    """Returns the provider `cuda`: the overload of that name, or the function of `spear_fast.ops.cuda.<op>`."""

    @functools.cache
    def found() -> Callable:
        if cuda_is_native():
            return getattr(torch.ops.spear_fast, op).cuda
        return holding_numbers(op, getattr(importlib.import_module(f"spear_fast.ops.cuda.{op}"), op))

    def function(*arguments: Any) -> Any:
        return found()(*arguments)

    return Provider(op, "cuda", function, ("cuda",), cuda_missing, why_not or of_dtypes(*TRITON_DTYPES))


def holding_numbers(op: str, function: Callable) -> Callable:
    """Returns a function for memory that is read as it lies: a view that stands for other numbers is refused.

    The dispatcher resolves such views for all that is registered with it; it is not asked here.
    """

    def called(*arguments: Any) -> Any:
        if any([isinstance(each, Tensor) and (each.is_neg() or each.is_conj()) for each in arguments]):
            refuse_views(op)
        return function(*arguments)

    return called


def interpreted() -> bool:
    """Returns whether Triton's kernels run in its interpreter, and so on the CPU: Triton reads it when it compiles."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def _triton_missing() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if not interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests"
    return None


def triton(op: str, module: str, why_not: WhyNot | None = None) -> Provider:
    """Returns the provider `triton`: the function named like the op in `spear_fast.kernels.<module>`.

    why_not: what it refuses besides the dtypes that no kernel takes.
    """
    of_dtype = of_dtypes(*TRITON_DTYPES)

    def refusal(query: ProviderQuery) -> str | None:
        return of_dtype(query) or (why_not(query) if why_not else None)

    @functools.cache
    def found() -> Callable:
        return holding_numbers(op, getattr(importlib.import_module(f"spear_fast.kernels.{module}"), op))

    def function(first: Tensor, *others: Any) -> Any:
        # Triton launches on the current device, wherever the tensors are
        if first.device.type == "cuda" and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return found()(first, *others)
        return found()(first, *others)

    devices = ("cuda", "cpu") if interpreted() else ("cuda",)
    return Provider(op, "triton", function, devices, _triton_missing, refusal)
