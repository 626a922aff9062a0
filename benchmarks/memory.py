"""The most memory that something holds: of a GPU by torch's count, of the CPU by the kernel's, in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.cases import CASES, Case
from benchmarks.machine import DTYPES, REPOSITORY


def resident(field: str) -> int:
    """Returns a field of this process' memory in bytes: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"this system does not tell {field}; memory is measured on Linux.")


def peak_of_generation(case: Case, variant: str, device: torch.device, dtype: torch.dtype) -> int:
    """Returns the most bytes that a process held for a case: weights, caches and all else but what it began with."""
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "benchmarks.memory", case.name, variant, device.type, name]
    command.append(str(torch.get_num_threads()))
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name} in its own process: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def main() -> None:
    from benchmarks.variants import Generation

    name, variant, device, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    # a first model loads what is loaded once: libraries, the compiled extension, threads
    with torch.inference_mode():
        Generation(CASES["tiny"], torch.device(device), reference=False).own()[variant]()
        before = resident("VmRSS")
        generation = Generation(CASES[name], torch.device(device), DTYPES[dtype], reference=False)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            # making the models took more than keeping one
            Path("/proc/self/clear_refs").write_text("5")
        generation.own()[variant]()
    print(torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM") - before)


if __name__ == "__main__":
    main()
