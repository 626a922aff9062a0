"""The audit's part for Triton: what is to be compiled, and the compiler's own report on it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import pkgutil
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from .. import __path__ as KERNELS
from ..declaration import Declaration
from ..tiles import Entry, entries
from .rows import AuditRow, Job

DTYPES = {16: "bf16", 32: "fp32"}
# name → what the PTX calls it
MATRIX = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
# architecture and bits at which every variant is compiled; a kernel takes seconds
MAIN = (90, 16)
WANTED = {80: ("mma",), 90: ("wgmma",), 100: ("tcgen05", "mma")}


def declarations() -> Iterator[Declaration]:
    """Returns what all modules of kernels declare, and what is declared of attention beside them."""
    modules = sorted(module.name for module in pkgutil.iter_modules(KERNELS) if not module.ispkg)
    for name in (*modules, "audit.attention"):
        yield from getattr(importlib.import_module(f"spear_fast.kernels.{name}"), "AUDIT", [])


def jobs(declared: Iterable[Declaration] | None = None) -> Iterator[Job]:
    """Returns a job for each kernel and row of the table: for the main target all variants, elsewhere the heaviest."""
    for declaration in declarations() if declared is None else declared:
        for entry in entries(declaration.tile):
            variants = list(declaration.variants)
            for variant in variants if (entry.architecture, entry.bits) == MAIN else variants[-1:]:
                yield _job(declaration, entry, variant)


def _wanted(declaration: Declaration, entry: Entry) -> tuple[str, ...]:
    if not declaration.matrix or entry.bits != 16:
        return ()
    return WANTED[entry.architecture]


def _job(declaration: Declaration, entry: Entry, variant: str) -> Job:
    import triton

    kernel, dtype = declaration.kernel, DTYPES[entry.bits]
    constants = {**declaration.constants(entry.size), **declaration.variants[variant], **entry.blocks}
    signature, multiples = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name not in declaration.signature:
            raise ValueError(f"audit: {kernel.__name__} must declare {name}, got neither a type nor a constant; add it")
        kind, _, multiple = declaration.signature[name].partition(":")
        signature[name] = kind.replace("T", dtype)
        if multiple:
            multiples[(index,)] = [["tt.divisibility", int(multiple)]]
    constants = {name: value for name, value in constants.items() if name in signature}
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
    arguments = (kernel, signature, constants, multiples, entry.architecture, options)
    text = repr((triton.__version__, kernel.cache_key, signature, sorted(constants.items(), key=str), multiples))
    key = hashlib.sha256((text + repr((entry.architecture, options))).encode()).hexdigest()[:32]
    blocks = "×".join(map(str, entry.blocks.values()))
    tile = f"{entry.size}: {blocks}, {entry.num_warps} warps, {entry.num_stages} stages"
    wanted, threads = _wanted(declaration, entry), 32 * entry.num_warps
    row = AuditRow(kernel.__name__, variant, entry.architecture, dtype, tile, wanted, threads=threads)
    return Job(kernel.__name__, key, row, compile_kernel, arguments)


def compile_kernel(
    kernel: Any, signature: dict, constants: dict, multiples: dict, architecture: int, options: dict
) -> dict[str, Any]:
    """Returns registers, spilled bytes, shared memory and matrix instructions of a kernel, compiled to a cubin."""
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=multiples)
    report = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        _environment(TRITON_CACHE_DIR=folder),
        knobs.nvidia.scope(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(report),
    ):
        warnings.simplefilter("ignore")
        knobs.nvidia.dump_ptxas_log = True
        made = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", report.getvalue())
    registers = re.findall(r"Used (\d+) registers", report.getvalue())
    if not spilled or not registers:
        raise RuntimeError(f"ptxas said nothing of registers: {report.getvalue().strip()[:200]!r}")
    return {
        "registers": max(map(int, registers)),
        "spilled": max(map(int, spilled)),
        "shared": made.metadata.shared,
        "matrix": tuple(name for name, word in MATRIX.items() if word in made.asm["ptx"]),
    }


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
