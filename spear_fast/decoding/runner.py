"""The runner: slots for utterances in flight, filled and freed one by one, and the steps of all of them.

Utterances stand in the first slots: where one leaves, the next one that comes takes its slot, and where none comes the
last one moves there, so that a step works on whole buffers' beginnings and on nothing idle. With `fixed` all slots take
part in every step, so that a matmul always has the same number of rows, unless its bits do not depend on that; under
guidance it is so too, because the buffers have a second half. Where steps are captured as graphs some free slots take
part. A free slot counts as done: nothing is selected there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spear_fast.decoding.cuda_graphs import graphs_for, rounded_slots
from spear_fast.decoding.methods import Failure, Mix, step
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.packed.memory import KvDtype
from spear_fast.decoding.request import Request
from spear_fast.decoding.result import DecodingResult, backtrace
from spear_fast.decoding.source_alignment import aligned
from spear_fast.decoding.state import DecodeState
from spear_fast.decoding.streaming import Streaming, send_final_tokens
from spear_fast.ops.selection_params import SelectionMethod
from spear_fast.transfer import to_device, to_host

# steps between two looks at who is done, where a look makes the host wait: a sixteenth of those made
SHORTEST_INTERVAL, LONGEST_INTERVAL = 4, 32

ROW_FIELDS = ("scores", "finished", "pool_scores", "pool_beams", "pool_ends", "pool_finished", "pool_last_logprobs")
HISTORY_FIELDS = ("tokens", "parents", "logprobs")

Outcome = tuple[Request, DecodingResult | BaseException]


def interval(device: torch.device, steps: int) -> int:
    """Returns after how many more steps to look who is done; on the CPU a look costs nothing."""
    return 1 if device.type == "cpu" else min(max(SHORTEST_INTERVAL, steps // 16), LONGEST_INTERVAL)


@dataclass
class Slot:
    """A slot in use.

    steps: tokens made, or a few more: those after an end not yet looked at, and drafts. streaming: None of most.
    """

    request: Request
    memory: Tensor | None
    streaming: Streaming | None = None
    steps: int = 0

    @property
    def options(self) -> DecodingOptions:
        return self.request.options


@dataclass
class _Finished:
    """What the steps of an utterance wrote, on the host; see `backtrace`."""

    slot: Slot
    row: dict[str, np.ndarray]
    history: dict[str, np.ndarray]


class Runner:
    """Buffers for `slots` utterances of `beams` hypotheses, up to `positions` inputs and `max_source` memory positions.

    occupied: the first slots; None where an utterance has left and no other has come yet.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int,
        beams: int,
        positions: int,
        max_source: int,
        guided: bool = False,
        fixed: bool = False,
        kv_dtype: KvDtype = "exact",
    ) -> None:
        self.decoder, self.slots, self.positions = decoder, slots, positions
        self.fixed = guided or (fixed and not decoder.batch_invariant)
        self._apart = fixed and not decoder.batch_invariant
        self.occupied: list[Slot | None] = []
        self.state = DecodeState.allocate(
            decoder,
            slots=slots,
            beams=beams,
            positions=positions,
            max_source=max_source,
            guided=guided,
            kv_dtype=kv_dtype,
        )
        self._views: dict[int, DecodeState] = {slots: self.state}
        self._graphs = graphs_for(decoder.device)
        self._mix: Mix | None = None
        self._failures: list[Failure] = []
        # of the reference's search: out of their slots, with all the steps they may make, before it is known when
        # those that they stop with do
        self._held: list[_Finished] = []

    @property
    def taken(self) -> list[Slot]:
        """The slots in use, in order."""
        return [slot for slot in self.occupied if slot is not None]

    @property
    def requests(self) -> list[Request]:
        """The requests that are not handed over yet."""
        return [each.request for each in (*self.taken, *(held.slot for held in self._held))]

    @property
    def used(self) -> int:
        return len(self.taken)

    @property
    def calls_back(self) -> bool:
        """Whether a step calls a function of a caller's."""
        return any(slot.options.filter_logits is not None for slot in self.taken)

    def view(self) -> DecodeState:
        """Returns the slots that the next step works on."""
        self._close_up()
        used = self.slots if self.fixed else len(self.occupied)
        if self._graphs is not None:
            used = rounded_slots(used, self.slots)
        if used not in self._views:
            self._views[used] = self.state.view(used)
        return self._views[used]

    def admit(self, requests: Sequence[Request]) -> None:
        """Gives encoded requests slots; there must be as many free ones."""
        vacant = [slot_id for slot_id, slot in enumerate(self.occupied) if slot is None]
        slot_ids = [*vacant, *range(len(self.occupied), self.slots)][: len(requests)]
        memories = [request.memory for request in requests if request.memory is not None]
        options, seeds = [request.options for request in requests], [request.seed for request in requests]
        self.state.fill(slot_ids, memories, options, seeds, self.decoder, apart=self._apart)
        self.occupied += [None] * (max(slot_ids) + 1 - len(self.occupied))
        for slot_id, request in zip(slot_ids, requests, strict=True):
            # one that may leave its slot before it is done looks at its source again
            remembered = request.memory if request.options.aligns and request.group is not None else None
            streaming = None if request.stream is None else Streaming(request.stream, request.options)
            self.occupied[slot_id] = Slot(request, remembered, streaming)
        self._mix = None

    def step(self) -> None:
        """Makes as many steps as pass between two looks at who is done."""
        self._close_up()
        slots = self.taken
        if self._mix is None:
            self._mix = Mix.of((slot_id, slot.options) for slot_id, slot in enumerate(slots))
        streams = any(slot.streaming for slot in slots)
        for _ in range(1 if streams else interval(self.decoder.device, min(slot.steps for slot in slots))):
            self._reserve(slots, self._mix)
            self._step(self.view(), self._mix)
            for slot in slots:
                slot.steps += 1 + (slot.options.gamma if slot.options.kind == SelectionMethod.SPECULATIVE else 0)

    def _step(self, view: DecodeState, mix: Mix) -> None:
        if self._graphs is None or not mix.capturable:
            self._failures += step(self.decoder, view, mix)
            return

        def captured() -> None:
            step(self.decoder, view, mix)

        self._graphs.run((view.batch, mix.beam, mix.sample), captured)

    def _reserve(self, slots: Sequence[Slot], mix: Mix) -> None:
        """Makes room for a step, doubling: its input, the ancestor of the next, and drafts."""
        limit, capacity = self.positions + mix.drafted, self.state.capacity
        # a slot whose utterance is done makes no more steps
        needed = min(max(slot.steps for slot in slots) + 2 + mix.drafted, limit)
        if needed <= capacity:
            return
        # what holds on to the old buffers goes first, so that not all of them are held twice
        self._views = {self.slots: self.state}
        if self._graphs is not None:
            self._graphs.drop()
        self.state.grow(min(max(needed, 2 * capacity), limit))

    def collect_finished(self) -> list[Outcome]:
        """Frees the slots of all that are done; returns requests with their results, on the CPU, or what failed."""
        outcomes = self._failed()
        done, ended, made = self._look()
        groups = {}
        for slot_id, slot in enumerate(self.occupied):
            if slot is None:
                continue
            if slot.options.kind == SelectionMethod.SPECULATIVE:
                slot.steps = made[slot_id]
            if slot.request.group is not None:
                groups[id(slot.request.group)] = slot.request.group
                if ended[slot_id] or done[slot_id]:
                    slot.request.group.note(slot.request, ended[slot_id] or slot.options.max_length)
        # all have noted their ends
        stops = {key: group.stop for key, group in groups.items()}
        finished: list[int] = []
        held: list[int] = []
        for slot_id, slot in enumerate(self.occupied):
            if slot is None:
                continue
            stop = stops.get(id(slot.request.group))
            if stop is not None and made[slot_id] >= stop:
                finished.append(slot_id)
            elif done[slot_id]:
                (finished if slot.request.group is None else held).append(slot_id)
        for slot_id, finished_slot in zip(finished, self._take(finished), strict=True):
            outcomes.append((finished_slot.slot.request, self._result(finished_slot, slot_id)))
        self._held += self._take(held)
        streaming = {i: slot.streaming for i, slot in enumerate(self.occupied) if slot is not None and slot.streaming}
        self._failures += send_final_tokens(self.state, streaming, self.decoder.eos_id)
        return outcomes + self._released()

    def drop(self, unwanted: Callable[[Request], bool]) -> None:
        """Frees the slots of unwanted requests."""
        self._vacate(
            [slot_id for slot_id, slot in enumerate(self.occupied) if slot is not None and unwanted(slot.request)]
        )
        self._held = [held for held in self._held if not unwanted(held.slot.request)]

    def close(self) -> None:
        """Has nothing to end; see `WorkerPool.close`."""

    def _failed(self) -> list[Outcome]:
        """Frees the slots whose callers' functions failed."""
        outcomes: list[Outcome] = []
        for slot_ids, error in self._failures:
            wrong = error if isinstance(error, Exception) else RuntimeError(f"filter_logits raised {error!r}.")
            wrong.__cause__ = None if wrong is error else error
            outcomes += [(slot.request, wrong) for slot_id in slot_ids if (slot := self.occupied[slot_id]) is not None]
            self._vacate(slot_ids)
        self._failures = []
        return outcomes

    def _look(self) -> tuple[list[bool], list[int], list[int]]:
        """Returns of the first slots: done, `ended` and tokens made, the latter two where a method asks for them."""
        count, state = len(self.occupied), self.state
        if not any(
            slot.options.kind in (SelectionMethod.REFERENCE, SelectionMethod.SPECULATIVE) for slot in self.taken
        ):
            return state.done[:count].tolist(), [0] * count, [0] * count
        found = torch.stack((state.done[:count].long(), state.ended[:count], state.lengths[:count, 0]))
        done, ended, made = found.tolist()
        return [bool(each) for each in done], ended, made

    def _take(self, slot_ids: Sequence[int]) -> list[_Finished]:
        """Frees slots; returns what their steps wrote. The keys and values of their sources are still there."""
        slots = [slot for slot in (self.occupied[slot_id] for slot_id in slot_ids) if slot is not None]
        if not slots:
            return []
        index, state = to_device(torch.tensor(slot_ids, device="cpu"), self.decoder.device), self.state
        steps = min(max(slot.steps for slot in slots), state.capacity)
        taken = {name: getattr(state, name)[index] for name in (*ROW_FIELDS, "lengths")}
        taken |= {name: getattr(state, name)[index, :steps] for name in HISTORY_FIELDS}
        rows = to_host(taken)
        self._vacate(slot_ids)
        return [
            _Finished(
                slot,
                {name: rows[name][i] for name in (*ROW_FIELDS, "lengths")},
                {name: rows[name][i] for name in HISTORY_FIELDS},
            )
            for i, slot in enumerate(slots)
        ]

    def _released(self) -> list[Outcome]:
        """Returns the results of those that were held and no longer need be."""
        outcomes: list[Outcome] = []
        still_held = []
        for held in self._held:
            group = held.slot.request.group
            if group is None or group.stop is None:
                still_held.append(held)
            else:
                outcomes.append((held.slot.request, self._result(held, None)))
        self._held = still_held
        return outcomes

    def _vacate(self, slot_ids: Sequence[int]) -> None:
        if not slot_ids:
            return
        for slot_id in slot_ids:
            self.occupied[slot_id] = None
        index, state = to_device(torch.tensor(slot_ids, device="cpu"), self.decoder.device), self.state
        state.done[index] = True
        # what is free reads next to nothing
        state.memory.lengths[index] = 0
        for half in range(2 if state.guided else 1):
            state.lengths[index + half * self.slots] = 0
        self._mix = None

    def _close_up(self) -> None:
        """Moves the last utterances into the slots that nobody has taken."""
        if None not in self.occupied:
            return
        taken = [(slot_id, slot) for slot_id, slot in enumerate(self.occupied) if slot is not None]
        vacant = [slot_id for slot_id in range(len(taken)) if self.occupied[slot_id] is None]
        # as many are after the first slots as are free among them
        for target, (origin, slot) in zip(vacant, reversed(taken), strict=False):
            self._move(slot, origin, target)
            self.occupied[target] = slot
            self.state.done[origin] = True
        del self.occupied[len(taken) :]
        self._mix = None

    def _move(self, slot: Slot, origin: int, target: int) -> None:
        written = min(slot.steps + 1, self.state.capacity)
        self.state.move(origin, target, written=written, source=slot.request.length)

    def _result(self, finished_slot: _Finished, slot_id: int | None) -> DecodingResult:
        """Returns the result of an utterance that stood in a slot, or is held, its source projected again."""
        slot, group = finished_slot.slot, finished_slot.slot.request.group
        result = backtrace(
            finished_slot.row,
            finished_slot.history,
            slot.options,
            eos_id=self.decoder.eos_id,
            pad_id=self.decoder.pad_id,
            stop=None if group is None else group.stop,
        )
        if not slot.options.aligns:
            return result
        if slot_id is None:
            memory = self.state.memory.alone(self.decoder.project(slot.memory))  # type: ignore[arg-type]
        else:
            memory = self.state.memory.part(slot_id, slot_id + 1)
        found = aligned(self.decoder, result, slot.options, memory, slot.request.length)
        # tensors of inference mode could not be written to by the caller
        with torch.inference_mode(False):
            return found.clone()
