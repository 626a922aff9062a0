"""What `spear-fast generate` writes: lines of text or ids, JSON lines, or one array."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

FORMATS = ("txt", "jsonl", "npy")
# fills rows of an array after their last id
FILLING = -1


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """tokens: without pads and end of sequence. text: None unless the model writes text. mean_logprob: nats a token."""

    tokens: list[int]
    text: str | None
    score: float
    mean_logprob: float
    finished: bool


class Unheard(Exception):  # noqa: N818 (a reader that leaves is no error)
    """Standard output can no longer be written to: nothing that is still to come would be seen."""


class Writer(Protocol):
    """Takes the hypotheses of one input after the other, best first; none for an input that failed."""

    def __call__(self, identifier: str, hypotheses: Sequence[Hypothesis]) -> None: ...


class StreamedLines:
    """Writes results as lines, one after the other, each while it is decoded.

    put: writes text.
    """

    def __init__(self, put: Callable[[str], None]) -> None:
        self._put, self._shown = put, ""

    def grow(self, tokens: list[int], text: str | None) -> None:
        """Writes what is new of the next result: its tokens so far, or their text."""
        # letters of several tokens are no letters yet, and spaces may still be closed up
        line = line_of(tokens, text).rstrip("\ufffd ")
        if line.startswith(self._shown) and line != self._shown:
            self._put(line[len(self._shown) :])
            self._shown = line

    def __call__(self, identifier: str, hypotheses: Sequence[Hypothesis]) -> None:
        """Ends the line of the next result. Where its text does not begin as that of its first tokens, begins anew."""
        line = line_of(hypotheses[0].tokens, hypotheses[0].text) if hypotheses else self._shown
        rest = line[len(self._shown) :] if line.startswith(self._shown) else f"\n{line}"
        self._put(f"{rest}\n")
        self._shown = ""


def format_of(out: Path | None, wanted: str | None) -> str:
    """Returns the format of the output. Raises ValueError where neither name nor option says which."""
    if wanted is None and out is not None:
        wanted = out.suffix.lower().removeprefix(".")
        if wanted not in FORMATS:
            raise ValueError(f"--out must end in .txt, .jsonl or .npy, got {out}; or pass --format.")
    if wanted == "npy" and out is None:
        raise ValueError("--format npy needs a file; name one with --out.")
    return wanted or "txt"


@contextmanager
def opened(out: Path | None, kind: str, n_best: int, *, stream: bool = False) -> Iterator[Writer]:
    """Gives what writes a format to a file, by default to standard output; `StreamedLines` with `stream`.

    An input that failed leaves its lines or rows empty, so that lines of input and output belong together; `n_best`
    says how many those are.
    """
    if kind == "npy" and out is not None:
        rows: list[list[int]] = []
        yield lambda _, hypotheses: rows.extend([each.tokens for each in hypotheses] or [[]] * n_best)
        _save(out, rows)
        return

    def lines(identifier: str, hypotheses: Sequence[Hypothesis]) -> str:
        if kind == "jsonl":
            found = [_json_line(identifier, rank, each) for rank, each in enumerate(hypotheses, 1)]
        else:
            found = [line_of(each.tokens, each.text) for each in hypotheses] or [""] * n_best
        return "".join(f"{line}\n" for line in found)

    def writer(put: Callable[[str], None]) -> Writer:
        return StreamedLines(put) if stream else lambda *result: put(lines(*result))

    def say(text: str) -> None:
        # a closed standard output is None, and print says nothing then
        print(text, end="", file=sys.stdout, flush=True)
        if getattr(sys.stdout, "failed", None) is not None:
            raise Unheard

    if out is None:
        yield writer(say)
        return
    try:
        with out.open("w", encoding="utf-8") as file:
            yield writer(lambda text: print(text, end="", file=file, flush=True))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(out)) from error


def line_of(tokens: list[int], text: str | None) -> str:
    """Returns the line of a result: its ids, or its text."""
    return " ".join(map(str, tokens)) if text is None else " ".join(text.splitlines())


def _json_line(identifier: str, rank: int, hypothesis: Hypothesis) -> str:
    row = {"id": identifier, "rank": rank, **asdict(hypothesis)}
    if hypothesis.text is None:
        del row["text"]
    return json.dumps(row)


def _save(out: Path, rows: Sequence[list[int]]) -> None:
    import numpy as np

    array = np.full((len(rows), max(map(len, rows), default=0)), FILLING, dtype=np.int64)
    for line, row in zip(array, rows, strict=True):
        line[: len(row)] = row
    with out.open("wb") as file:
        np.save(file, array)
