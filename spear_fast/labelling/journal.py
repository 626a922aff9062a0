"""The batches of an unfinished shard, appended as they are decoded, so that a kill costs one batch and not a shard."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spear_fast.labelling.files import write_error
from spear_fast.labelling.labeller import Label
from spear_fast.labelling.plan import Shard
from spear_fast.labelling.prepare import Utterance


def journal_path(out: Path, shard: Shard) -> Path:
    return out / f".{shard.name}.journal"


class Journal:
    """Labels of whole batches, each found again by the ids and tokens of its utterances under one fingerprint.

    A line that a kill or a full disk cut short is dropped with everything behind it: those batches are decoded again.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self._fingerprint = fingerprint
        self._batches: dict[str, list[Label]] = {}
        self._descriptor = -1

    def __enter__(self) -> Journal:
        try:
            end = self._read(self.path.read_bytes() if self.path.exists() else b"")
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._descriptor, end)
            os.lseek(self._descriptor, end, os.SEEK_SET)
        except OSError as error:
            raise write_error(self.path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _read(self, content: bytes) -> int:
        """Returns where the last whole line ends."""
        end = 0
        for line in content.splitlines(keepends=True):
            try:
                record = json.loads(line)
                labels = [_label(entry) for entry in record["labels"]]
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            self._batches[record["batch"]] = labels
            end += len(line)
        return end

    def key(self, batch: Sequence[Utterance]) -> str:
        """Returns the name of a batch: nothing but its content and the job's fingerprint decides it."""
        digest = hashlib.sha256(self._fingerprint.encode())
        for utterance in batch:
            digest.update(f"{len(utterance.id)}:{utterance.id}:{len(utterance.tokens)}:".encode())
            digest.update(np.ascontiguousarray(utterance.tokens, dtype="<i8").tobytes())
        return digest.hexdigest()

    def find(self, key: str) -> list[Label] | None:
        """Returns the labels of a batch that was decoded before, or None."""
        return self._batches.get(key)

    def append(self, key: str, labels: Sequence[Label]) -> None:
        """Writes a batch and syncs it. Raises LabellingError when that fails."""
        line = json.dumps({"batch": key, "labels": [_record(label) for label in labels]}, separators=(",", ":"))
        rest = memoryview(line.encode() + b"\n")
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(self.path, error) from error

    def remove(self) -> None:
        """Drops the journal of a shard that has been committed."""
        self.path.unlink(missing_ok=True)


def _record(label: Label) -> list[Any]:
    # JSON keeps every bit of a float: the shortest text that reads back the same
    target = label.target.tolist()
    return [target, label.text, label.score, label.mean_logprob, label.finished, label.generated, label.flags]


def _label(entry: list[Any]) -> Label:
    target, text, score, mean_logprob, finished, generated, flags = entry
    return Label(np.array(target, dtype=np.int64), text, score, mean_logprob, finished, generated, tuple(flags))
