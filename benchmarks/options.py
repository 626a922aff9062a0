"""Options that the commands share."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.machine import DTYPES, REPOSITORY, results_file


@dataclass(frozen=True)
class Where:
    """What to measure on and in, where rows go, and after how many seconds from now nothing further is begun."""

    device: torch.device
    dtype: torch.dtype
    out: Path | None
    limit: float | None = None
    began: float = field(default_factory=time.perf_counter)

    def remaining(self) -> float | None:
        """Returns the seconds that are left, None where there is no limit."""
        return None if self.limit is None else self.limit - (time.perf_counter() - self.began)

    def left(self) -> bool:
        remaining = self.remaining()
        return remaining is None or remaining >= 0


class DeviceLostError(RuntimeError):
    """The device no longer answers this process. done: how many cases were begun."""

    def __init__(self, done: int) -> None:
        super().__init__(f"the device no longer answers, after case {done}.")
        self.done = done


def device_lost(device: torch.device) -> bool:
    """Returns whether a kernel has left the device in a state in which nothing runs in this process any more."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def in_fresh_process(command: str, arguments: Sequence[str], skip: int, where: Where) -> int:
    """Runs a command again without its first `skip` cases, in the time that is left; returns 1: one has failed."""
    print(f"the device no longer answers: a fresh process continues after case {skip}", flush=True)
    more = ["--skip", str(skip)]
    if where.remaining() is not None:
        more += ["--limit", f"{where.remaining():.1f}"]
    subprocess.run([sys.executable, "-u", "-m", "benchmarks", command, *arguments, *more], cwd=REPOSITORY, check=False)
    return 1


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where to measure, in what, how long, and where the rows go."""
    add_skip(parser)
    add_where(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--limit", type=float, default=None, help="seconds after which nothing further is begun")


def add_where(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where to measure and where the rows go."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch and of peers on the CPU")
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file, or to the device's in a folder")


def add_skip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N of the chosen cases")


def resolved(chosen: argparse.Namespace) -> Where:
    """Returns what the shared options say, and sets torch's threads; the time begins now."""
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    dtype = DTYPES[getattr(chosen, "dtype", None) or ("float32" if device.type == "cpu" else "bfloat16")]
    out = chosen.out
    if out is not None and out.suffix != ".jsonl":
        out = results_file(device, out)
    return Where(device, dtype, out, getattr(chosen, "limit", None))
