"""Options that the commands share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.machine import DTYPES, results_file


@dataclass(frozen=True)
class Where:
    """What to measure on and in, which set of cases that means by itself, where rows go, and whether there is time."""

    device: torch.device
    dtype: torch.dtype
    out: Path | None
    left: Callable[[], bool]


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where to measure, in what, how long, and where the rows go."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on the CPU, bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch and of peers on the CPU")
    parser.add_argument("--limit", type=float, default=None, help="seconds after which nothing further is begun")
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file, or to the device's in a folder")


def resolved(chosen: argparse.Namespace) -> Where:
    """Returns what the shared options say, and sets torch's threads; the time begins now."""
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    device, began = torch.device(chosen.device), time.perf_counter()
    dtype = DTYPES[chosen.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    out = chosen.out
    if out is not None and out.suffix != ".jsonl":
        out = results_file(device, out)
    return Where(device, dtype, out, lambda: chosen.limit is None or time.perf_counter() - began <= chosen.limit)
