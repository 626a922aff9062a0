"""What the audit knows of one compiled kernel, and how it is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class AuditRow:
    """One kernel, compiled for one architecture at one tile.

    registers: of a thread. spilled, shared: bytes. threads: of a block.
    matrix: the kinds of matrix instruction found. wanted: any of these must be found; empty: none is asked for.
    error: the compiler's words where it failed.
    """

    kernel: str
    variant: str
    architecture: int
    dtype: str
    tile: str
    wanted: tuple[str, ...] = ()
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    matrix: tuple[str, ...] = ()
    threads: int = 128
    error: str = ""


@dataclass(frozen=True)
class Job:
    """Something to compile. name: the kernel's. key: a hash of all that the result depends on.

    row: what is known before. compile: a function of a module and its arguments, which fills in the rest.
    """

    name: str
    key: str
    row: AuditRow
    compile: Callable[..., dict]
    arguments: tuple


def remembered(job: Job, cache: Path) -> AuditRow:
    """Returns the row of a job: compiled now, or read from the cache. Failures are not kept."""
    path = cache / f"{job.key}.json"
    if path.is_file():
        found = json.loads(path.read_text())
        return replace(job.row, **{**found, "matrix": tuple(found["matrix"])})
    try:
        row = replace(job.row, **job.compile(*job.arguments))
    except Exception as error:
        return replace(job.row, error=(str(error).strip() or type(error).__name__).splitlines()[-1])
    facts = asdict(row)
    path.write_text(json.dumps({name: facts[name] for name in ("registers", "spilled", "shared", "matrix")}))
    return row
