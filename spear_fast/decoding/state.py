"""The tensors of all utterances in flight: buffers that stay where they are between two growths.

Nothing here is moved when hypotheses are reordered: keys and values stay where they were written, and the ancestor
table says for each hypothesis and position in which beam that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.decoding.options import DecodingOptions, PackedOptions
from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.packed.memory import KvDtype, ProjectedMemory
from spear_fast.ops.selection_params import FloatParam, IntParam, SelectionMethod
from spear_fast.transfer import to_device

# positions that the buffers hold at first; they double whenever they are full
FIRST_CAPACITY = 64


@dataclass
class DecodeState:
    """U utterances of K hypotheses; R = U, or 2 U under guidance: first with their source, then without.

    keys, values: for each layer `[R * K, kv_heads, T, head_dim]`, keys rotated. memory: cross-attention's keys and
    values, `[U, heads, S, head_dim]`. prefix: `[U, most inputs]` int32. seeds: `[U]` int64.
    The others are as `ops.beam_step` and `ops.sample_step` have them. finished: of hypotheses of every method but
    standard beam search, whether they hold an end. ended: `[U]` int64, in standard beam search hypotheses that have
    entered the pool; in the reference's the step at which all hypotheses held an end, 0 before; in speculative decoding
    rounds.
    """

    keys: list[Tensor]
    values: list[Tensor]
    memory: ProjectedMemory
    float_params: Tensor
    int_params: Tensor
    prefix: Tensor
    seeds: Tensor
    inputs: Tensor
    scores: Tensor
    lengths: Tensor
    ancestors: Tensor
    tokens: Tensor
    parents: Tensor
    logprobs: Tensor
    finished: Tensor
    pool_scores: Tensor
    pool_beams: Tensor
    pool_ends: Tensor
    pool_finished: Tensor
    pool_last_logprobs: Tensor
    ended: Tensor
    done: Tensor

    @classmethod
    def allocate(
        cls,
        decoder: Decoder,
        *,
        slots: int,
        beams: int,
        positions: int,
        max_source: int,
        guided: bool,
        kv_dtype: KvDtype = "exact",
    ) -> DecodeState:
        """Returns buffers of free slots, for up to `positions` inputs; they begin small and grow."""
        device, rows = decoder.device, slots * (2 if guided else 1)
        # not twice for a little more
        capacity = positions if positions <= 2 * FIRST_CAPACITY else FIRST_CAPACITY
        # sums and log-probabilities of halves are kept in float32
        precise = torch.promote_types(decoder.dtype, torch.float32)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=decoder.dtype, device=device)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # what no utterance has written is never read: pages that are not needed are never touched
        cache = (rows * beams, decoder.kv_heads, capacity, decoder.head_dim)
        layers = range(len(decoder.layers))
        state = cls(
            keys=[empty(*cache) for _ in layers],
            values=[empty(*cache) for _ in layers],
            memory=ProjectedMemory.allocate(decoder, slots=slots, beams=beams, length=max_source, kv_dtype=kv_dtype),
            float_params=zeros(slots, len(FloatParam), dtype=precise),
            int_params=zeros(slots, len(IntParam), dtype=torch.int32),
            prefix=zeros(slots, positions, dtype=torch.int32),
            seeds=zeros(slots, dtype=torch.int64),
            inputs=zeros(slots, beams, dtype=torch.int64),
            scores=zeros(slots, beams, dtype=precise),
            lengths=zeros(rows, beams, dtype=torch.int64),
            ancestors=zeros(rows, beams, capacity, dtype=torch.uint8),
            tokens=zeros(slots, capacity, beams, dtype=torch.int32),
            parents=zeros(slots, capacity, beams, dtype=torch.uint8),
            logprobs=zeros(slots, capacity, beams, dtype=precise),
            finished=zeros(slots, beams, dtype=torch.bool),
            pool_scores=zeros(slots, beams, dtype=precise),
            pool_beams=zeros(slots, beams, dtype=torch.int64),
            pool_ends=zeros(slots, beams, dtype=torch.int64),
            pool_finished=zeros(slots, beams, dtype=torch.bool),
            pool_last_logprobs=zeros(slots, beams, dtype=precise),
            ended=zeros(slots, dtype=torch.int64),
            done=torch.ones(slots, dtype=torch.bool, device=device),
        )
        # a free slot is of a kind that the ops know
        state.int_params[:, IntParam.BEAM_SIZE] = 1
        return state

    @property
    def batch(self) -> int:
        return self.inputs.shape[0]

    @property
    def beams(self) -> int:
        return self.inputs.shape[1]

    @property
    def guided(self) -> bool:
        return self.lengths.shape[0] > self.batch

    @property
    def capacity(self) -> int:
        return self.ancestors.shape[2]

    @property
    def generated(self) -> Tensor:
        """`[U, K]` int64: tokens of each hypothesis so far, the end of sequence included."""
        return self.lengths[: self.batch]

    def view(self, slots: int) -> DecodeState:
        """Returns the first `slots` utterances, over the same memory; all of them under guidance."""
        caches = slots * self.beams
        return DecodeState(
            keys=[keys[:caches] for keys in self.keys],
            values=[values[:caches] for values in self.values],
            memory=self.memory.part(0, slots),
            lengths=self.lengths[:slots],
            ancestors=self.ancestors[:slots],
            **{name: getattr(self, name)[:slots] for name in PER_UTTERANCE},
        )

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` positions; one buffer after the other, so that little is held twice."""
        more = capacity - self.capacity
        for buffers in (self.keys, self.values):
            for i in range(len(buffers)):
                buffers[i] = F.pad(buffers[i], (0, 0, 0, more))
        self.ancestors = F.pad(self.ancestors, (0, more))
        for name in ("tokens", "parents", "logprobs"):
            setattr(self, name, F.pad(getattr(self, name), (0, 0, 0, more)))

    def fill(
        self,
        slots: Sequence[int],
        memories: Sequence[Tensor],
        options: Sequence[DecodingOptions],
        seeds: Sequence[int],
        decoder: Decoder,
        *,
        apart: bool = False,
    ) -> None:
        """Puts utterances into slots, before their first step.

        memories: the encoder's output `[n, dim]` of each; cross-attention's keys and values are projected from it, once
        for all hypotheses. apart: project each by itself, not all by one matmul, whose bits may depend on its rows.
        """
        device = decoder.device
        if apart:
            projected = torch.cat([decoder.project(memory) for memory in memories])
        else:
            projected = decoder.project(torch.cat(list(memories)))
        lengths = [len(memory) for memory in memories]
        self.memory.put(projected, slots, lengths)
        rows = to_device(torch.tensor(list(slots), device="cpu"), device)
        packed = PackedOptions.of(options, decoder.eos_id)
        self.memory.lengths[rows] = to_device(torch.tensor(lengths, device="cpu"), device)
        self.float_params[rows] = to_device(packed.float_params.to(self.float_params.dtype), device)
        self.int_params[rows] = to_device(packed.int_params, device)
        self.prefix[rows, : packed.prefix.shape[1]] = to_device(packed.prefix, device)
        self.seeds[rows] = to_device(torch.tensor(list(seeds), device="cpu"), device)
        self.inputs[rows] = decoder.start_id
        self.scores[rows] = to_device(first_scores(packed.int_params, self.beams).to(self.scores.dtype), device)
        for name in ("finished", "pool_beams", "pool_ends", "pool_finished", "pool_last_logprobs", "ended", "done"):
            getattr(self, name)[rows] = 0
        self.pool_scores[rows] = -torch.inf
        own = torch.arange(self.beams, dtype=torch.uint8, device=device)
        for half in range(2 if self.guided else 1):
            self.lengths[rows + half * self.batch] = 0
            self.ancestors[rows + half * self.batch, :, 0] = own

    def move(self, origin: int, target: int, *, written: int, source: int) -> None:
        """Copies an utterance to another slot. written: its inputs. source: its memory positions."""
        for half in range(2 if self.guided else 1):
            old, new = half * self.batch + origin, half * self.batch + target
            old_rows, new_rows = (slice(row * self.beams, (row + 1) * self.beams) for row in (old, new))
            for buffer in (*self.keys, *self.values):
                buffer[new_rows, :, :written] = buffer[old_rows, :, :written]
            self.lengths[new] = self.lengths[old]
            self.ancestors[new] = self.ancestors[old]
        self.memory.move(origin, target, source)
        for name in PER_UTTERANCE:
            getattr(self, name)[target] = getattr(self, name)[origin]


# what is per utterance, and small
PER_UTTERANCE = tuple(
    field.name
    for field in fields(DecodeState)
    if field.name not in ("keys", "values", "memory", "lengths", "ancestors")
)


def first_scores(int_params: Tensor, beams: int) -> Tensor:
    """Returns the scores `[utterances, beams]` before the first step, float64.

    The hypotheses of a beam start out the same, so that only one may have descendants.
    """
    scores = torch.zeros(len(int_params), beams, dtype=torch.float64, device="cpu")
    method = int_params[:, IntParam.METHOD]
    searching = (method == SelectionMethod.BEAM) | (method == SelectionMethod.REFERENCE)
    scores[:, 1:].masked_fill_(searching[:, None], -torch.inf)
    return scores
