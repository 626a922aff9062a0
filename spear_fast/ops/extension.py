"""The compiled extension: loaded when an op first asks for it; why it cannot be is kept, and told, never raised."""

from __future__ import annotations

import functools
import json
import platform
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent.parent
_LIBRARY = _FOLDER / "_C.so"
_REBUILD = "reinstall spear-fast (pip install --no-build-isolation -e .)"


@functools.cache
def facts() -> dict[str, Any]:
    """Returns what the extension was built with and for: torch, compiler, march, machine, CPU features, cuda."""
    path = _FOLDER / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _cpu_features() -> set[str] | None:
    """Returns the features that this machine's CPU says it has, or None where it does not say."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return None


@functools.cache
def missing() -> str | None:
    """Returns why the extension cannot be used here, or None after having loaded it."""
    if not _LIBRARY.is_file():
        return f"the C++ extension is not built; {_REBUILD} where there is a C++ compiler"
    built = facts()
    if not built:
        return f"the C++ extension lies there without a note of what it was built for; {_REBUILD}"
    if built["torch"] != torch.__version__:
        return f"the C++ extension was built for torch {built['torch']} and this is {torch.__version__}; {_REBUILD}"
    if built["machine"] != platform.machine():
        return f"the C++ extension was built for {built['machine']} and this is {platform.machine()}; {_REBUILD}"
    features = _cpu_features()
    lacking = sorted(set(built["features"]) - features) if features is not None else []
    if lacking:
        return f"the C++ extension was built for a CPU with {', '.join(lacking)}, which this one lacks; {_REBUILD}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"the C++ extension does not load ({error}); {_REBUILD}"
    return None
