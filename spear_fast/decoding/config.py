"""The sizes of an engine's buffers, worked out from a memory budget before anything is allocated."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.packed.memory import KvDtype

# slots where nobody says how many; on a CPU at least, and as many as every thread needs to be a worker of its own
DEFAULT_SLOTS = {"cpu": 32, "cuda": 128}
# share of a GPU's free memory that the buffers may take: activations and the encoder need some too
SHARE = 0.8
# hypotheses of a worker from which on its matmuls take as long as their arithmetic, and not as reading the weights.
# On two threads two workers are 1.02 times as fast as one with 64 rows each, 0.97 times with 16
ROWS_OF_WORKER = 64


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine's buffers. slots: utterances in flight. beams: most hypotheses of each.

    max_length: most generated tokens. max_source: most source tokens. slot_bytes: what a slot takes, worked out.
    workers: that share the slots and torch's threads, see `WorkerPool`. kv_dtype: of cross-attention's keys and values.
    """

    slots: int
    beams: int
    max_length: int
    max_source: int
    slot_bytes: int
    workers: int = 1
    kv_dtype: KvDtype = "exact"

    @property
    def bytes(self) -> int:
        """Bytes that the buffers take when every utterance is as long as it may be."""
        return self.slots * self.slot_bytes

    @classmethod
    def for_decoder(
        cls,
        decoder: Decoder,
        *,
        slots: int | None = None,
        beams: int = 4,
        max_length: int = 512,
        max_source: int = 2048,
        memory_budget: int | None = None,
        guided: bool = False,
        workers: int | None = None,
        kv_dtype: KvDtype = "exact",
    ) -> EngineConfig:
        """Returns the sizes for so many slots, or for as many as fit.

        memory_budget: bytes that the buffers may take; by default a share of a GPU's free memory, and no limit on a
        CPU. Buffers grow with what is decoded, up to these sizes. workers: on a CPU, by default as many as torch's
        threads are best shared by. kv_dtype: "fp8" holds cross-attention's keys and values in 8 bits, with a scale for
        each utterance, layer and head. Raises ValueError for sizes below 1, for a budget that not even one slot, or not
        the wanted `slots`, fits into, for workers elsewhere, and for another kv_dtype.
        """
        for name, value in (("slots", slots), ("beams", beams), ("max_length", max_length), ("max_source", max_source)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if workers is not None and (workers < 1 or (workers > 1 and not decoder.batch_invariant)):
            raise ValueError(
                "workers must be 1 but for float32 models on a CPU with the C++ extension, there 1 or more, "
                f"got {workers}."
            )
        if kv_dtype not in get_args(KvDtype):
            raise ValueError(f"kv_dtype must be one of {', '.join(get_args(KvDtype))}, got {kv_dtype!r}.")
        each = slot_bytes(
            decoder, beams=beams, max_length=max_length, max_source=max_source, guided=guided, kv_dtype=kv_dtype
        )
        budget = free_bytes(decoder.device) if memory_budget is None else memory_budget
        wanted = slots or _default_slots(decoder.device, beams)
        fitting = wanted if budget is None else min(wanted, budget // each)
        if fitting < (slots or 1):
            raise ValueError(
                f"{slots or 1} utterances with {beams} beams, {max_length} tokens and {max_source} source tokens take "
                f"{(slots or 1) * each:,} bytes, and the memory budget is {budget:,}; lower one of them or raise the "
                "budget."
            )
        workers = workers or _workers(decoder, fitting, beams)
        return cls(fitting, beams, max_length, max_source, each, workers, kv_dtype)

    @classmethod
    def for_batch(
        cls, decoder: Decoder, count: int, *, beams: int, max_length: int, max_source: int, guided: bool = False
    ) -> EngineConfig:
        """Returns the sizes for `count` requests that are all there: a slot for each, or as many as memory is free for.

        At least one: few utterances become as long as they may.
        """
        each = slot_bytes(decoder, beams=beams, max_length=max_length, max_source=max_source, guided=guided)
        budget = free_bytes(decoder.device)
        fitting = max(1, count if budget is None else min(count, budget // each))
        return cls(fitting, beams, max_length, max_source, each, _workers(decoder, fitting, beams))

    @classmethod
    def of(cls, decoder: Decoder, *, budget: int | None = None, **sizes: Any) -> EngineConfig:
        """Deprecated: the name of `for_decoder` before it was called so."""
        warnings.warn("Plan.of is now EngineConfig.for_decoder, budget memory_budget.", DeprecationWarning, 2)
        return cls.for_decoder(decoder, memory_budget=budget, **sizes)

    def halved(self) -> EngineConfig:
        """Returns the same with half the slots, at least one."""
        return replace(self, slots=max(1, self.slots // 2))


def workers_for(threads: int, slots: int, beams: int) -> int:
    """Returns how many workers share `threads` threads where so many are decoded together: one for each, or one.

    Nothing in between: OpenMP lets threads that wait sleep, and takes long to wake them, once several teams of them are
    more than there are processors, and the caller's own thread has one.
    """
    return threads if slots >= threads and slots * beams >= ROWS_OF_WORKER * threads else 1


def _default_slots(device: torch.device, beams: int) -> int:
    if device.type == "cpu":
        return max(DEFAULT_SLOTS["cpu"], -(-ROWS_OF_WORKER * torch.get_num_threads() // beams))
    return DEFAULT_SLOTS["cuda"]


def _workers(decoder: Decoder, slots: int, beams: int) -> int:
    # where a row's bits depend on how many rows there are, all stay together
    return workers_for(torch.get_num_threads(), slots, beams) if decoder.batch_invariant else 1


def free_bytes(device: torch.device) -> int | None:
    """Returns the bytes of a device that buffers may take, None for no limit.

    On a GPU that is a share of what is free, and of what torch holds without using it.
    """
    if device.type != "cuda":
        return None
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(SHARE * (torch.cuda.mem_get_info(device)[0] + idle))


def slot_bytes(
    decoder: Decoder,
    *,
    beams: int,
    max_length: int,
    max_source: int,
    guided: bool = False,
    kv_dtype: KvDtype = "exact",
) -> int:
    """Returns the bytes of one utterance's slot: self-attention's and cross-attention's caches, and the histories."""
    size, positions, halves = decoder.embedding.element_size(), max_length + 1, 2 if guided else 1
    own = 2 * len(decoder.layers) * halves * beams * decoder.kv_heads * positions * decoder.head_dim * size
    # a head's numbers, and its scale
    of_head = max_source * decoder.head_dim * size if kv_dtype == "exact" else max_source * decoder.head_dim + 4
    cross = 2 * len(decoder.layers) * decoder.heads * of_head
    precise = max(size, 4)
    # ancestors; tokens, parents and log-probabilities; the forced prefix
    history = positions * (beams * (halves + 4 + 1 + precise) + 4)
    return own + cross + history
