"""Audio to label: files, folders of them, and manifests that name files or segments of files."""

from __future__ import annotations

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spear_fast.labelling.errors import LabellingError, readable, reason_of
from spear_fast.labelling.items import Item, parse_object, read_item
from spear_fast.speech.audio import AUDIO_SUFFIXES

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
# what other programs call a path, and what they cut or choose by: rows that have it mean something else without
PATHS = ("audio", "audio_filepath")
NOT_OBEYED = ("start", "end", "start_time", "end_time", "begin", "channel", "channel_selector")


class AudioFiles:
    """Audio files; the id of each is its path below the folder that was given, without suffix."""

    kind = "audio"

    def __init__(self, name: str, root: Path, relative: list[str], passed_over: dict[str, int] | None = None) -> None:
        self.name = readable(name)
        self.origin = readable(str(root))
        self.passed_over = passed_over or {}
        self._root = root
        self._relative = relative

    def __len__(self) -> int:
        return len(self._relative)

    def ids(self) -> Iterator[str]:
        return map(_id_of, self._relative)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        for relative in self._relative[start:stop]:
            path = self._root / relative
            yield Item(id=_id_of(relative), origin=readable(str(path)), audio=path)


class Manifest:
    """Rows of `id`, `audio` and, for a segment, `offset` and `duration` in seconds.

    A relative path starts from the manifest's folder. `audio_filepath` is taken for `audio`; a row that has it and no
    id is named after its path, and its offset where there is one.
    """

    kind = "manifest"

    def __init__(self, path: Path, rows: Iterable[bytes | dict[str, Any]]) -> None:
        self.name = readable(path.name)
        self.passed_over: dict[str, int] = {}
        self._folder = path.parent
        self.origin = readable(str(path))
        self._items = [self._parse(row, number) for number, row in enumerate(rows, 1)]

    def _parse(self, line: bytes | dict[str, Any], number: int) -> Item:
        row: dict[str, Any] = {}

        def identifier() -> Any:
            row.update(parse_object(line) if isinstance(line, bytes) else line)
            return _id_by_path(row) if row.get("id") in (None, "") else row["id"]

        def read(name: str) -> Item:
            audio = next((row[key] for key in PATHS if isinstance(row.get(key), str) and row[key]), None)
            if audio is None:
                raise LabellingError("the row has no path under 'audio'.")
            refuse_url(audio)
            for key in NOT_OBEYED:
                if row.get(key) not in (None, ""):
                    raise LabellingError(
                        f"'{key}' is not understood; give a segment by offset and duration, in seconds."
                    )
            offset, duration = _seconds(row, "offset"), _seconds(row, "duration")
            if duration == 0:
                raise LabellingError("'duration' must be above 0, in seconds.")
            path = self._folder / audio
            return Item(id=name, origin=readable(str(path)), audio=path, offset=offset or 0.0, duration=duration)

        return read_item(f"{self.name}:{number}", self.origin, identifier, read)

    def __len__(self) -> int:
        return len(self._items)

    def ids(self) -> Iterator[str]:
        return (item.id for item in self._items)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        return iter(self._items[start:stop])


def refuse_url(path: str) -> None:
    """Raises LabellingError when `path` is the address of something that is no local file."""
    if URL.match(path):
        raise LabellingError(f"{path} is a URL; download the file and give its path.")


def open_folder(folder: Path) -> AudioFiles | list[Path]:
    """Returns the audio at any depth of a folder, or its Parquet files when it has none. Raises LabellingError."""
    audio, tokens, passed_over = [], [], Counter[str]()
    for relative in sorted(_walk(folder, "", set())):
        suffix = os.path.splitext(relative)[1].lower()
        if suffix in AUDIO_SUFFIXES:
            audio.append(relative)
            continue
        if suffix == ".parquet":
            tokens.append(folder / relative)
        passed_over[readable(suffix) or "no suffix"] += 1
    if not audio and not tokens:
        others = f", got {counted(passed_over)}" if passed_over else ""
        raise LabellingError(
            f"the folder {folder} holds no audio and no Parquet files of tokens at any depth; wanted "
            f"{', '.join(AUDIO_SUFFIXES)} or .parquet{others}."
        )
    return AudioFiles(folder.resolve().name, folder, audio, passed_over) if audio else tokens


def counted(passed_over: dict[str, int]) -> str:
    """Returns numbers of files by suffix as a clause, the most first."""
    ordered = sorted(passed_over.items(), key=lambda entry: (-entry[1], entry[0]))
    more = f" and {len(ordered) - 8} more kinds" if len(ordered) > 8 else ""
    return ", ".join(f"{suffix} ({number})" for suffix, number in ordered[:8]) + more


def csv_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a manifest in CSV, with a first line of names. Raises LabellingError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            if "audio_filepath" not in header and not {"id", "audio"} <= set(header):
                raise LabellingError(
                    f"the manifest {path} must have the columns id and audio, got {', '.join(header) or 'none'}; add a "
                    "first line 'id,audio'."
                )
            return list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise LabellingError(f"the manifest {path} is not CSV in UTF-8: {reason_of(error)}.") from error


def _seconds(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value in (None, ""):
        return None
    try:
        seconds = math.nan if isinstance(value, (bool, list, dict)) else float(value)
    except ValueError:
        seconds = math.nan
    if not (0 <= seconds < 1e9):
        raise LabellingError(f"'{name}' must be a number of seconds, 0 or more, got {value!r}.")
    return seconds


def _id_by_path(row: dict[str, Any]) -> str | None:
    path = row.get("audio_filepath")
    if not isinstance(path, str) or not path:
        return None
    offset = row.get("offset")
    return _id_of(path) if offset in (None, "") else f"{_id_of(path)}@{offset}"


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
            else:
                yield prefix + entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # a link to itself, say: as a row it fails with its reason
        return False


def _id_of(relative: str) -> str:
    return readable(os.path.splitext(relative)[0])
