"""Timing of variants side by side: in turn, from warm or cold caches, by the wall clock or by the GPU's events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

# a sample lasts at least as long, so that the clock's own grain does not matter
SHORTEST_SAMPLE = 1e-3
SHORTEST_SAMPLE_CUDA = 2e-4
MOST_CALLS = 512


@dataclass
class Variant:
    """One way to compute a case.

    calls: the computation, once for each copy of the inputs; one copy is warm, many together leave the caches cold.
    restore: puts back what the calls wrote into their inputs; not timed.
    within: what each sample runs in, such as a forced provider.
    graph: whether a CUDA graph may hold the calls: then launches cost what they cost in one.
    """

    name: str
    calls: Sequence[Callable[[], Any]]
    restore: Callable[[], None] | None = None
    within: Callable[[], AbstractContextManager] = contextlib.nullcontext
    graph: bool = False
    clock: str = field(default="wall", init=False)


def interleaved(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns seconds of each variant in each round; every round runs all of them once, in turning order."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.perf_counter()
            variants[name]()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def sampled(
    variants: Sequence[Variant], device: torch.device, seconds: float, rounds: tuple[int, int] = (5, 100)
) -> dict[str, list[float]]:
    """Returns seconds per call of each variant, a sample a round, all variants in turn in every round.

    seconds: when to stop, once there are `rounds[0]` samples; `rounds[1]` are the most.
    """
    samplers = {variant.name: _sampler(variant, device) for variant in variants}
    found: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    began = time.perf_counter()
    for i in range(rounds[1]):
        if i >= rounds[0] and time.perf_counter() - began > seconds:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(samplers[name]())
    return found


def _sampler(variant: Variant, device: torch.device) -> Callable[[], float]:
    """Returns what takes one sample of a variant: seconds per call."""
    sample = _on_cuda if device.type == "cuda" else _by_wall_clock
    with variant.within():
        # once to warm up, once to see how long it takes
        for call in variant.calls[:1] * 2:
            if variant.restore is not None:
                variant.restore()
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            once = time.perf_counter() - began
    repeats = 1
    if variant.restore is None:
        shortest = SHORTEST_SAMPLE_CUDA if device.type == "cuda" else SHORTEST_SAMPLE
        repeats = max(1, min(round(shortest / max(once, 1e-7)), MOST_CALLS) // len(variant.calls))
    return sample(variant, list(variant.calls) * repeats)


def _by_wall_clock(variant: Variant, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
    def sample() -> float:
        if variant.restore is not None:
            variant.restore()
        with variant.within():
            began = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - began) / len(calls)

    return sample


def _on_cuda(variant: Variant, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
    def run() -> None:
        for call in calls:
            call()

    replay = _captured(run, variant) if variant.graph else None
    variant.clock = "events" if replay is None else "graph"
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        if variant.restore is not None:
            variant.restore()
        with variant.within():
            began.record()
            (replay or run)()
            ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3 / len(calls)

    return sample


def _captured(run: Callable[[], None], variant: Variant) -> Callable[[], None] | None:
    """Returns the replay of a CUDA graph of `run`, or None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        torch.cuda.synchronize()
        with variant.within(), torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        return None
    return graph.replay


def quantile(values: Sequence[float], share: float) -> float:
    """Returns the quantile by linear interpolation."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    return {name: quantile(values, share) for name, share in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8))}
