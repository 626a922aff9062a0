"""Builds a checkout in place, without installing it: for machines that cannot, and for other commits' worktrees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import REPOSITORY

# characters of what the compilers say that are shown
LAST_SAID = 2000


def link_kernels(folder: Path) -> None:
    """Lets a checkout's kernels be found where the package is imported from its folder: inside the package."""
    kernels = folder / "spear_fast" / "kernels"
    if not kernels.exists():
        kernels.symlink_to(folder / "kernels", target_is_directory=True)


def build(folder: Path) -> None:
    """Builds the extension of the checkout in `folder`, which then runs with the folder first on Python's path.

    Raises ValueError where it cannot be built, CUDA kernels included where torch has CUDA and nvcc is there.
    """
    link_kernels(folder)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    # a build that fell back would be measured as what it is not; SPEAR_FAST_BUILD=auto allows it
    environment = {"SPEAR_FAST_BUILD": "require", **os.environ}
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    # what is left out for want of a compiler is said there
    print(built.stderr[-LAST_SAID:], end="", flush=True)
    if built.returncode:
        raise ValueError(f"{folder.name} could not be built: {built.stderr.strip().splitlines()[-1]}")


if __name__ == "__main__":
    build(REPOSITORY)
