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
    return _peak("generation", case.name, variant, device, dtype)


def peak_of_training(case: str, variant: str, device: torch.device, dtype: torch.dtype) -> int:
    """Returns the most bytes that a process held for steps of a case of `benchmarks.train`: weights, the optimizer's
    numbers, gradients and all else but what it began with."""
    return _peak("training", case, variant, device, dtype)


def _peak(kind: str, case: str, variant: str, device: torch.device, dtype: torch.dtype) -> int:
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "benchmarks.memory", kind, case, variant, device.type, name]
    command.append(str(torch.get_num_threads()))
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} in its own process: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])


def main() -> None:
    kind, name, variant, device, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    measure = {"generation": _of_generation, "training": _of_training}[kind]
    print(measure(name, variant, torch.device(device), DTYPES[dtype]))


def _of_training(name: str, variant: str, device: torch.device, dtype: torch.dtype) -> int:
    from benchmarks import train

    cases = {case.name: case for case in train.CASES}
    # a first step loads what is loaded once
    train.variant_stepper(cases["tiny b3"], variant, device, dtype)()
    before = resident("VmRSS")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = train.variant_stepper(cases[name], variant, device, dtype)
    if device.type != "cuda":
        Path("/proc/self/clear_refs").write_text("5")
    # the second has the optimizer's numbers too
    for _ in range(2):
        step()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - before


def _of_generation(name: str, variant: str, device: torch.device, dtype: torch.dtype) -> int:
    from benchmarks.variants import Generation

    # a first model loads what is loaded once: libraries, the compiled extension, threads
    with torch.inference_mode():
        Generation(CASES["tiny"], device, reference=False).own()[variant]()
        before = resident("VmRSS")
        generation = Generation(CASES[name], device, dtype, reference=False)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            # making the models took more than keeping one
            Path("/proc/self/clear_refs").write_text("5")
        generation.own()[variant]()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - before


if __name__ == "__main__":
    main()
