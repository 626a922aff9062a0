"""What a whole job would take, from a few of its tokens: for peers that take minutes for each batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# batch, tokens → decodes so many clips to so many tokens
Decode = Callable[[int, int], Any]


@dataclass(frozen=True)
class Extrapolated:
    """A batch that was decoded to half of `tokens` and to `tokens`. bytes: the most memory held, 0 on the CPU."""

    batch: int
    tokens: int
    seconds: tuple[float, float]
    bytes: tuple[float, float] = (0.0, 0.0)

    def at(self, tokens: int) -> tuple[float, float]:
        """Returns the seconds and bytes of so many tokens, along the line through both."""
        further = (tokens - self.tokens) / (self.tokens - self.tokens // 2)
        seconds, held = (whole + max(0.0, whole - half) * further for half, whole in (self.seconds, self.bytes))
        return seconds, held


def extrapolated(decode: Decode, batch: int, tokens: int, device: torch.device) -> Extrapolated:
    """Returns what a batch takes to half the tokens and to all of them."""
    seconds, held = [], []
    for most in (tokens // 2, tokens):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        decode(batch, most)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        held.append(float(torch.cuda.max_memory_allocated()) if device.type == "cuda" else 0.0)
    return Extrapolated(batch, tokens, (seconds[0], seconds[1]), (held[0], held[1]))


def that_fit(
    measure: Callable[[int], Extrapolated], tokens: int, memory: float, batches: Sequence[int]
) -> Iterator[Extrapolated]:
    """Yields what growing batches take, as long as the memory, in bytes, would hold them to so many tokens."""
    for batch in batches:
        try:
            found = measure(batch)
        except torch.OutOfMemoryError:
            return
        if found.at(tokens)[1] > memory:
            return
        yield found
