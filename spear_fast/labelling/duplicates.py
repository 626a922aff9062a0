"""Hashes that come twice, among any number of them, in memory that does not grow with it."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from types import TracebackType
from typing import IO

import numpy as np

# hashes that are held in memory before they go to files, and files: each holds some of the values, all of their hashes
HELD = 1 << 18
FILES = 64


class Repeated:
    """Takes hashes as they come; those of a large job lie in temporary files, sorted by value into so many.

    Use it as a context manager: the files are gone at its end.
    """

    def __init__(self) -> None:
        self._held: list[np.ndarray] = []
        self._count = 0
        self._files: list[IO[bytes]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Repeated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, hashes: np.ndarray) -> None:
        """Takes hashes: `[n]`, int64. Raises OSError when there is no room for the files."""
        self._held.append(hashes)
        self._count += len(hashes)
        if self._count >= HELD:
            self._write()

    def found(self) -> set[int]:
        """Returns the hashes that came twice or more."""
        if not self._files:
            return _repeated(self._held)
        self._write()
        found: set[int] = set()
        for file in self._files:
            file.seek(0)
            found |= _repeated([np.frombuffer(file.read(), np.int64)])
        return found

    def _write(self) -> None:
        if not self._files:
            new = (tempfile.TemporaryFile() for _ in range(FILES))  # noqa: SIM115 (closed with the stack)
            self._files = [self._stack.enter_context(file) for file in new]
        hashes = np.concatenate([np.zeros(0, np.int64), *self._held])
        self._held, self._count = [], 0
        which = hashes % FILES
        hashes = hashes[np.argsort(which, kind="stable")]
        ends = np.cumsum(np.bincount(which, minlength=FILES))
        for file, part in zip(self._files, np.split(hashes, ends[:-1]), strict=True):
            file.write(part.tobytes())


def _repeated(arrays: list[np.ndarray]) -> set[int]:
    hashes = np.concatenate([np.zeros(0, np.int64), *arrays])
    hashes.sort()
    return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
