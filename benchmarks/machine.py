"""What a row must say about where it was measured, and what that machine can do at most, measured on the spot."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# what a machine that does not tell is taken to have
LAST_LEVEL_CACHE = 32 << 20


def processor() -> str:
    """Returns the processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device = CPU) -> str:
    """Returns what rows and tables call the device, such as "2-core AMD EPYC"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()}-core {processor()}"


def results_file(device: torch.device, folder: Path = RESULTS) -> Path:
    """Returns the file that holds the device's rows."""
    return folder / f"{slug(device_name(device))}.jsonl"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output(*command: str) -> str:
    try:
        found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


@functools.cache
def commit() -> str:
    """Returns the short commit of this repository, with + where something is changed, or "unknown".

    Where the folder is a copy without its history, SPEAR_FAST_COMMIT says what it is a copy of.
    """
    head = _output("git", "rev-parse", "--short=10", "HEAD")
    what = ("spear_fast", "csrc", "kernels", "benchmarks/*.py", "benchmarks/operations")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", *what)
    return (head + ("+" if changed else "")) or os.environ.get("SPEAR_FAST_COMMIT", "unknown")


@functools.cache
def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or None


def version(distribution: str) -> str | None:
    """Returns the version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device = CPU) -> dict[str, Any]:
    """Returns what a row says about where it was measured; no names or paths of the machine."""
    facts: dict[str, Any] = {
        "device": device_name(device),
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
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        facts |= {
            "capability": f"sm_{major}{minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "triton": version("triton"),
        }
    return facts


@functools.cache
def last_level_cache(device: torch.device) -> int:
    """Returns the bytes of the largest cache before the device's memory."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or LAST_LEVEL_CACHE
    sizes = [LAST_LEVEL_CACHE]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        sizes += [int(number[1]) << (10 if number[2] == "K" else 20)] if number else []
    return max(sizes)


def _best(run: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """Returns the fewest seconds that a call took, after one that warms up."""
    run()
    seconds = []
    for _ in range(times):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            run()
            ended.record()
            torch.cuda.synchronize(device)
            seconds.append(began.elapsed_time(ended) / 1e3)
        else:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Returns the floating-point operations a second of a large matmul of random matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    return 2 * size**3 / _best(lambda: torch.mm(a, b, out=out), device)


def copy_rate(device: torch.device, size: int) -> float:
    """Returns the bytes a second of a large copy, read and written ones counted."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


@functools.cache
def limits(device: torch.device = CPU, dtype: torch.dtype = torch.float32, *, quick: bool = False) -> dict[str, float]:
    """Returns what this machine reaches now: `gflops` of a large matmul in `dtype`, `gbs` of a large copy.

    quick: small sizes, for tests of the machinery; the numbers then mean little.
    """
    if quick:
        size, copied = 128, 1 << 20
    elif device.type == "cuda":
        size, copied = 8192 if dtype in (torch.bfloat16, torch.float16) else 4096, 1 << 31
    else:
        size, copied = 1536 if dtype in (torch.float32, torch.float64) else 512, 1 << 27
    return {"gflops": product_rate(device, dtype, size) / 1e9, "gbs": copy_rate(device, copied) / 1e9}
