"""One row of a source, and what a source is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Item:
    """A row to label: exactly one of `audio`, `tokens` and `problem` is set.

    origin: the file it comes from, as failed.jsonl names it. tokens: `[n]`, int64.
    """

    id: str
    origin: str
    audio: Path | None = None
    tokens: np.ndarray | None = None
    problem: str | None = None


def identify(value: Any, fallback: str) -> tuple[str, str | None]:
    """Returns a row's id and None, or `fallback` and the problem when `value` is no id that every file format takes."""
    if value is None or isinstance(value, (bool, list, dict)) or not str(value):
        return fallback, "the row has no id."
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError:
        return fallback, "the id is not valid Unicode."
    return str(value), None


class Source(Protocol):
    """Rows in a fixed order that can be listed and read again."""

    name: str
    kind: str

    def __len__(self) -> int: ...

    def ids(self) -> Iterator[str]: ...

    def items(self, start: int, stop: int) -> Iterator[Item]: ...
