"""Files that are there whole or not at all, never written through a link, and a lock on a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from spear_fast.labelling.errors import LabellingError, readable, reason_of

LOCK_NAME = ".lock"
# how file systems say that they have no locks
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def open_regular(path: Path, flags: int) -> int:
    """Returns a descriptor of a regular file; `flags` as of `os.open`.

    A link is not followed and a pipe not waited for: OSError says so. What is truncated is thus always our own file.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "it is a link; remove it", str(path)) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file; remove it", str(path))


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds. Raises OSError, or ValueError when it is no JSON or nested too deeply."""
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        return parse_json(file.read())


def parse_json(text: bytes) -> Any:
    """Returns what JSON text holds. Raises ValueError, also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def temporary_path(path: Path) -> Path:
    """Returns where `path` is written before it is renamed: hidden, in the same folder, no match of `*.parquet`.

    Each call gives a name of its own: two workers may write the same file.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


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
        with open(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
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
        os.close(open_regular(probe, os.O_WRONLY | os.O_CREAT))
        # another process may try at the same moment
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise LabellingError(
            f"cannot write to the output folder {folder}: {error.strerror or reason_of(error)}; choose a "
            "writable folder with --out."
        ) from error


class FolderLock:
    """One process at a time in a folder. The system drops the lock with its process: a stale file locks nobody out.

    needed: False does without, for file systems that have no locks; the caller sees to it that nobody else writes.
    shared: lets others in that share it too, workers of one plan, and nobody else.
    """

    def __init__(self, folder: Path, *, needed: bool = True, shared: bool = False) -> None:
        self.path = folder / LOCK_NAME
        self._shared = shared
        self._needed = needed
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        if not self._needed:
            return self
        try:
            descriptor = open_regular(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._file = open(descriptor, "a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            raise self._refusal(self._file, error) from error
        if self._shared:
            return self
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()
        return self

    def _refusal(self, file: IO[str], error: OSError) -> LabellingError:
        if isinstance(error, BlockingIOError):
            file.seek(0)
            holder = readable(file.read(200)).strip() or "another process"
            message = f"{self.path.parent} is in use by {holder}; wait for it, or give another folder with --out."
        elif error.errno in NO_LOCKS:
            message = (
                f"the file system of {self.path.parent} has no locks ({error.strerror}); make sure that no other job "
                "writes there and add --no-lock, or give a folder on another disk with --out."
            )
        else:
            message = str(write_error(self.path, error))
        file.close()
        return LabellingError(message)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
