"""Building and launching device code at run time, through CuPy; CuPy is looked for when first needed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from spear_fast.ops.cuda import sources

# the types that the kernels are written for
SCALARS = {torch.float32: "float", torch.bfloat16: "spear_fast::BFloat16", torch.float16: "spear_fast::Half"}


class Launch(NamedTuple):
    """One launch of a kernel.

    source: the file of csrc/cuda. kernel: the C++ expression that names the kernel, template arguments included.
    struct: the type of its one argument. blocks, threads: the sizes of the grid and of a block, both one-dimensional.
    cooperative: whether blocks wait for each other, so that all must be there at once.
    """

    source: str
    kernel: str
    struct: str
    blocks: int
    threads: int
    cooperative: bool = False


@functools.cache
def missing() -> str | None:
    """Returns why device code cannot be built at run time here, or None."""
    if find_spec("cupy") is None:
        return "CuPy is not installed; pip install cupy-cuda13x, or reinstall spear-fast where nvcc is"
    if sources.folder() is None:
        return "the device sources are not installed; reinstall spear-fast from its wheel or its checkout"
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"CuPy does not work here ({str(error).splitlines()[0]}); install the one for this CUDA"
    return None


@functools.cache
def _built(source: str, kernel: str) -> Any:
    """Returns a kernel; CuPy builds it for each device at its first launch there and keeps what it built on disk."""
    import cupy

    module = cupy.RawModule(code=sources.text(source), options=("-std=c++17",), name_expressions=[kernel])
    return module.get_function(kernel)


@functools.cache
def _layout(source: str, struct: str) -> Any:
    import numpy

    return numpy.dtype([(name, numpy.int64) for name in sources.fields(source, struct)])


def launch(what: Launch, values: Mapping[str, int], device: torch.device) -> None:
    """Launches a kernel on the current stream of `device`, and returns before it has run.

    values: every field of the struct; tensors as their addresses.
    """
    if what.blocks == 0:
        return
    import cupy
    import numpy

    layout = _layout(what.source, what.struct)
    argument = numpy.array([tuple(values[name] for name in layout.names)], dtype=layout)
    stream = torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream, device.index):
        kernel = _built(what.source, what.kernel)
        if what.cooperative:
            # a module built for it would be linked with CUDA's library for such kernels, which none needs here
            kernel.kernel((what.blocks,), (what.threads,), (argument,), enable_cooperative_groups=True)
        else:
            kernel((what.blocks,), (what.threads,), (argument,))
