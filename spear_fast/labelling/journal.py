"""The labels of an unfinished shard, appended as they are made: a kill costs a few utterances and not a shard."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spear_fast.labelling.files import open_regular, parse_json, write_error
from spear_fast.labelling.labeller import Label
from spear_fast.labelling.prepare import Utterance
from spear_fast.labelling.shards import Shard


def journal_path(out: Path, shard: Shard) -> Path:
    return out / f".{shard.name}.journal"


class Journal:
    """Labels of utterances, each found again by its id and tokens under one fingerprint.

    A line holds some of them. One that a kill or a full disk cut short is dropped with everything after it: those
    utterances are decoded again.
    """

    def __init__(self, path: Path, fingerprint: str, *, shared: bool = False) -> None:
        """shared: other workers may be at the same shard; whoever comes second writes a journal of its own."""
        self.path = path
        self._shared = shared
        self._fingerprint = fingerprint
        self._labels: dict[str, Label] = {}
        self._descriptor = -1

    def open(self) -> None:
        """Reads what an earlier run wrote, and appends to it. Raises LabellingError when that fails."""
        try:
            self._descriptor = open_regular(self.path, os.O_RDWR | os.O_CREAT)
            if self._shared and not self._is_ours():
                self.close()
                self.path = self.path.with_name(f"{self.path.name}.{secrets.token_hex(6)}")
                self._descriptor = open_regular(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            with open(self._descriptor, "rb", closefd=False) as file:
                end = self._read(file.read())
            os.ftruncate(self._descriptor, end)
            os.lseek(self._descriptor, end, os.SEEK_SET)
        except OSError as error:
            raise write_error(self.path, error) from error

    def _is_ours(self) -> bool:
        """Returns whether nobody else writes this journal; where a file system has no locks, nobody knows."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _read(self, content: bytes) -> int:
        """Returns where the last whole line ends."""
        end = 0
        for line in content.splitlines(keepends=True):
            try:
                labels = {key: _label(entry) for key, entry in parse_json(line)["labels"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            if not line.endswith(b"\n"):
                break
            self._labels.update(labels)
            end += len(line)
        return end

    def _key(self, utterance: Utterance) -> str:
        """Returns the name of an utterance: nothing but its content and the job's fingerprint decides it."""
        digest = hashlib.sha256(self._fingerprint.encode())
        digest.update(f"{len(utterance.id)}:{utterance.id}:{len(utterance.tokens)}:".encode())
        digest.update(np.ascontiguousarray(utterance.tokens, dtype="<i8").tobytes())
        return digest.hexdigest()

    def find(self, utterance: Utterance) -> Label | None:
        """Returns the label of an utterance that was decoded before, or None."""
        return self._labels.get(self._key(utterance)) if self._labels else None

    def append(self, labelled: Sequence[tuple[Utterance, Label]]) -> None:
        """Writes the labels of some utterances and syncs them. Raises LabellingError when that fails."""
        record = {"labels": {self._key(utterance): _record(label) for utterance, label in labelled}}
        line = json.dumps(record, separators=(",", ":"))
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
