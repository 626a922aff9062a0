"""Decoding steps on CUDA captured once, as graphs, and replayed: one launch instead of hundreds.

A graph reads and writes the addresses it was captured with, always for the same number of slots. So it is captured
once for each of a few numbers of slots, over buffers that stay where they are until they grow; then all are dropped.
SPEAR_FAST_GRAPHS=0 leaves them out.
"""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import torch

from spear_fast.ops.reference import ranges

Step = Callable[[], None]

# steps that are made without a graph before one is captured: they compile, load and plan what is needed; and what
# lasts no longer than from one look at who is done to the next is not worth a capture
WARM_UPS = 4

# the stream on which steps of a device are captured: cuBLAS keeps a workspace for each, so that there is only one
_STREAMS: dict[torch.device, torch.cuda.Stream] = {}
# what has failed stays alive: the allocator may hold on to its capture, and later ones would be undefined without it
_FAILED: list[object] = []


class _Switch:
    """Whether this process captures steps: not any more once a capture has failed, by the reason why."""

    failed_of: str | None = None


class Capturer(Protocol):
    """What a kind of device makes of a step."""

    def warm_up(self, step: Step) -> None:
        """Makes the step, as it will be captured."""

    def capture(self, step: Step) -> Step:
        """Captures the step without making it; returns what makes it."""

    def forget(self) -> None:
        """Lets go of the memory that the captures share; none of them is replayed again."""


class CudaCapturer:
    """CUDA graphs that share one pool of memory: what a step makes for itself is not needed after its end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _STREAMS.get(device) or _STREAMS.setdefault(device, torch.cuda.Stream(device))
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step) -> None:
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                step()
            current.wait_stream(self._stream)

    def capture(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), _no_collection():
            # while it is captured nothing can be freed to make room
            torch.cuda.empty_cache()
            # not torch.cuda.graph, which stays on its stream where the capture fails
            with torch.cuda.stream(self._stream):
                # other threads may use the device meanwhile
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    step()
                except BaseException:
                    _FAILED.extend((graph, self._pool))
                    # that the capture has failed is no news
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()
                    raise
                try:
                    graph.capture_end()
                except BaseException:
                    _FAILED.extend((graph, self._pool))
                    raise
        return graph.replay

    def forget(self) -> None:
        # a pool whose last graph is gone is gone too
        self._pool = torch.cuda.graph_pool_handle()


class Graphs:
    """Replays what it has captured, and captures what it is asked for again and again.

    Where a capture fails it says so once, as a warning, and no step of the process is captured from then on.
    """

    def __init__(self, capturer: Capturer) -> None:
        self._capturer = capturer
        self._made: dict[Hashable, int] = {}
        self._captured: dict[Hashable, Step] = {}

    def run(self, key: Hashable, step: Step) -> None:
        """Makes a step. Steps of the same key do the same, over the same memory, until `drop`."""
        captured = self._captured.get(key)
        if captured is not None:
            captured()
            return
        made = self._made.get(key, 0)
        if _Switch.failed_of is not None:
            step()
        elif made < WARM_UPS:
            self._capturer.warm_up(step)
            self._made[key] = made + 1
        else:
            self._capture(key, step)

    def _capture(self, key: Hashable, step: Step) -> None:
        try:
            captured = self._capturer.capture(step)
        except Exception as error:
            self.drop()
            _Switch.failed_of = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warnings.warn(
                "decoding goes on without CUDA graphs, which is slower: the step cannot be captured "
                f"({_Switch.failed_of}); "
                "SPEAR_FAST_GRAPHS=0 does not try to.",
                RuntimeWarning,
                stacklevel=2,
            )
            step()
            return
        self._captured[key] = captured
        captured()

    def drop(self) -> None:
        """Forgets all captures, because the memory that they work on is to be replaced."""
        self._made.clear()
        self._captured.clear()
        self._capturer.forget()


def graphs_for(device: torch.device) -> Graphs | None:
    """Returns graphs for a device, or None where steps are made without a graph: on the CPU, and on request.

    So it is in debug mode too: what is captured looks at no ranges; and once a capture has failed in this process.
    """
    if device.type != "cuda" or os.environ.get("SPEAR_FAST_GRAPHS", "") == "0" or ranges.DEBUG:
        return None
    if _Switch.failed_of is not None:
        return None
    return Graphs(CudaCapturer(device))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps the garbage collector from freeing CUDA memory in the midst of a capture, which would end it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def rounded_slots(used: int, count: int) -> int:
    """Returns how many of `count` slots take part in a captured step where `used` are in use.

    That is one of four numbers between powers of two: the free slots among them are at most a fifth.
    """
    step = max(1, (1 << max(used - 1, 0).bit_length()) // 8)
    return min(-(-used // step) * step, count)
