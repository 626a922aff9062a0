"""One row of a source, and what a source is. A row that cannot be read is a row with a problem, whatever is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spear_fast.labelling.errors import LabellingError, reason_of
from spear_fast.labelling.files import parse_json


@dataclass(frozen=True, slots=True)
class Item:
    """A row to label: exactly one of `audio`, `tokens` and `problem` is set.

    origin: the file it comes from, as failed.jsonl names it. tokens: `[n]`, int64. offset, duration: seconds, of the
    segment of `audio`; None is all of it.
    """

    id: str
    origin: str
    audio: Path | None = None
    tokens: np.ndarray | None = None
    problem: str | None = None
    offset: float = 0.0
    duration: float | None = None


class Source(Protocol):
    """Rows in a fixed order that can be listed and read again.

    origin: the file or folder, as failed.jsonl names it. passed_over: files that are none of them, by suffix.
    """

    name: str
    origin: str
    kind: str
    passed_over: dict[str, int]

    def __len__(self) -> int: ...

    def ids(self) -> Iterator[str]: ...

    def items(self, start: int, stop: int) -> Iterator[Item]: ...


def identify(value: Any) -> str:
    """Returns a row's id as text. Raises LabellingError when it is none that every file format takes."""
    if value is None or isinstance(value, (bool, list, dict)):
        raise LabellingError("the row has no id.")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise LabellingError("the id is not text in UTF-8.") from error
    text = str(value)
    if not text:
        raise LabellingError("the row has no id.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LabellingError("the id is not valid Unicode.") from error
    return text


def read_item(where: str, origin: str, identifier: Callable[[], Any], read: Callable[[str], Item]) -> Item:
    """Returns what `read` makes of the row with the given id, or the row with its problem.

    where: stands for the id of a row that has none.
    """
    name = where
    try:
        name = identify(identifier())
        return read(name)
    except Exception as error:  # whatever is wrong with a row concerns that row alone
        return Item(id=name, origin=origin, problem=reason_of(error))


def parse_object(line: bytes) -> dict[str, Any]:
    """Returns the JSON object of a line. Raises LabellingError."""
    try:
        row = parse_json(line)
    except ValueError as error:
        deep = "nested too deeply" in str(error)
        raise LabellingError("the line is nested too deeply." if deep else "the line is not JSON.") from error
    if not isinstance(row, dict):
        raise LabellingError("the line is not a JSON object.")
    return row


def content_of_tokens(tokens: np.ndarray) -> bytes:
    """Returns 8 bytes that stand for token ids `[n]`."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, dtype="<i8").tobytes(), digest_size=8).digest()


def content_of_audio(path: Path, offset: float, duration: float | None) -> bytes:
    """Returns 8 bytes that stand for a segment of a file as it is now: its size and time. Raises OSError."""
    state = path.stat()
    # whole seconds: what copies and archives keep
    text = f"{state.st_size} {int(state.st_mtime)} {offset!r} {duration!r}"
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def content_of(item: Item) -> bytes | None:
    """Returns what stands for a row's content, None where it cannot be read."""
    try:
        if item.tokens is not None:
            return content_of_tokens(item.tokens)
        return None if item.audio is None else content_of_audio(item.audio, item.offset, item.duration)
    except OSError:
        return None
