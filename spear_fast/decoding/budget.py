"""What the engine's buffers take, worked out before they are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from spear_fast.decoding.decoder import Decoder
from spear_fast.decoding.slots import Slots
from spear_fast.decoding.workers import ROWS_OF_WORKER, Workers, workers_for

# places where nobody says how many; on a CPU at least, and as many as every thread needs to be a worker of its own
DEFAULT_SLOTS = {"cpu": 32, "cuda": 128}
# share of a GPU's free memory that the buffers may take: activations and the encoder need some too
SHARE = 0.8


@dataclass(frozen=True)
class Plan:
    """Sizes of an engine's buffers. slots: utterances in flight. beams: most hypotheses of each.

    max_length: most generated tokens. max_source: most source tokens. slot_bytes: what a place takes, worked out.
    workers: that share the places and torch's threads, see `Workers`.
    """

    slots: int
    beams: int
    max_length: int
    max_source: int
    slot_bytes: int
    workers: int = 1

    @property
    def bytes(self) -> int:
        """Bytes that the buffers take when every utterance is as long as it may be."""
        return self.slots * self.slot_bytes

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        *,
        slots: int | None = None,
        beams: int = 4,
        max_length: int = 512,
        max_source: int = 2048,
        budget: int | None = None,
        guided: bool = False,
        workers: int | None = None,
    ) -> Plan:
        """Returns the plan for so many places, or for as many as fit.

        budget: bytes that the buffers may take; by default a share of a GPU's free memory, and no limit on a CPU.
        Buffers grow with what is decoded, up to the plan. workers: on a CPU, by default as many as torch's threads are
        best shared by. Raises ValueError for a budget that not even one place, or not the wanted `slots`, fits into,
        and for workers elsewhere.
        """
        if workers is not None and (workers < 1 or (workers > 1 and not decoder.row_by_row)):
            raise ValueError(
                "workers must be 1 but for float32 models on a CPU with the C++ extension, there 1 or more, "
                f"got {workers}."
            )
        each = slot_bytes(decoder, beams=beams, max_length=max_length, max_source=max_source, guided=guided)
        budget = free_bytes(decoder.device) if budget is None else budget
        wanted = slots or _default_slots(decoder.device, beams)
        fitting = wanted if budget is None else min(wanted, budget // each)
        if fitting < (slots or 1):
            raise ValueError(
                f"{slots or 1} utterances with {beams} beams, {max_length} tokens and {max_source} source tokens take "
                f"{(slots or 1) * each:,} bytes, and the budget is {budget:,}; lower one of them or raise the budget."
            )
        return cls(fitting, beams, max_length, max_source, each, workers or _workers(decoder, fitting, beams))

    @classmethod
    def for_all(
        cls, decoder: Decoder, count: int, *, beams: int, max_length: int, max_source: int, guided: bool = False
    ) -> Plan:
        """Returns the plan for `count` requests that are all there: a place for each, or as many as memory is free for.

        At least one: few utterances become as long as they may.
        """
        each = slot_bytes(decoder, beams=beams, max_length=max_length, max_source=max_source, guided=guided)
        budget = free_bytes(decoder.device)
        fitting = max(1, count if budget is None else min(count, budget // each))
        return cls(fitting, beams, max_length, max_source, each, _workers(decoder, fitting, beams))

    def halved(self) -> Plan:
        return replace(self, slots=max(1, self.slots // 2))

    def make(self, decoder: Decoder, *, guided: bool = False, fixed: bool = False) -> Slots | Workers:
        """Returns the buffers; see `Slots`."""
        workers = min(self.workers, self.slots)
        bounds = [self.slots * i // workers for i in range(workers + 1)]
        parts = [
            Slots(
                decoder,
                count=end - begin,
                beams=self.beams,
                # the last token is an input too, in the step behind the end
                limit=self.max_length + 1,
                source=self.max_source,
                guided=guided,
                fixed=fixed,
            )
            for begin, end in pairwise(bounds)
        ]
        return Workers(parts, torch.get_num_threads()) if workers > 1 else parts[0]


def _default_slots(device: torch.device, beams: int) -> int:
    if device.type == "cpu":
        return max(DEFAULT_SLOTS["cpu"], -(-ROWS_OF_WORKER * torch.get_num_threads() // beams))
    return DEFAULT_SLOTS["cuda"]


def _workers(decoder: Decoder, slots: int, beams: int) -> int:
    # where a row's bits depend on how many rows there are, all stay together
    return workers_for(torch.get_num_threads(), slots, beams) if decoder.row_by_row else 1


def free_bytes(device: torch.device) -> int | None:
    """Returns the bytes of a device that buffers may take, None for no limit."""
    return int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def slot_bytes(decoder: Decoder, *, beams: int, max_length: int, max_source: int, guided: bool = False) -> int:
    """Returns the bytes of one utterance's place: self-attention's and cross-attention's caches, and the histories."""
    size, positions, halves = decoder.embedding.element_size(), max_length + 1, 2 if guided else 1
    own = 2 * len(decoder.layers) * halves * beams * decoder.kv_heads * positions * decoder.head_dim * size
    cross = 2 * len(decoder.layers) * decoder.heads * max_source * decoder.head_dim * size
    precise = max(size, 4)
    # ancestors; tokens, parents and log-probabilities; the forced prefix
    history = positions * (beams * (halves + 4 + 1 + precise) + 4)
    return own + cross + history
