"""The device sources as text: found, joined with what they include, and the order of their arguments read off."""

from __future__ import annotations

import functools
import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[2]


def folder() -> Path | None:
    """Returns the folder csrc: inside the package where it was installed, beside it in a checkout; None without one."""
    for path in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (path / "cuda" / "device.h").is_file():
            return path
    return None


@functools.cache
def text(name: str) -> str:
    """Returns a file of csrc/cuda with everything that it includes from csrc in place, each once.

    name: such as "beam_step.cu".
    """
    root = folder()
    if root is None:
        raise RuntimeError("the device sources are not installed: reinstall spear-fast from its wheel or its checkout")
    return "".join(_joined(root / "cuda" / name, set()))


def _joined(path: Path, seen: set[Path]) -> list[str]:
    path = path.resolve()
    if path in seen:
        return []
    seen.add(path)
    pieces = []
    for line in path.read_text().splitlines(keepends=True):
        included = re.match(r'\s*#include "(.+)"', line)
        if line.startswith("#pragma once"):
            continue
        if included and (path.parent / included[1]).is_file():
            pieces += _joined(path.parent / included[1], seen)
        else:
            pieces.append(line)
    return pieces


@functools.cache
def fields(name: str, struct: str) -> tuple[str, ...]:
    """Returns the names of a struct's fields in their order; in the structs of arguments each takes eight bytes.

    An array `keys[2]` counts as its elements, keys0 and keys1.
    """
    body = re.search(rf"^struct {struct} \{{(.*?)^\}};", text(name), re.MULTILINE | re.DOTALL)
    if body is None:
        raise ValueError(f"{name} has no struct {struct}; name the struct that its kernels take")
    found = []
    for declaration in re.sub(r"//.*", "", body[1]).split(";"):
        _, _, names = declaration.strip().partition("long long ")
        # a pointer: the name is what follows the last star
        names = names if names and "*" not in declaration else declaration.rpartition("*")[2]
        found += [each.strip() for each in names.split(",") if each.strip()]
    return tuple(each for name in found for each in _elements(name))


def _elements(name: str) -> list[str]:
    array = re.fullmatch(r"(\w+)\[(\d+)\]", name)
    return [f"{array[1]}{i}" for i in range(int(array[2]))] if array else [name]
