"""What the engine's buffers take, worked out before they are made."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from spear_fast.decoding.decoder import Decoder
from spear_fast.decoding.slots import Slots

# places where nobody says how many, by type of device: a CPU's products are at their best from about a hundred rows
DEFAULT_SLOTS = {"cpu": 32, "cuda": 128}
# share of a GPU's free memory that the buffers may take: activations and the encoder need some too
SHARE = 0.8


@dataclass(frozen=True)
class Plan:
    """Sizes of an engine's buffers. slots: utterances in flight. beams: most hypotheses of each.

    max_length: most generated tokens. max_source: most source tokens. slot_bytes: what a place takes, worked out.
    """

    slots: int
    beams: int
    max_length: int
    max_source: int
    slot_bytes: int

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
    ) -> Plan:
        """Returns the plan for so many places, or for as many as fit.

        budget: bytes that the buffers may take; by default a share of a GPU's free memory, and no limit on a CPU.
        Buffers grow with what is decoded, up to the plan. Raises ValueError for a budget that not even one place, or
        not the wanted `slots`, fits into.
        """
        each = slot_bytes(decoder, beams=beams, max_length=max_length, max_source=max_source, guided=guided)
        budget = free_bytes(decoder.device) if budget is None else budget
        wanted = slots or DEFAULT_SLOTS.get(decoder.device.type, DEFAULT_SLOTS["cpu"])
        fitting = wanted if budget is None else min(wanted, budget // each)
        if fitting < (slots or 1):
            raise ValueError(
                f"{slots or 1} utterances with {beams} beams, {max_length} tokens and {max_source} source tokens take "
                f"{(slots or 1) * each:,} bytes, and the budget is {budget:,}; lower one of them or raise the budget."
            )
        return cls(fitting, beams, max_length, max_source, each)

    @classmethod
    def for_all(
        cls, decoder: Decoder, count: int, *, beams: int, max_length: int, max_source: int, guided: bool = False
    ) -> Plan:
        """Returns the plan for `count` requests that are all there: a place for each, or as many as memory is free for.

        At least one: few utterances become as long as they may.
        """
        each = slot_bytes(decoder, beams=beams, max_length=max_length, max_source=max_source, guided=guided)
        budget = free_bytes(decoder.device)
        fitting = count if budget is None else min(count, budget // each)
        return cls(max(1, fitting), beams, max_length, max_source, each)

    def halved(self) -> Plan:
        return replace(self, slots=max(1, self.slots // 2))

    def make(self, decoder: Decoder, *, guided: bool = False, fixed: bool = False) -> Slots:
        """Returns the buffers; see `Slots`."""
        # the last token is an input too, in the step behind the end
        return Slots(
            decoder,
            count=self.slots,
            beams=self.beams,
            limit=self.max_length + 1,
            source=self.max_source,
            guided=guided,
            fixed=fixed,
        )


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
