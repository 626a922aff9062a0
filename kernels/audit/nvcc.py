"""The audit's part for csrc/cuda: each kernel compiled by nvcc for each architecture, and ptxas' report on it."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..tiles import ARCHITECTURES
from .rows import AuditRow, Job

FOLDER = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


class CudaKernel(NamedTuple):
    """A kernel to compile. name: without its arguments. arguments: of the template. struct: what it takes."""

    source: str
    name: str
    arguments: str
    struct: str


# for 1, 4, 8 and 16 rows
FUSED_STEP = ("BFloat16, 1", "BFloat16, 4", "BFloat16, 8", "BFloat16, 16", "Half, 16")
KERNELS = (
    CudaKernel("beam_step.cu", "beam_step", "BFloat16", "BeamStep"),
    CudaKernel("beam_step.cu", "beam_step", "float", "BeamStep"),
    CudaKernel("sample_step.cu", "sample_step", "BFloat16", "SampleStep"),
    CudaKernel("sample_step.cu", "sample_step", "float", "SampleStep"),
    *(CudaKernel("fused_step.cu", "fused_step", each, "FusedStep") for each in FUSED_STEP),
)


def compile_kernel(kernel: CudaKernel, architecture: int) -> dict[str, Any]:
    """Returns registers, spilled bytes and shared memory of a kernel, compiled to a cubin."""
    program = f'#include "{FOLDER / kernel.source}"\nnamespace spear_fast {{\n'
    program += f"template __global__ void {kernel.name}<{kernel.arguments}>({kernel.struct});\n}}\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cu"
        source.write_text(program)
        flags = ["-O3", "-std=c++17", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
        command = ["nvcc", *flags, "-o", str(source.with_suffix(".cubin")), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc: {next(iter(re.findall('error.*', done.stderr)), done.stderr[-200:])}")
    registers = re.findall(r"Used (\d+) registers", done.stderr)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    if len(registers) != 1 or not spilled:
        raise RuntimeError(f"ptxas said nothing of registers: {done.stderr.strip()[:200]!r}")
    shared = re.findall(r"(\d+) bytes smem", done.stderr)
    return {"registers": int(registers[0]), "spilled": max(map(int, spilled)), "shared": int((shared or [0])[0])}


def threads_of(kernel: CudaKernel) -> int:
    """Returns the threads of a kernel's blocks, as its source bounds them; launches use the same constant.

    Raises ValueError where the source has no bound.
    """
    headers = [path.read_text() for path in sorted(FOLDER.parent.rglob("*.h"))]
    text = "\n".join([(FOLDER / kernel.source).read_text(), *headers])
    bound = re.search(rf"__launch_bounds__\((\w+)[^;{{]*?\)\s+{kernel.name}\(", text)
    number = bound and (bound[1] if bound[1].isdecimal() else None)
    if bound and number is None:
        constant = re.search(rf"constexpr int {bound[1]} = (\d+);", text)
        number = constant and constant[1]
    if not number:
        raise ValueError(f"{kernel.source} must give {kernel.name} __launch_bounds__ with a constant; add them")
    return int(number)


def jobs() -> Iterator[Job]:
    """Returns a job for each kernel and architecture; none where there is no nvcc or no checkout."""
    if shutil.which("nvcc") is None or not FOLDER.is_dir():
        return
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    headers = [path.read_text() for path in sorted(FOLDER.parent.rglob("*.h"))]
    for kernel in KERNELS:
        threads = threads_of(kernel)
        text = [version, *headers, (FOLDER / kernel.source).read_text(), *kernel]
        for architecture in ARCHITECTURES:
            key = hashlib.sha256("\0".join([*text, str(architecture)]).encode()).hexdigest()[:32]
            dtype, _, tile = kernel.arguments.partition(", ")
            row = AuditRow(kernel.name, "nvcc", architecture, dtype.lower(), tile or "-", threads=threads)
            yield Job(kernel.name, key, row, compile_kernel, (kernel, architecture))
