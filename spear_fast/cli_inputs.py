"""What `spear-fast generate` reads: arguments, standard input and files, one input after the other."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

FORMATS = ("txt", "jsonl", "npy", "parquet")
# rows decoded from a Parquet file at once
READ_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Input:
    """One input: exactly one of `text`, `tokens` and `problem` is set.

    text: a sentence, or ids that are written out ("12 5 7"): which of them, the direction decides.
    """

    id: str
    text: str | None = None
    tokens: list[int] | None = None
    problem: str | None = None


def as_ids(text: str) -> list[int] | None:
    """Returns the ids of a text like "12 5 7", "12,5,7" or "[12, 5, 7]"; None where it is anything else."""
    words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        return None
    return [int(word) for word in words]


def from_arguments(values: Iterable[str]) -> Iterator[Input]:
    """Yields an input for each argument."""
    for number, value in enumerate(values, 1):
        yield Input(str(number), text=value) if value.strip() else Input(str(number), problem="the input is empty.")


def from_standard_input(kind: str | None) -> Iterator[Input]:
    """Yields the lines of standard input as they come. kind: "txt" (by default) or "jsonl"."""
    if sys.stdin is None:
        raise ValueError("standard input is closed; give the input as an argument or with --file.")
    if kind not in (None, "txt", "jsonl"):
        raise ValueError(f"standard input must be txt or jsonl, got {kind}; give a file with --file.")
    if sys.stdin.isatty():
        print("spear-fast: reading one input a line; Ctrl-D ends", file=sys.stderr)
    # a reader of our own: the interpreter waits at its end for whoever holds its own one
    with open(sys.stdin.fileno(), "rb", closefd=False) as file:
        yield from _lines(file, jsonl=kind == "jsonl")


def from_file(path: Path, kind: str | None) -> Iterator[Input]:
    """Yields the inputs in a file. kind: one of `FORMATS`, by default what the file's name ends in.

    Raises FileNotFoundError, or ValueError where the file as a whole cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"--file {path} does not exist; check the path.")
    kind = kind or path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ValueError(f"--file must end in .txt, .jsonl, .npy or .parquet, got {path}; or pass --input-format.")
    if kind == "npy":
        yield from _array(path)
    elif kind == "parquet":
        yield from _parquet(path)
    else:
        with path.open("rb") as file:
            yield from _lines(file, jsonl=kind == "jsonl")


def _lines(file: IO[bytes], *, jsonl: bool) -> Iterator[Input]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            yield Input(str(number), problem="the line is not UTF-8.")
            continue
        yield _row(text, str(number)) if jsonl else Input(str(number), text=text)


def _row(line: str, number: str) -> Input:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return Input(number, problem="the line is not JSON.")
    if not isinstance(row, dict):
        return Input(number, problem="the line must be a JSON object with text or tokens.")
    return _fields(row.get("id"), row.get("text"), row.get("tokens"), number)


def _fields(identifier: Any, text: Any, tokens: Any, number: str) -> Input:
    name = number if identifier is None else str(identifier)
    if not _is_unicode(name):
        return Input(number, problem="the id is not valid Unicode.")
    if (text is None) == (tokens is None):
        return Input(name, problem="the row must have either text or tokens.")
    if text is not None:
        if not isinstance(text, str) or not text.strip() or not _is_unicode(text):
            return Input(name, problem="text must be a string that is not empty, in valid Unicode.")
        return Input(name, text=text)
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        return Input(name, problem="tokens must be a list of at least one whole number.")
    return Input(name, tokens=tokens)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _array(path: Path) -> Iterator[Input]:
    """Yields the rows of an array of ids `[n]` or `[rows, n]`; negative ids at the end of a row are padding."""
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"--file {path} is not a readable .npy file: {' '.join(str(error).split())}.") from error
    if not isinstance(array, np.ndarray) or array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"--file {path} must hold integer ids [n] or [rows, n], got {got}.")
    for number, row in enumerate(np.atleast_2d(array).tolist(), 1):
        while row and row[-1] < 0:
            row.pop()
        yield Input(str(number), tokens=row) if row else Input(str(number), problem="the row holds no id.")


def _parquet(path: Path) -> Iterator[Input]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns = [name for name in ("id", "text", "tokens") if name in file.schema_arrow.names]
        if not {"text", "tokens"} & set(columns):
            raise ValueError(f"--file {path} must have a column text or tokens, got {file.schema_arrow.names}.")
        number = 0
        for batch in file.iter_batches(READ_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield _fields(row.get("id"), row.get("text"), row.get("tokens"), str(number))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, ValueError) and not isinstance(error, pa.ArrowException):
            raise
        raise ValueError(f"--file {path} is not a readable Parquet file: {' '.join(str(error).split())}.") from error


class Reader:
    """Reads inputs in a thread of its own, so that a slow pipe stops no decoding. ended: there are no more."""

    def __init__(self, inputs: Iterator[Input], ahead: int) -> None:
        self._queue: queue.Queue[Input | Exception | None] = queue.Queue(ahead)
        self.ended = False
        threading.Thread(target=self._read, args=(inputs,), name="spear-fast inputs", daemon=True).start()

    def _read(self, inputs: Iterator[Input]) -> None:
        try:
            for entry in inputs:
                self._queue.put(entry)
        except Exception as error:
            self._queue.put(error)
        self._queue.put(None)

    def next(self, *, wait: bool) -> Input | None:
        """Returns the next input; None where none is there yet, or `ended` is set. Raises what reading failed of."""
        try:
            entry = self._queue.get(block=wait)
        except queue.Empty:
            return None
        if isinstance(entry, Exception):
            raise entry
        self.ended = entry is None
        return entry
