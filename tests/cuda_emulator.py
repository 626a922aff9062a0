"""Runs csrc/cuda on the CPU, for small cases: device code compiled by the C++ compiler, a block's threads as fibers.

What Python does for CuPy (the launch, the order of the arguments) is tested too: only launching itself is replaced.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from spear_fast.ops.cuda import runtime, sources
from spear_fast.ops.cuda.runtime import Launch

TESTS = Path(__file__).parent
CACHE = Path(tempfile.gettempdir()) / f"spear_fast_emulated_{os.getuid()}"
OPTIONS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wall", "-Wno-unknown-pragmas"]
# `make asan`; what it says of makecontext is about the scheduler's fibers
if os.environ.get("SPEAR_FAST_TEST_SANITIZED"):
    OPTIONS += ["-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
PROGRAM = """
#define SPEAR_FAST_EMULATE
#include "{source}"
static_assert(sizeof(spear_fast::{struct}) == 8 * {fields}, "a field does not take eight bytes");
extern "C" void run(const void* fields, long long blocks, int threads, unsigned seed, bool together) {{
  using namespace spear_fast;
  {struct} arguments;
  memcpy(&arguments, fields, sizeof(arguments));
  const auto body = [](const void* with) {{ {kernel}(*static_cast<const {struct}*>(with)); }};
  emulate(blocks, threads, seed, together, body, &arguments);
}}
"""


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++")
    if found is None:
        pytest.skip("there is no C++ compiler to play the device with")
    return found


def library(program: str) -> ctypes.CDLL:
    """Returns a program as a loaded library, compiled once for its text and that of all device sources."""
    # the kernels look for the scheduler's symbols among what is loaded
    ctypes.CDLL(str(_built((TESTS / "cuda_emulation.cpp").read_text(), "scheduler")), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(_built(program, "kernel")))


def _built(program: str, name: str) -> Path:
    files = [*sources.folder().rglob("*.h"), *sources.folder().rglob("*.cu"), TESTS / "cuda_emulation.h"]
    text = "".join(path.read_text() for path in sorted(files)) if name == "kernel" else ""
    key = hashlib.sha256("".join([text, program, *OPTIONS]).encode()).hexdigest()[:32]
    path = CACHE / f"{name}_{key}.so"
    if path.is_file():
        return path
    CACHE.mkdir(exist_ok=True)
    code = path.with_name(f"{path.stem}_{os.getpid()}.cpp")
    code.write_text(program)
    made = code.with_suffix(".so")
    folders = [f"-I{TESTS}", f"-I{sources.folder() / 'cuda'}"]
    done = subprocess.run(
        [compiler(), *OPTIONS, *folders, "-o", made, code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    code.unlink()
    made.replace(path)
    return path


@functools.cache
def _kernel(source: str, kernel: str, struct: str) -> ctypes.CDLL:
    count = len(sources.fields(source, struct))
    return library(PROGRAM.format(source=source, kernel=kernel, struct=struct, fields=count))


class Emulator:
    """Stands for `runtime.launch`; `launched` keeps what was launched, `seed` draws the order of threads and blocks."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.launched: list[Launch] = []

    def launch(self, what: Launch, values: Mapping[str, int], device: torch.device) -> None:
        assert device.type == "cpu"
        assert set(values) == set(sources.fields(what.source, what.struct))
        self.launched.append(what)
        if what.blocks:
            numbers = [values[name] for name in sources.fields(what.source, what.struct)]
            fields = (ctypes.c_int64 * len(numbers))(*numbers)
            run = _kernel(what.source, what.kernel, what.struct).run
            seed, together = ctypes.c_uint(self.seed), ctypes.c_bool(what.cooperative)
            run(fields, ctypes.c_longlong(what.blocks), what.threads, seed, together)


@pytest.fixture
def emulator(monkeypatch) -> Emulator:
    """Within the test, CUDA kernels launched from Python run on the CPU."""
    compiler()
    found = Emulator()
    monkeypatch.setattr(runtime, "launch", found.launch)
    return found
