"""Ctrl-C and SIGTERM as a wish to stop soon, with everything finished on disk."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

NOTICE = "\nspear-fast: stopping after the step in progress; press Ctrl-C again to stop at once\n"


class StopSignal(threading.Event):
    """Set by the first signal, so that everything finished is kept; the second one stops at once.

    signal: the signal that set it. at_once: whether there was a second one.
    """

    signal = signal.SIGINT
    at_once = False

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Takes SIGINT and SIGTERM inside the block; the main thread's to call."""
        before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self.is_set():
            self.at_once = True
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        self.set()
        # print is not safe in the middle of another print; where nobody listens, nothing is said
        with suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, NOTICE.encode())
