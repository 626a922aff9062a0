"""What is to be labelled: audio files, manifests of them, token files; listed lightly, read a window at a time."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spear_fast.labelling.errors import LabellingError, reason_of
from spear_fast.labelling.items import Item, Source, identify
from spear_fast.labelling.token_files import TokenLines, TokenParquet

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
FORMATS = (
    f"audio ({', '.join(AUDIO_SUFFIXES)}), a folder of audio, a manifest (.jsonl, .csv) or tokens (.parquet, .jsonl)"
)


class AudioFiles:
    """Audio files; the id of each is its path below the folder that was given, without suffix."""

    kind = "audio"

    def __init__(self, name: str, root: Path, relative: list[str]) -> None:
        self.name = name
        self._root = root
        self._relative = relative

    def __len__(self) -> int:
        return len(self._relative)

    def ids(self) -> Iterator[str]:
        return map(_id_of, self._relative)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        for relative in self._relative[start:stop]:
            path = self._root / relative
            yield Item(id=_id_of(relative), origin=_readable(str(path)), audio=path)


class Manifest:
    """Rows of `id` and `audio`; a relative path starts from the manifest's folder."""

    kind = "manifest"

    def __init__(self, path: Path, rows: list[dict[str, Any]]) -> None:
        self.name = path.name
        self._path = path
        self._rows = [self._parse(row, number) for number, row in enumerate(rows, 1)]

    def _parse(self, row: dict[str, Any], number: int) -> tuple[str, str | None, str | None]:
        where = f"{self.name}:{number}"
        if "problem" in row:
            return where, None, row["problem"]
        identifier, problem = identify(row.get("id"), where)
        audio = row.get("audio")
        if problem is None and (not isinstance(audio, str) or not audio):
            problem = "the row has no path under 'audio'."
        return identifier, None if problem else audio, problem

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self) -> Iterator[str]:
        return (identifier for identifier, _, _ in self._rows)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        for identifier, audio, problem in self._rows[start:stop]:
            if audio is None:
                yield Item(id=identifier, origin=str(self._path), problem=problem)
                continue
            path = self._path.parent / audio
            yield Item(id=identifier, origin=str(path), audio=path)


class Listing:
    """All rows of all sources in order, with unique ids. Raises LabellingError naming ids that stand twice."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self.sources]).tolist()
        self.digests: list[str] = []
        hashes = np.concatenate([np.zeros(0, np.int64), *map(self._hash_ids, self.sources)])
        hashes.sort()
        twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if twice:
            self._refuse_duplicates(twice)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _hash_ids(self, source: Source) -> np.ndarray:
        digest = hashlib.sha256()
        hashes = np.zeros(len(source), np.int64)
        for index, identifier in enumerate(source.ids()):
            digest.update(identifier.encode() + b"\n")
            hashes[index] = hash(identifier)
        self.digests.append(digest.hexdigest())
        return hashes

    def _refuse_duplicates(self, twice: set[int]) -> None:
        places: dict[str, list[str]] = defaultdict(list)
        for source in self.sources:
            for number, identifier in enumerate(source.ids(), 1):
                if hash(identifier) in twice:
                    places[identifier].append(f"row {number} of {source.name}")
        duplicates = [(identifier, where) for identifier, where in places.items() if len(where) > 1]
        if not duplicates:
            return
        first = ", ".join(f"{identifier!r} ({' and '.join(where[:2])})" for identifier, where in duplicates[:5])
        more = f" and {len(duplicates) - 5} more" if len(duplicates) > 5 else ""
        raise LabellingError(
            f"every utterance needs an id of its own, got the same one twice: {first}{more}; rename the files, or give "
            "a manifest with unique ids."
        )

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
        return [
            {"name": source.name, "kind": source.kind, "rows": len(source), "ids": digest}
            for source, digest in zip(self.sources, self.digests, strict=True)
        ]


def open_sources(paths: Sequence[str | Path]) -> Listing:
    """Returns the listing of all `paths`. Raises LabellingError when one is missing, empty or of an unknown kind."""
    listing = Listing([open_source(Path(path)) for path in paths])
    if not len(listing):
        raise LabellingError(f"there is nothing to label in {', '.join(map(str, paths))}; wanted {FORMATS}.")
    return listing


def open_source(path: Path) -> Source:
    """Returns the rows of one path, by what it is and how it is named. Raises LabellingError."""
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise LabellingError(f"the source {path} does not exist; wanted {FORMATS}.")
        if suffix in AUDIO_SUFFIXES:
            return AudioFiles(path.name, path.parent, [path.name])
        if suffix == ".parquet":
            return TokenParquet(path)
        if suffix == ".csv":
            return Manifest(path, _csv_rows(path))
        if suffix == ".jsonl":
            return _open_lines(path)
    except OSError as error:
        raise LabellingError(f"cannot read the source {path}: {reason_of(error)}.") from error
    raise LabellingError(f"the source {path} is of a kind that is not known; wanted {FORMATS}.")


def _open_folder(folder: Path) -> AudioFiles:
    relative = sorted(_walk(folder, "", set()))
    if not relative:
        raise LabellingError(f"the folder {folder} holds no audio; wanted {', '.join(AUDIO_SUFFIXES)} at any depth.")
    return AudioFiles(folder.resolve().name, folder, relative)


def _walk(folder: Path, prefix: str, seen: set[str]) -> Iterator[str]:
    # links to folders are followed, each folder once
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", seen)
            elif entry.name.lower().endswith(AUDIO_SUFFIXES):
                yield prefix + entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # a link to itself, say: as a row it fails with its reason
        return False


def _id_of(relative: str) -> str:
    return _readable(os.path.splitext(relative)[0])


def _readable(path: str) -> str:
    """Returns `path` as text that every file format takes: bytes that are no UTF-8 become backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            missing = [column for column in ("id", "audio") if column not in header]
            if missing:
                raise LabellingError(
                    f"the manifest {path} must have the columns id and audio, got {', '.join(header) or 'none'}; add a "
                    "first line 'id,audio'."
                )
            return [{"id": row["id"], "audio": row["audio"]} for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise LabellingError(f"the manifest {path} is not CSV in UTF-8: {reason_of(error)}.") from error


def _open_lines(path: Path) -> Source:
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
        keys = _keys(first)
        if "tokens" in keys:
            return TokenLines(path)
        if "audio" in keys:
            file.seek(0)
            return Manifest(path, [_json_row(line) for line in file if line.strip()])
    raise LabellingError(
        f"the first line of {path} must be an object with id and audio, or id and tokens, got "
        f"{', '.join(keys) or first[:40].decode('utf-8', 'replace').strip() or 'nothing'}."
    )


def _keys(line: bytes) -> list[str]:
    row = _json_row(line)
    return [] if "problem" in row else list(row)


def _json_row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {"problem": "the line is not JSON."}
    return row if isinstance(row, dict) else {"problem": "the line is not a JSON object."}
