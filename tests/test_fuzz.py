"""The ops and native classes under an electric fence: a short run of `make fuzz`, and that its fence holds."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spear_fast.ops import extension

ROOT = Path(__file__).parent.parent
FUZZ = ROOT / "tests" / "fuzz" / "fuzz_ops.py"
pytestmark = [
    pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing())),
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("cc") is None, reason="the fence needs glibc and a C compiler"
    ),
    pytest.mark.skipif(
        bool(os.environ.get("SPEAR_FAST_TEST_SANITIZED")), reason="a sanitizer watches allocations already"
    ),
]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_hostile_arguments_neither_crash_nor_hang():
    """Other cases in each run would fail at random: these are the same each time; `make fuzz` draws new ones."""
    done = run(str(FUZZ), "--seed", "0", "--cases", "400", "--seconds", "15")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout


OVER_THE_FENCE = """
import ctypes, sys
guard = ctypes.CDLL(sys.argv[1])
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
guard.guard_arm(1)
p = libc.malloc(ctypes.c_size_t(64))
guard.guard_arm(0)
ctypes.memset(p, 1, int(sys.argv[2]))
print("within")
"""


def test_the_fence_holds():
    """One byte after an allocation ends the process; the last one of it does not."""
    run(str(FUZZ), "--cases", "0")
    guard = str(ROOT / "build" / "fuzz" / "guard.so")
    assert ctypes.CDLL(guard).guard_arm
    assert run("-c", OVER_THE_FENCE, guard, "64", LD_PRELOAD=guard).stdout == "within\n"
    assert run("-c", OVER_THE_FENCE, guard, "65", LD_PRELOAD=guard).returncode < 0
