"""Several workers for the steps of one engine on a CPU: each has some of the slots and some of the threads.

A step is dozens of small pieces of work. Threads that share each of them wait for the last one each time, longer the
more there are; workers of one thread each wait for each other once a step. But each reads all weights, so that it needs
enough rows to multiply them with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from spear_fast.decoding import process
from spear_fast.decoding.request import Request
from spear_fast.decoding.runner import Outcome, Runner


class WorkerPool:
    """Runners that make their steps side by side; to a scheduler they are one.

    parts: the runners. threads: of torch, for all of them together.
    """

    def __init__(self, parts: Sequence[Runner], threads: int) -> None:
        self.parts, self._steps = parts, 0
        self.slots = sum(part.slots for part in parts)
        self._pool = ThreadPoolExecutor(len(parts), thread_name_prefix="spear_fast worker")
        process.share_threads(self._pool, len(parts), threads)

    @property
    def requests(self) -> list[Request]:
        """The requests that are not handed over yet."""
        return [request for part in self.parts for request in part.requests]

    @property
    def used(self) -> int:
        return sum(part.used for part in self.parts)

    def admit(self, requests: Sequence[Request]) -> None:
        """Gives requests slots, each where the fewest are used; see `Runner.admit`."""
        used = [part.used for part in self.parts]
        given: list[list[Request]] = [[] for _ in self.parts]
        for request in requests:
            emptiest = min(range(len(used)), key=lambda i: used[i] - self.parts[i].slots)
            used[emptiest] += 1
            given[emptiest].append(request)
        for part, some in zip(self.parts, given, strict=True):
            if some:
                part.admit(some)

    def step(self) -> None:
        """Makes a step of all slots in use."""
        busy = [part for part in self.parts if part.used]
        if any(part.calls_back for part in busy):
            # a caller's own function need not be safe to call from several threads
            for part in busy:
                part.step()
            return
        steps = [self._pool.submit(_in_inference_mode, part.step) for part in busy]
        wait(steps)
        for step in steps:
            step.result()
        self._steps += 1
        process.give_memory_back_after_step(self._steps)

    def collect_finished(self) -> list[Outcome]:
        """Frees the slots of all that are done; see `Runner.collect_finished`."""
        return [outcome for part in self.parts for outcome in part.collect_finished()]

    def drop(self, unwanted: Callable[[Request], bool]) -> None:
        """Frees the slots of unwanted requests."""
        for part in self.parts:
            part.drop(unwanted)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


def _in_inference_mode(step: Callable[[], None]) -> None:
    with torch.inference_mode():
        step()
