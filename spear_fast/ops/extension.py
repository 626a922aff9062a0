"""The compiled extension: loaded when an op first asks for it; why it cannot be is kept, and told, never raised.

It is built once for each of some instruction sets; a machine loads the first that its CPU has all features of.
SPEAR_FAST_CPU=avx2 (or another variant that was built) loads that one instead.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent.parent
_REBUILD = "reinstall spear-fast (pip install --no-build-isolation -e .)"


def fingerprint(csrc: Path) -> str:
    """Returns what stands for the sources of the extension in a checkout: 16 characters."""
    whole = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in (".cpp", ".h", ".cu")):
        whole.update(f"{path.relative_to(csrc).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


@functools.cache
def _built() -> dict[str, Any]:
    """Returns the note that the build left, or nothing."""
    path = _FOLDER / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@functools.cache
def facts() -> dict[str, Any]:
    """Returns what the extension was built with and for: torch, compiler, machine, cuda, and `variants`.

    Of the variant that this machine loads, where there is one: `variant`, its name, march, capability and features.
    """
    built = _built()
    name = _choose(built.get("variants", {}), _cpu_features(), os.environ.get("SPEAR_FAST_CPU"))
    return built if name is None else {**built, "variant": name, **built["variants"][name]}


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


def _lacking(variant: Mapping[str, Any], features: set[str] | None) -> list[str]:
    return [] if features is None else sorted(set(variant["features"]) - features)


def _choose(variants: Mapping[str, Mapping[str, Any]], features: set[str] | None, forced: str | None) -> str | None:
    """Returns the name of the variant to load, or None where the CPU can run none of them.

    variants: the preferred first. features: of the CPU; None where it does not say, and the least demanding is taken.
    forced: SPEAR_FAST_CPU. Raises ValueError where it names none of them, or one that the CPU cannot run.
    """
    if forced and variants:
        if forced not in variants:
            raise ValueError(
                f"SPEAR_FAST_CPU must be one of {', '.join(variants)}, got {forced!r}; leave it out or correct it"
            )
        lacking = _lacking(variants[forced], features)
        if lacking:
            raise ValueError(
                f"SPEAR_FAST_CPU must name a variant that this CPU can run, got {forced!r}, which needs "
                f"{', '.join(lacking)}; leave it out to have one chosen"
            )
        return forced
    if features is None:
        return list(variants)[-1] if variants else None
    return next((name for name, variant in variants.items() if not _lacking(variant, features)), None)


@functools.cache
def missing() -> str | None:
    """Returns why the extension cannot be used here, or None after having loaded it."""
    built = facts()
    if not built:
        there = any(_FOLDER.glob("_C*.so"))
        state = "lies there without a note of what it was built for" if there else "is not built"
        return f"the C++ extension {state}; {_REBUILD}{'' if there else ' where there is a C++ compiler'}"
    return _unfit(built) or _load(_FOLDER / f"_C_{built['variant']}.so")


def _unfit(built: Mapping[str, Any]) -> str | None:
    """Returns why what was built is not for here, or None."""
    if built["torch"] != torch.__version__:
        return f"the C++ extension was built for torch {built['torch']} and this is {torch.__version__}; {_REBUILD}"
    if built["machine"] != platform.machine():
        return f"the C++ extension was built for {built['machine']} and this is {platform.machine()}; {_REBUILD}"
    if not built.get("variants"):
        return f"the C++ extension was built by an older version; {_REBUILD}"
    csrc = _FOLDER.parent / "csrc"
    # not in a wheel, whose sources stay where it was built
    if (csrc / "register.cpp").is_file() and built.get("sources") != fingerprint(csrc):
        return f"the C++ extension was built from other sources than lie in csrc now; {_REBUILD}"
    if "variant" not in built:
        least = list(built["variants"].values())[-1]
        lacking = ", ".join(_lacking(least, _cpu_features()))
        return f"the C++ extension was built for a CPU with {lacking}, which this one lacks; {_REBUILD}"
    return None


def _load(library: Path) -> str | None:
    """Loads a variant; returns why it cannot be, or None."""
    if not library.is_file():
        return f"the C++ extension is not built; {_REBUILD} where there is a C++ compiler"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the C++ extension does not load ({error}); {_REBUILD}"
    return None
