"""Standard streams that may be closed, full or left by their reader: to whom nobody listens, nothing is said."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any


class QuietStream:
    """A text stream that falls silent once it cannot be written to. failed: what it failed of."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.failed: Exception | None = None

    def write(self, text: str) -> int:
        """Writes text; characters that the stream's encoding does not have become backslash escapes."""
        if self.failed is None:
            try:
                return self._stream.write(text)
            except UnicodeEncodeError as error:
                return self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            except (OSError, ValueError) as error:
                self.failed = error
        return len(text)

    def flush(self) -> None:
        """Flushes what has been written."""
        if self.failed is not None:
            return
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.failed = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet_streams() -> Iterator[tuple[QuietStream, QuietStream]]:
    """Makes standard output and standard error quiet streams within the block; yields the two."""
    _occupy()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        streams = QuietStream(before[0] or nowhere), QuietStream(before[1] or nowhere)
        sys.stdout, sys.stderr = streams  # type: ignore[assignment]
        try:
            yield streams
        finally:
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = before
            for stream in streams:
                if stream.failed is not None:
                    _discard(stream)


def _occupy() -> None:
    """Opens descriptors 0 to 2 where they are closed: a file of ours would get the number, and what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _discard(stream: QuietStream) -> None:
    """Leads a stream to nowhere: the interpreter flushes it once more when it exits, and would complain."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Lets the closing words be said whatever else is pressed meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def say_stopped(arguments: Namespace, progress: str, status: int) -> int:
    """Says how far a command has come and how to resume it; returns the status."""
    with interrupts_ignored():
        if getattr(arguments, "json", False):
            print(json.dumps({"event": "interrupted", "message": progress}), flush=True)
        print(f"spear-fast: {progress}; resume with: {shlex.join(['spear-fast', *arguments.argv])}", file=sys.stderr)
    return status
