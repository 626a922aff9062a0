"""Compiles every kernel for every architecture without a GPU, and says what the compiler made of it.

    python -m spear_fast.kernels.audit [--only WORD] [--jobs N] [--cache FOLDER]

Prints registers, spilled bytes, shared memory, blocks a multiprocessor and matrix instruction for each kernel,
architecture, dtype and tile, and fails where registers are spilled, shared memory is above the architecture's, a
multiprocessor holds fewer than two blocks and occupancy.py does not say why, or a wanted matrix instruction is missing.
Results are kept by a hash of sources, settings and compiler, so that a second run takes seconds.

Triton's kernels declare themselves (declaration.py); another compiler's jobs are added to SECTIONS.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from ..tiles import SHARED_MEMORY
from . import nvcc, triton_kernels
from .occupancy import occupancy, stale, too_few
from .rows import AuditRow, Job, remembered

# each returns what is to be compiled: a name, a hash, and the function that compiles it
SECTIONS: list[Callable[[], Iterable[Job]]] = [triton_kernels.jobs, nvcc.jobs]


def faults(row: AuditRow) -> list[str]:
    """Returns what is wrong with a compiled kernel, in words; nothing if all is well."""
    found = []
    if row.error:
        return [f"does not compile: {row.error}"]
    if row.spilled:
        found.append(f"spills {row.spilled} bytes of registers; take a smaller tile or more warps")
    limit = SHARED_MEMORY[row.architecture]
    if row.shared > limit:
        found.append(
            f"takes {row.shared} bytes of shared memory and sm_{row.architecture} has {limit}; take fewer stages"
        )
    elif few := too_few(row):
        found.append(few)
    if row.wanted and not set(row.wanted) & set(row.matrix):
        found.append(f"has no {' or '.join(row.wanted)}; blocks are too small or the dtype has none")
    return found


def table(rows: Sequence[AuditRow]) -> str:
    """Returns the rows as text, columns aligned."""
    lines = [("kernel", "variant", "sm", "dtype", "tile", "registers", "spilled", "shared", "blocks", "matrix")]
    for row in rows:
        numbers = (str(row.registers), str(row.spilled), str(row.shared), str(occupancy(row)))
        lines.append(
            (row.kernel, row.variant, str(row.architecture), row.dtype, row.tile, *numbers, " ".join(row.matrix) or "-")
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def compiled(jobs: Sequence[Job], cache: Path, processes: int) -> list[AuditRow]:
    """Returns a row for each job, from the cache where it has been compiled before."""
    global _shared
    _shared = jobs, cache
    if processes == 1:
        return [remembered(job, cache) for job in jobs]
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        return list(pool.map(_row, range(len(jobs))))


# kernels cannot be sent to other processes: they inherit them
_shared: tuple[Sequence[Job], Path] = ((), Path())


def _row(index: int) -> AuditRow:
    jobs, cache = _shared
    return remembered(jobs[index], cache)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the audit; returns the exit status: 0 if every kernel is as it should be."""
    parser = argparse.ArgumentParser(prog="python -m spear_fast.kernels.audit", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="only kernels whose name has WORD in it")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: up to 2)")
    parser.add_argument("--cache", type=Path, default=Path("build/audit"), help="default: build/audit")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "") == "1":
        parser.error("kernels are not compiled under TRITON_INTERPRET=1; unset it")
    if find_spec("triton") is None:
        parser.error("Triton must be there to compile its kernels; pip install triton")
    everything = [job for section in SECTIONS for job in section()]
    jobs = [job for job in everything if options.only in job.name]
    if not jobs:
        parser.error(f"--only must be part of a kernel's name, got {options.only!r}; leave it out to see them all")
    options.cache.mkdir(parents=True, exist_ok=True)
    rows = compiled(jobs, options.cache, options.jobs)
    print(table(rows))
    wrong = [(row, fault) for row in rows for fault in faults(row)]
    for row, fault in wrong:
        name = " ".join(filter(None, (row.kernel, row.variant, f"sm_{row.architecture}", row.dtype, row.tile)))
        print(f"{name}: {fault}", file=sys.stderr)
    names = {job.name for job in everything} | {kernel.name for kernel in nvcc.KERNELS}
    unneeded = stale(rows, names)
    for fault in unneeded:
        print(f"kernels/audit/occupancy.py: {fault}; take it out", file=sys.stderr)
    print(f"{len(rows)} compiled kernels, {len(wrong) + len(unneeded)} faults")
    return 1 if wrong or unneeded else 0


if __name__ == "__main__":
    raise SystemExit(main())
