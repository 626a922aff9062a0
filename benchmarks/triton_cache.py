"""Compiles the Triton kernels that a GPU will ask for, on a machine without one, into a cache that can be carried.

    TRITON_CACHE_DIR=build/gpu-kit/triton python -m benchmarks.triton_cache --architecture 90

Every case of the ops that is measured on GPUs is called through the package's own launchers, in bfloat16 and float32,
with Triton told of a GPU that is not there: what it compiles, and under which key, is what it would on one, as long as
the versions of Python, Triton and the sources are the same. Nothing is launched. `--nothing-new`, in a fresh process,
shows that all of it is found again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.operations import chosen_cases
from benchmarks.operations.case import SETS, OpCase, cloned, with_gradients
from spear_fast import ops
from spear_fast.ops import providers

DTYPES = (torch.bfloat16, torch.float32)


class Driver:
    """What Triton asks of a GPU when it compiles."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(architecture: int) -> list[str]:
    """Lets Triton compile for a GPU that is not there, and launch nothing; returns where names of kernels are noted."""
    import triton
    from spear_fast.kernels import tiles
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(Driver(architecture))
    nearest = tiles.nearest_architecture(*divmod(architecture, 10))
    tiles.architecture = lambda device: nearest  # type: ignore[assignment]
    asked: list[str] = []
    real = JITFunction.run

    def compiled(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        asked.append(self.__name__)
        return real(self, *arguments, grid=grid, warmup=True, **keywords)

    JITFunction.run = compiled
    for op in providers.ops():
        if "triton" in providers.names(op):
            own = providers.get(op, "triton")
            # what is frozen for everybody else
            object.__setattr__(own, "devices", ("cuda", "cpu", "meta"))
            object.__setattr__(own, "missing", lambda: None)
    return asked


def call(case: OpCase, dtype: torch.dtype) -> None:
    """Calls a case by its Triton launcher; with gradients its backward launcher too, on numbers that are there.

    Raises ValueError where the launcher does not take it.
    """
    arguments = case.inputs(dtype, torch.device("cpu" if case.gradients else "meta"))
    if not case.gradients:
        providers.get(case.op, "triton").function(*arguments)
        return
    with ops.forced(f"{case.op}=triton,{case.op}_backward=triton"):
        with_gradients(getattr(torch.ops.spear_fast, case.op), case.gradients, cloned(arguments), case.outputs)()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_cache", description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", type=int, default=90, help="compute capability, 90 for 9.0")
    parser.add_argument("--set", dest="kind", default="gpu", choices=SETS, help="cases, see bench op")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="those of these ops alone")
    parser.add_argument("--nothing-new", action="store_true", help="fail where something had to be compiled")
    chosen = parser.parse_args(arguments)
    if "TRITON_CACHE_DIR" not in os.environ:
        parser.error("say where the cache lies: set TRITON_CACHE_DIR.")
    began, asked, failed = time.perf_counter(), pretend(chosen.architecture), 0
    before = cubins()
    for case in chosen_cases(chosen.kind, chosen.ops):
        if "triton" not in providers.names(case.op):
            continue
        for dtype in DTYPES if case.dtype is None else (case.dtype,):
            try:
                call(case, dtype)
            except Exception as error:
                # one case must not take the others with it
                print(f"{case.title} {dtype}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                failed += 1
    new = cubins() - before
    print(
        f"{len(asked)} launches of {len(set(asked))} kernels; {new} compiled, {before} were there; "
        f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return int(failed > 0 or (chosen.nothing_new and new > 0))


def cubins() -> int:
    """Returns how many compiled kernels the cache holds."""
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin")))


if __name__ == "__main__":
    sys.exit(main())
