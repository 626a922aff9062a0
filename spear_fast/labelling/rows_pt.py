"""The reference's folder of `.pt` rows, `<speech ids> <-1> <text ids>` in one tensor a file: read and written.

Rows that the reference generated end both halves with the end-of-sequence id, which its training then adds once more;
may hold several delimiters, since the delimiter is also the pad of speech; and may go on after the end of the text.
Reading mends all of that. Writing leaves ends of sequence out: whoever trains on the rows adds them.
"""

from __future__ import annotations

import csv
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear_fast.labelling.errors import LabellingError, readable, reason_of
from spear_fast.labelling.files import FolderLock, make_folder, sync_folder, write_error
from spear_fast.labelling.identity import FORMAT, versions
from spear_fast.labelling.items import Item, content_of
from spear_fast.labelling.label_files import LabelRow, label_schema, read_labels
from spear_fast.labelling.shards import Shard, plan_shards
from spear_fast.labelling.store import LabelStore, Totals, changed_error

DELIMITER = -1
INDEX_NAME = "ids.csv"


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """Sizes of the model that the rows belong to. An end-of-sequence id, where there is one, is the number of ids."""

    num_speech_ids: int
    num_text_ids: int
    speech_eos: bool = True
    text_eos: bool = True
    text_pad_id: int = 0
    delimiter_id: int = DELIMITER

    def __post_init__(self) -> None:
        for name in ("num_speech_ids", "num_text_ids"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LabellingError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if self.delimiter_id >= 0:
            raise LabellingError(f"delimiter_id must be negative, so that no token equals it, got {self.delimiter_id}.")

    @classmethod
    def of_model(cls, model: Any) -> RowFormat:
        """Returns the format of the rows that a model generates."""
        return cls(
            num_speech_ids=model.num_semantic_token_ids,
            num_text_ids=model.num_text_token_ids,
            speech_eos=bool(model.autoset_eos_id["speech"]),
            text_eos=bool(model.autoset_eos_id["text"]),
            text_pad_id=model.pad_id["text"],
        )

    def split(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Returns source, target and whether the target had its end. row: `[n]`, int64. Raises LabellingError."""
        delimiters = np.flatnonzero(row == self.delimiter_id)
        if not len(delimiters):
            raise LabellingError(f"the row has no delimiter {self.delimiter_id}; wanted speech ids, it, text ids.")
        # between the first and the last delimiter stand pads of speech: the text has no negative ids
        source, _ = _until(row[: delimiters[0]], self.num_speech_ids if self.speech_eos else None)
        target, ended = _until(row[delimiters[-1] + 1 :], self.num_text_ids if self.text_eos else None)
        target = target[target != self.text_pad_id]
        if not len(source):
            raise LabellingError("the row has no speech ids before the delimiter.")
        _check("speech", source, self.num_speech_ids)
        _check("text", target, self.num_text_ids)
        return source, target, ended

    def join(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Returns the row of a pair, `[n]`, int64."""
        return np.concatenate((source, [self.delimiter_id], target)).astype(np.int64)


def _until(ids: np.ndarray, eos_id: int | None) -> tuple[np.ndarray, bool]:
    ends = np.flatnonzero(ids == eos_id) if eos_id is not None else np.zeros(0, np.int64)
    return (ids[: ends[0]], True) if len(ends) else (ids, False)


def _check(kind: str, ids: np.ndarray, vocabulary: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if len(wrong):
        raise LabellingError(f"{kind} ids must be from 0 to {vocabulary - 1}, got {wrong[0]}; check the model's sizes.")


def import_rows(
    folder: str | Path,
    out: str | Path,
    row_format: RowFormat,
    *,
    rows_per_shard: int = 4096,
    about: dict[str, Any] | None = None,
    relabel_changed: bool = False,
    lock: bool = True,
    progress: Callable[[int], object] = lambda _: None,
) -> Totals:
    """Writes the rows of the reference's folder as a folder of labels, in natural order of their names.

    The id of a row is its file's name; text, score and mean_logprob are null. Unreadable rows go to failed.jsonl.
    relabel_changed: writes shards again whose rows have changed since; otherwise that is an error.
    lock: False does without one, see `FolderLock`.
    Raises LabellingError. Run again after a kill, it resumes.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise LabellingError(f"{folder} is not a folder; wanted the folder of .pt rows that the reference wrote.")
    paths = sorted((path for path in folder.glob("*.pt")), key=lambda path: natural_order(path.stem))
    if not paths:
        raise LabellingError(f"there is no .pt row in {folder}; wanted the folder that the reference wrote.")
    make_folder(out)
    with FolderLock(out, needed=lock):
        shards = plan_shards(len(paths), None, rows_per_shard)
        schema = label_schema(row_format.num_speech_ids, row_format.num_text_ids)
        store = LabelStore(out, _identity(row_format, paths, rows_per_shard), shards, schema)
        store.open({"versions": versions(), **(about or {})})
        changed = store.changed(lambda start, stop: map(_item, paths[start:stop]))
        if changed and not relabel_changed:
            raise changed_error(out, [name for _, name in changed])
        again = {index for index, _ in changed}
        for shard in shards:
            if shard.index not in store.committed or shard.index in again:
                _import_shard(store, shard, paths[shard.start : shard.stop], row_format)
            progress(len(shard))
        store.finish()
        return store.totals()


def _item(path: Path) -> Item:
    return Item(id=readable(path.stem), origin=readable(str(path)), audio=path)


def _identity(row_format: RowFormat, paths: Sequence[Path], rows_per_shard: int) -> dict[str, Any]:
    import hashlib

    names = hashlib.sha256("\n".join(path.name for path in paths).encode("utf-8", "surrogateescape")).hexdigest()
    source = {"kind": "rows", "rows": len(paths), "ids": names}
    return {
        "format": FORMAT,
        "rows": vars(row_format),
        "options": {"rows_per_shard": rows_per_shard},
        "sources": [source],
    }


def _import_shard(store: LabelStore, shard: Shard, paths: Sequence[Path], row_format: RowFormat) -> None:
    rows, failures, contents = [], [], []
    totals = Totals()
    for path in paths:
        item = _item(path)
        try:
            content = content_of(item)
            source, target, ended = row_format.split(read_row(path))
        except Exception as error:  # whatever is wrong with a row concerns that row alone
            failures.append({"id": item.id, "source": item.origin, "reason": reason_of(error)})
            continue
        finished = ended if row_format.text_eos else None
        flags = [name for name, holds in (("truncated", finished is False), ("empty", not len(target))) if holds]
        contents.append(content or b"")
        rows.append(LabelRow(item.id, source, target, None, None, None, finished, flags))
        totals.rows += 1
        totals.source_tokens += len(source)
        totals.target_tokens += len(target)
        totals.unfinished += finished is False
    totals.failed = len(failures)
    store.commit(shard, rows, failures, totals, b"".join(contents))


def read_row(path: Path) -> np.ndarray:
    """Returns the integers of one `.pt` row, `[n]`, int64. Raises LabellingError, also when the file could run code."""
    if not path.is_file():
        raise LabellingError("it is no regular file.")
    try:
        row = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LabellingError("the file holds more than a tensor and could run code, or is damaged.") from error
    except Exception as error:
        raise LabellingError("the file is truncated or of another format.") from error
    if not isinstance(row, torch.Tensor) or row.ndim != 1 or row.is_floating_point() or row.dtype == torch.bool:
        got = f"{row.dtype} {list(row.shape)}" if isinstance(row, torch.Tensor) else type(row).__name__
        raise LabellingError(f"the file must hold one row of integers, got {got}.")
    if row.layout != torch.strided or row.device.type != "cpu":
        raise LabellingError(f"the file must hold a plain tensor, got one of {row.layout} on {row.device}.")
    if row.untyped_storage().nbytes() < row.numel() * row.element_size():
        raise LabellingError(f"the file says that it holds {row.numel()} numbers, and holds fewer; save it anew.")
    return row.long().numpy()


def natural_order(name: str) -> tuple[tuple[int, int | str], ...]:
    """Returns a key that puts 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts if part)


def export_rows(folder: str | Path, out: str | Path, *, progress: Callable[[int], object] = lambda _: None) -> int:
    """Writes a folder of labels as `0.pt`, `1.pt`, … for the reference's `GeneratedAudioTextDataset`; returns how many.

    `ids.csv` beside them gives the id of each. The folder appears once it is complete. Raises LabellingError.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LabellingError(f"{out} exists already; give a new folder with --out.")
    rows = read_labels(folder)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # of a name that is nobody's, in the same file system
        with tempfile.TemporaryDirectory(prefix=".export-pt-", dir=out.parent) as partial:
            folder_of_rows = Path(partial) / "rows"
            folder_of_rows.mkdir()
            count = _export(rows, folder_of_rows, progress)
            os.replace(folder_of_rows, out)
        sync_folder(out.parent)
    except OSError as error:
        raise write_error(out, error) from error
    except RuntimeError as error:
        # torch.save tells of a full disk in its own way
        raise LabellingError(f"cannot write {out}: {reason_of(error)}; free the disk and run it again.") from error
    return count


def _export(rows: Iterator[LabelRow], folder: Path, progress: Callable[[int], object]) -> int:
    row_format = RowFormat(num_speech_ids=1, num_text_ids=1)
    count = 0
    with open(folder / INDEX_NAME, "w", encoding="utf-8", newline="") as index:
        writer = csv.writer(index)
        writer.writerow(["file", "id"])
        for row in rows:
            torch.save(torch.from_numpy(row_format.join(row.source, row.target)), folder / f"{count}.pt")
            writer.writerow([f"{count}.pt", row.id])
            count += 1
            progress(1)
    return count
