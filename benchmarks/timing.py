"""Timing of variants side by side, and the record of what they were timed on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parent.parent


def interleaved(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns seconds of each variant in each round; every round runs all of them once, in turning order."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def quantile(values: list[float], share: float) -> float:
    """Returns the quantile by linear interpolation."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def quantiles(values: list[float]) -> dict[str, float]:
    return {name: quantile(values, share) for name, share in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8))}


def limits(size: int = 1536, elements: int = 1 << 25) -> dict[str, float]:
    """Returns what this machine reaches now: `gflops` of a large float32 product, `gbs` of a large copy, both ways."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    source, target = torch.ones(elements), torch.empty(elements)
    out = torch.empty(size, size)

    def best(run: Callable[[], Any]) -> float:
        run()
        return min(interleaved({"it": run}, 5)["it"])

    product, copy = best(lambda: torch.mm(a, b, out=out)), best(lambda: target.copy_(source))
    return {"gflops": 2 * size**3 / product / 1e9, "gbs": 2 * 4 * elements / copy / 1e9}


def processor() -> str:
    """Returns the processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Returns the short commit of this repository, with + where something is changed, or "unknown"."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""

    head = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "spear_fast", "csrc", "benchmarks/*.py")
    return (head + ("+" if changed else "")) or "unknown"


def environment() -> dict[str, Any]:
    """Returns what a row must say about where it was measured; no names or paths of the machine."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "time": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
    }
