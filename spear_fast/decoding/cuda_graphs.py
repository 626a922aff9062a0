"""Decoding steps on CUDA recorded once, as graphs, and played again: one launch instead of hundreds.

A graph reads and writes the addresses it was recorded with, always for the same number of places. So it is recorded
once for each of a few numbers of places, over buffers that stay where they are until they grow; then all are dropped.
SPEAR_FAST_GRAPHS=0 leaves them out.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

from spear_fast.ops.reference import ranges

Step = Callable[[], None]

# steps that are made in the ordinary way before one is recorded: they compile, load and plan what is needed; and what
# lasts no longer than from one look at who is done to the next is not worth a recording
WARM_UPS = 4


class Recorder(Protocol):
    """What a kind of device makes of a step."""

    def warm_up(self, step: Step) -> None:
        """Makes the step, as it will be recorded."""

    def record(self, step: Step) -> Step:
        """Records the step without making it; returns what makes it."""

    def forget(self) -> None:
        """Lets go of the memory that the recordings share; none of them is played again."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory: what a step makes for itself is not needed behind its end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step) -> None:
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                step()
            current.wait_stream(self._stream)

    def record(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            # while it is recorded nothing can be freed to make room
            torch.cuda.empty_cache()
            # not torch.cuda.graph, which stays on its stream where the recording fails
            with torch.cuda.stream(self._stream):
                # other threads may use the device meanwhile
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    step()
                except BaseException:
                    # that the recording has failed is no news
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        return graph.replay

    def forget(self) -> None:
        # a pool whose last graph is gone is gone too
        self._pool = torch.cuda.graph_pool_handle()


class Graphs:
    """Plays what it has recorded, and records what it is asked for again and again.

    Where recording fails it says so once, as a warning, and makes every step in the ordinary way from then on.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._made: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, Step] = {}
        self._fails = False

    def run(self, key: Hashable, step: Step) -> None:
        """Makes a step. Steps of the same key do the same, over the same memory, until `drop`."""
        recorded = self._recorded.get(key)
        if recorded is not None:
            recorded()
            return
        made = self._made.get(key, 0)
        if self._fails:
            step()
        elif made < WARM_UPS:
            self._recorder.warm_up(step)
            self._made[key] = made + 1
        else:
            self._record(key, step)

    def _record(self, key: Hashable, step: Step) -> None:
        try:
            recorded = self._recorder.record(step)
        except Exception as error:
            self.drop()
            self._fails = True
            reason = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(
                f"decoding goes on without CUDA graphs, which is slower: the step cannot be recorded ({reason[0]}); "
                "SPEAR_FAST_GRAPHS=0 does not try to.",
                RuntimeWarning,
                stacklevel=2,
            )
            step()
            return
        self._recorded[key] = recorded
        recorded()

    def drop(self) -> None:
        """Forgets all recordings, because the memory that they work on is to be replaced."""
        self._made.clear()
        self._recorded.clear()
        self._recorder.forget()


def graphs_for(device: torch.device) -> Graphs | None:
    """Returns graphs for a device, or None where steps are made in the ordinary way: on the CPU, and on request.

    So it is in debug mode too: what is recorded looks at no ranges.
    """
    if device.type != "cuda" or os.environ.get("SPEAR_FAST_GRAPHS", "") == "0" or ranges.DEBUG:
        return None
    return Graphs(CudaRecorder(device))


def rounded_slots(used: int, count: int) -> int:
    """Returns how many of `count` places take part in a recorded step where `used` are in use.

    That is one of four numbers between powers of two: the free places among them are at most a fifth.
    """
    step = max(1, (1 << max(used - 1, 0).bit_length()) // 8)
    return min(-(-used // step) * step, count)
