"""The CUDA sources compile as they are built: by nvcc without spilled registers, and by NVRTC without any header."""

from __future__ import annotations

import ctypes
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from spear_fast.kernels.audit import nvcc

from spear_fast.ops.cuda import sources


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("kernel", nvcc.KERNELS[2::5], ids=lambda kernel: f"{kernel.name} {kernel.arguments}")
def test_nvcc(kernel):
    """Some of the kernels on one architecture; `make audit` compiles them all."""
    found = nvcc.compile_kernel(kernel, 90)
    assert found["spilled"] == 0
    assert 0 < found["registers"] <= 168
    assert found["shared"] <= 48 * 1024, "more needs a launch that asks for it"


def nvrtc():
    """Returns the run-time compiler's library: NVIDIA's package has it, and so has a toolkit."""
    folders = [Path(each) for each in (find_spec("nvidia").submodule_search_locations if find_spec("nvidia") else [])]
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    for folder in folders:
        for path in sorted(folder.rglob("libnvrtc.so*")):
            return ctypes.CDLL(str(path))
    pytest.skip("there is no NVRTC")


@pytest.mark.parametrize(
    ("source", "kernel", "architecture"),
    [
        ("beam_step.cu", "beam_step<spear_fast::Half>", 90),
        ("sample_step.cu", "sample_step<spear_fast::BFloat16>", 80),
        ("fused_step.cu", "fused_step<spear_fast::BFloat16, 4>", 90),
    ],
)
def test_nvrtc(source, kernel, architecture):
    """As CuPy does it: the text alone, and the name of one kernel."""
    compiler, program = nvrtc(), ctypes.c_void_p()
    text, name = sources.text(source).encode(), f"spear_fast::{kernel}".encode()
    assert compiler.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None) == 0
    assert compiler.nvrtcAddNameExpression(program, name) == 0
    options = (ctypes.c_char_p * 2)(b"-std=c++17", f"-arch=sm_{architecture}".encode())
    status = compiler.nvrtcCompileProgram(program, 2, options)
    log = ctypes.create_string_buffer(1 << 16)
    compiler.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    lowered = ctypes.c_char_p()
    assert compiler.nvrtcGetLoweredName(program, name, ctypes.byref(lowered)) == 0
    assert kernel.partition("<")[0].encode() in lowered.value
