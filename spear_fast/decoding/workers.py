"""Several workers for the steps of one engine on a CPU: each has some of the places and some of the threads.

A step is dozens of small pieces of work. Threads that share each of them wait for the last one each time, longer the
more there are; workers of one thread each wait for each other once a step. But each reads all weights, so that it needs
enough rows to multiply them with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.result import DecodingResult
from spear_fast.decoding.slots import Seat, Slots

# hypotheses of a worker from which on its products take as long as their arithmetic, and not as reading the weights.
# On two threads two workers are 1.02 times as fast as one with 64 rows each, 0.97 times with 16
ROWS_OF_WORKER = 64
# steps between two times that free memory is given back: malloc holds some for each thread, 14 MB for 160 rows
TRIM_EVERY = 64


def workers_for(threads: int, slots: int, beams: int) -> int:
    """Returns how many workers share `threads` threads where so many are decoded together: one for each, or one.

    Nothing in between: OpenMP lets threads that wait sleep, and takes long to wake them, once several teams of them are
    more than there are processors, and the caller's own thread has one.
    """
    return threads if slots >= threads and slots * beams >= ROWS_OF_WORKER * threads else 1


class Workers:
    """`Slots` that make their steps side by side; to an engine they are one.

    parts: their places. threads: of torch, for all of them together.
    """

    def __init__(self, parts: Sequence[Slots], threads: int) -> None:
        self.parts, self._made = parts, 0
        self.count = sum(part.count for part in parts)
        self._pool = ThreadPoolExecutor(len(parts), thread_name_prefix="spear_fast worker")
        share, together = max(1, threads // len(parts)), threading.Barrier(len(parts))
        wait([self._pool.submit(_share_threads, share, together) for _ in parts])
        # for libraries that know one number for all, and for threads to come
        torch.set_num_threads(threads)

    @property
    def taken(self) -> list[Seat]:
        """The places in use."""
        return [seat for part in self.parts for seat in part.taken]

    @property
    def used(self) -> int:
        return len(self.taken)

    def admit(
        self,
        owners: Sequence[Any],
        memories: Sequence[Tensor],
        options: Sequence[DecodingOptions],
        seeds: Sequence[int],
    ) -> None:
        """Gives utterances places, each where the fewest are taken; see `Slots.admit`."""
        used = [part.used for part in self.parts]
        given: list[list[tuple]] = [[] for _ in self.parts]
        for each in zip(owners, memories, options, seeds, strict=True):
            emptiest = min(range(len(used)), key=lambda i: used[i] - self.parts[i].count)
            used[emptiest] += 1
            given[emptiest].append(each)
        for part, requests in zip(self.parts, given, strict=True):
            if requests:
                part.admit(*zip(*requests, strict=True))

    def proceed(self) -> None:
        """Makes a step of all that is taken."""
        busy = [part for part in self.parts if part.used]
        if any(seat.options.filter_logits is not None for seat in self.taken):
            # a caller's own function need not be safe to call from several threads
            for part in busy:
                part.proceed()
            return
        steps = [self._pool.submit(_in_inference_mode, part.proceed) for part in busy]
        wait(steps)
        for step in steps:
            step.result()
        self._made += 1
        if self._made % TRIM_EVERY == TRIM_EVERY // 2:
            torch.ops.spear_fast.give_memory_back()

    def harvest(self) -> list[tuple[Any, DecodingResult]]:
        """Frees the places of all that are done; see `Slots.harvest`."""
        return [each for part in self.parts for each in part.harvest()]

    def drop(self, unwanted: Callable[[Any], bool]) -> None:
        """Frees the places of unwanted owners."""
        for part in self.parts:
            part.drop(unwanted)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


def _share_threads(count: int, together: threading.Barrier) -> None:
    """Sets how many threads this one has; returns when all do, so that each of them has been here."""
    torch.ops.spear_fast.set_num_threads(count)
    together.wait()


def _in_inference_mode(step: Callable[[], None]) -> None:
    with torch.inference_mode():
        step()
