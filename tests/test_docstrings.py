"""The docstrings of the modules and of training: everything public has one, and cites the reference's right lines."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from reference import load_reference

MODULES = (
    "checkpoints.accelerate", "checkpoints.model_config", "checkpoints.hub", "checkpoints.load",
    "checkpoints.names", "checkpoints.weights", "evaluation", "filters", "freezing", "generation", "ids", "inputs",
    "losses.gather", "losses.similarity", "losses.tokens", "model", "training.accelerated", "training.base",
    "training.batches", "training.checkpoints", "training.data", "training.generator", "training.optimizer",
    "training.randomness", "training.resumable", "training.trainer", "training.trainer_arguments", "transformer",
    "wrappers",
)  # fmt: skip
# what torch's and python's protocols name; their meaning is documented there
PROTOCOL = {"forward", "__init__"}
CITED = re.compile(r"reference (?:line (?P<line>\d+)|(?P<file>\w+)\.py:(?P<place>\d+))")


def public(module: str) -> Iterator[tuple[str, Any]]:
    """Classes and functions that a module defines, and the methods of those classes, with their names."""
    home = importlib.import_module(f"spear_fast.{module}")
    for name, value in vars(home).items():
        if name.startswith("_") or getattr(value, "__module__", None) != home.__name__:
            continue
        if not inspect.isclass(value) and not isinstance(value, FunctionType):
            continue
        yield name, value
        if not inspect.isclass(value):
            continue
        for inner, member in vars(value).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if isinstance(function, FunctionType) and not inner.startswith("_"):
                yield f"{name}.{inner}", function


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_says_what_it_is(module: str) -> None:
    assert (importlib.import_module(f"spear_fast.{module}").__doc__ or "").strip()
    # said once, by the class that they are of
    overridden = {"batches", "loss_of", "optimized_parameters"}
    silent = [
        name
        for name, value in public(module)
        if not (value.__doc__ or "").strip() and name.split(".")[-1] not in PROTOCOL | overridden
    ]
    assert not silent


def test_cited_lines_of_the_reference_define_what_cites_them() -> None:
    folder = Path(sys.modules[load_reference().__name__ + ".spear_tts_pytorch"].__file__).parent
    lines = {path.stem: path.read_text().splitlines() for path in folder.glob("*.py")}
    cited = 0
    for module in MODULES:
        for name, value in public(module):
            found = CITED.search(value.__doc__ or "")
            # parts of what has another name there
            if found is None or name in ("alignment_loss", "all_gather"):
                continue
            cited += 1
            line = lines[found["file"] or "spear_tts_pytorch"][int(found["line"] or found["place"]) - 1]
            assert re.search(rf"(class|def) {name.split('.')[-1]}\b", line), f"{name} cites {line!r}"
    assert cited > 20
