"""Files that are there whole or not at all, and a lock on a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from spear_fast.labelling.errors import LabellingError, reason_of

LOCK_NAME = ".lock"


def temporary_path(path: Path) -> Path:
    """Returns where `path` is written before it is renamed: hidden, in the same folder, no match of `*.parquet`."""
    return path.with_name(f".{path.name}.tmp")


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls `write` with a temporary file, syncs it, and renames it to `path`.

    Raises LabellingError when the disk is full or not writable; `path` is then as it was before.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> LabellingError:
    """Returns the sentence for a failed write; what was finished before stays."""
    return LabellingError(
        f"cannot write {path}: {error.strerror or reason_of(error)}; free or mend the disk and run the same command "
        "again, finished work is kept."
    )


def make_folder(folder: Path) -> None:
    """Creates `folder` and proves that files can be made in it. Raises LabellingError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise LabellingError(
            f"cannot write to the output folder {folder}: {error.strerror or reason_of(error)}; choose a "
            "writable folder with --out."
        ) from error


class FolderLock:
    """One process at a time in a folder. The system drops the lock with its process: a stale file locks nobody out."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        try:
            self._file = open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise LabellingError(
                f"{self.path.parent} is in use by {holder}; wait for it, or give another folder with --out."
            ) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
