"""What is to be labelled: audio files, manifests of them, token files; listed lightly, read a window at a time."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from spear_fast.labelling.audio_files import AudioFiles, Manifest, csv_rows, open_folder, refuse_url
from spear_fast.labelling.duplicates import Repeated
from spear_fast.labelling.errors import LabellingError, readable, reason_of
from spear_fast.labelling.items import Item, Source, parse_object
from spear_fast.labelling.token_files import TokenLines, TokenParquet
from spear_fast.speech.audio import AUDIO_SUFFIXES

FORMATS = (
    "audio (wav, flac, ogg, mp3, opus and whatever else libsndfile reads), a folder of audio or of token files, a "
    "manifest (.jsonl, .csv) or tokens (.parquet, .jsonl)"
)
# lines among which the first whole one tells what a .jsonl file is
FIRST_LINES = 1000
# ids that are hashed together
HASHED = 1 << 14


class Rows:
    """All rows of all sources, in order."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self.sources]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def passed_over(self) -> dict[str, int]:
        """Files in folders that are no rows, by suffix."""
        total: Counter[str] = Counter()
        for source in self.sources:
            total.update(source.passed_over)
        return dict(total)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Yields rows `start` to `stop - 1`."""
        while start < stop:
            index = bisect_right(self._ends, start)
            base = self._ends[index - 1] if index else 0
            upto = min(stop, self._ends[index])
            yield from self.sources[index].items(start - base, upto - base)
            start = upto

    def identity(self) -> list[dict[str, Any]]:
        """Returns name, kind, size and digest of the ids of each source: what must not change when a job is resumed."""
        raise NotImplementedError


class Listing(Rows):
    """Rows that are listed from their sources, with unique ids. Raises LabellingError naming ids that stand twice."""

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__(sources)
        self.digests: list[str] = []
        with Repeated() as repeated:
            for source in self.sources:
                self._hash_ids(source, repeated)
            twice = repeated.found()
        if twice:
            self._refuse_duplicates(twice)

    def _hash_ids(self, source: Source, repeated: Repeated) -> None:
        digest = hashlib.sha256()
        count = 0
        identifiers = islice(source.ids(), len(source))
        while some := list(islice(identifiers, HASHED)):
            for identifier in some:
                digest.update(identifier.encode() + b"\n")
            repeated.add(np.fromiter(map(hash, some), np.int64, len(some)))
            count += len(some)
        if count < len(source):
            raise LabellingError(
                f"{source.name} is damaged: it says {len(source)} rows and holds {count}; copy it again."
            )
        self.digests.append(digest.hexdigest())

    def _refuse_duplicates(self, twice: set[int]) -> None:
        rows: dict[str, list[str]] = defaultdict(list)
        for source in self.sources:
            for number, identifier in enumerate(source.ids(), 1):
                if hash(identifier) in twice:
                    rows[identifier].append(f"row {number} of {source.name}")
        duplicates = [(identifier, where) for identifier, where in rows.items() if len(where) > 1]
        if not duplicates:
            return
        first = ", ".join(f"{identifier!r} ({' and '.join(where[:2])})" for identifier, where in duplicates[:5])
        more = f" and {len(duplicates) - 5} more" if len(duplicates) > 5 else ""
        raise LabellingError(
            f"every utterance needs an id of its own, got the same one twice: {first}{more}; rename the files, or give "
            "a manifest with unique ids."
        )

    def identity(self) -> list[dict[str, Any]]:
        return [
            {"name": source.name, "kind": source.kind, "rows": len(source), "ids": digest}
            for source, digest in zip(self.sources, self.digests, strict=True)
        ]


def open_sources(paths: Sequence[str | Path]) -> Listing:
    """Returns the listing of all `paths`. Raises LabellingError when one is missing, empty or of an unknown kind."""
    listing = Listing([source for path in paths for source in _open(path)])
    if not len(listing):
        raise LabellingError(f"there is nothing to label in {', '.join(map(str, paths))}; wanted {FORMATS}.")
    return listing


def _open(path: str | Path) -> list[Source]:
    refuse_url(str(path))
    path = Path(path)
    if not path.is_dir():
        return [open_source(path)]
    try:
        found = open_folder(path)
    except OSError as error:
        raise LabellingError(f"cannot read the source {path}: {reason_of(error)}.") from error
    return [found] if isinstance(found, AudioFiles) else [open_source(tokens) for tokens in found]


def open_source(path: Path) -> Source:
    """Returns the rows of one file, by how it is named. Raises LabellingError."""
    suffix = path.suffix.lower()
    try:
        if not path.exists():
            raise LabellingError(f"the source {path} does not exist; wanted {FORMATS}.")
        if not path.is_file():
            raise LabellingError(f"the source {path} is a pipe or a device; write it to a file first.")
        if suffix in AUDIO_SUFFIXES:
            return AudioFiles(path.name, path.parent, [path.name])
        if suffix == ".parquet":
            return TokenParquet(path)
        if suffix == ".csv":
            return Manifest(path, csv_rows(path))
        if suffix == ".jsonl":
            return _open_lines(path)
    except OSError as error:
        raise LabellingError(f"cannot read the source {path}: {reason_of(error)}.") from error
    raise LabellingError(f"the source {readable(str(path))} is of a kind that is not known; wanted {FORMATS}.")


def _open_lines(path: Path) -> Source:
    first = b""
    keys: list[str] = []
    with open(path, "rb") as file:
        for line in islice((line for line in file if line.strip()), FIRST_LINES):
            first = first or line
            keys = keys or _keys(line)
            if "tokens" in keys:
                return TokenLines(path)
            if "audio" in keys or "audio_filepath" in keys:
                file.seek(0)
                return Manifest(path, (line for line in file if line.strip()))
    got = ", ".join(keys) or first[:40].decode("utf-8", "replace").strip() or "nothing"
    raise LabellingError(f"the lines of {path} must be objects with id and audio, or id and tokens, got {got}.")


def _keys(line: bytes) -> list[str]:
    try:
        return list(parse_object(line))
    except LabellingError:
        return []
