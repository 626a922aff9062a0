"""The engine's buffers: a place for each utterance in flight, planned once, filled and freed one by one.

Utterances stand in the first places: where one leaves, the next one that comes takes its place, and where none comes
the last one moves there, so that a step works on whole buffers' beginnings and on nothing idle. With `fixed` all places
take part in every step, so that a product always has the same number of rows, unless its bits do not depend on that;
under guidance it is so too, because the buffers have a second half. Where steps are recorded as graphs some free places
take part. A free place counts as done: nothing is selected there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.decoding.alignment import aligned
from spear_fast.decoding.decoder import Decoder, ProjectedMemory
from spear_fast.decoding.graphs import graphs_for, rounded_places
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.result import DecodingResult, walked_back
from spear_fast.decoding.settings import Settings, first_scores
from spear_fast.decoding.step import advance
from spear_fast.decoding.transfer import to_device, to_host
from spear_fast.decoding.view import ROWS, View
from spear_fast.ops.selection_params import FloatParam, IntParam

# positions that the buffers hold at first; they double whenever they are full
FIRST_CAPACITY = 64
# steps between two looks at who is done, where a look makes the host wait: a sixteenth of those made
SHORTEST_INTERVAL, LONGEST_INTERVAL = 4, 32


def interval(device: torch.device, made: int) -> int:
    """Returns after how many more steps to look who is done; on the CPU a look costs nothing."""
    return 1 if device.type == "cpu" else min(max(SHORTEST_INTERVAL, made // 16), LONGEST_INTERVAL)


@dataclass
class Seat:
    """A place in use. source: memory positions. made: steps, or a few more: those behind an end not yet looked at."""

    owner: Any
    options: DecodingOptions
    source: int
    made: int = 0


class Slots:
    """Buffers for `count` utterances of `beams` hypotheses, up to `limit` inputs and `source` memory positions each.

    seats: what is known of the first places; None where an utterance has left and no other has come yet.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        count: int,
        beams: int,
        limit: int,
        source: int,
        guided: bool = False,
        fixed: bool = False,
    ) -> None:
        self.decoder = decoder
        self.count, self.beams, self.limit, self.guided = count, beams, limit, guided
        self.fixed = guided or (fixed and not decoder.row_by_row)
        self.seats: list[Seat | None] = []
        # not twice for a little more
        positions = limit if limit <= 2 * FIRST_CAPACITY else FIRST_CAPACITY
        device = decoder.device
        rows = count * (2 if guided else 1)
        precise = torch.promote_types(decoder.dtype, torch.float32)

        def empty(*shape: int, dtype: torch.dtype = decoder.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # what no utterance has written is never read: pages that are not needed are never touched
        cache = (rows * beams, decoder.kv_heads, positions, decoder.head_dim)
        memory = (count, decoder.heads, source, decoder.head_dim)
        layers = range(len(decoder.layers))
        self.all = View(
            keys=[empty(*cache) for _ in layers],
            values=[empty(*cache) for _ in layers],
            memory=ProjectedMemory(
                [empty(*memory) for _ in layers],
                [empty(*memory) for _ in layers],
                zeros(count, dtype=torch.int64),
            ),
            float_params=zeros(count, len(FloatParam), dtype=precise),
            int_params=zeros(count, len(IntParam), dtype=torch.int32),
            prefix=zeros(count, limit, dtype=torch.int32),
            seeds=zeros(count, dtype=torch.int64),
            inputs=zeros(count, beams, dtype=torch.int64),
            scores=zeros(count, beams, dtype=precise),
            lengths=zeros(rows, beams, dtype=torch.int64),
            ancestors=zeros(rows, beams, positions, dtype=torch.uint8),
            tokens=zeros(count, positions, beams, dtype=torch.int32),
            parents=zeros(count, positions, beams, dtype=torch.uint8),
            logprobs=zeros(count, positions, beams, dtype=precise),
            finished=zeros(count, beams, dtype=torch.bool),
            pool_scores=zeros(count, beams, dtype=precise),
            pool_beams=zeros(count, beams, dtype=torch.int64),
            pool_ends=zeros(count, beams, dtype=torch.int64),
            pool_finished=zeros(count, beams, dtype=torch.bool),
            pool_last_logprobs=zeros(count, beams, dtype=precise),
            ended=zeros(count, dtype=torch.int64),
            done=torch.ones(count, dtype=torch.bool, device=device),
        )
        # a free place is of a kind that the ops know
        self.all.int_params[:, IntParam.BEAM_SIZE] = 1
        self._views: dict[int, View] = {count: self.all}
        self._graphs = graphs_for(device)

    @property
    def taken(self) -> list[Seat]:
        """The places in use, in order."""
        return [seat for seat in self.seats if seat is not None]

    @property
    def used(self) -> int:
        return len(self.taken)

    def view(self) -> View:
        """Returns the places that the next step works on."""
        self._close_up()
        used = self.count if self.fixed else len(self.seats)
        if self._graphs is not None:
            used = rounded_places(used, self.count)
        if used not in self._views:
            whole = self.all
            caches = used * self.beams
            self._views[used] = View(
                keys=[keys[:caches] for keys in whole.keys],
                values=[values[:caches] for values in whole.values],
                memory=ProjectedMemory(
                    [keys[:used] for keys in whole.memory.keys],
                    [values[:used] for values in whole.memory.values],
                    whole.memory.lengths[:used],
                ),
                lengths=whole.lengths[:used],
                ancestors=whole.ancestors[:used],
                **{name: getattr(whole, name)[:used] for name in ROWS},
            )
        return self._views[used]

    def proceed(self) -> None:
        """Makes as many steps as pass between two looks at who is done."""
        self._close_up()
        seats = self.taken
        for _ in range(interval(self.decoder.device, min(seat.made for seat in seats))):
            self._reserve()
            self._step(self.view(), [seat.options for seat in seats])
            for seat in seats:
                seat.made += 1

    def _step(self, view: View, options: list[DecodingOptions]) -> None:
        # a caller's own function may do what cannot be recorded
        if self._graphs is None or any(each.filter_logits is not None for each in options):
            advance(self.decoder, view, options)
            return
        searching = [each.method == "beam" for each in options]
        key = view.batch, any(searching), all(searching)
        self._graphs.run(key, lambda: advance(self.decoder, view, options))

    def _reserve(self) -> None:
        """Makes room for a step, doubling: its input, and the ancestor of the next; one buffer after the other."""
        whole = self.all
        capacity = whole.ancestors.shape[2]
        needed = min(max(seat.made for seat in self.taken) + 2, self.limit)
        if needed <= capacity:
            return
        more = min(max(needed, 2 * capacity), self.limit) - capacity
        # what holds on to the old buffers goes first, so that not all of them are held twice
        self._views = {self.count: whole}
        if self._graphs is not None:
            self._graphs.drop()
        for buffers in (whole.keys, whole.values):
            for i in range(len(buffers)):
                buffers[i] = F.pad(buffers[i], (0, 0, 0, more))
        whole.ancestors = F.pad(whole.ancestors, (0, more))
        for name in ("tokens", "parents", "logprobs"):
            setattr(whole, name, F.pad(getattr(whole, name), (0, 0, 0, more)))

    def admit(
        self,
        owners: Sequence[Any],
        memories: Sequence[Tensor],
        options: Sequence[DecodingOptions],
        seeds: Sequence[int],
    ) -> None:
        """Gives utterances places: for each its owner, the encoder's output `[n, dim]`, its options and its seed."""
        whole, decoder, device = self.all, self.decoder, self.decoder.device
        vacant = [place for place, seat in enumerate(self.seats) if seat is None]
        places = [*vacant, *range(len(self.seats), self.count)][: len(owners)]
        for place, memory in zip(places, memories, strict=True):
            self._project(place, memory)
        rows = to_device(torch.tensor(places), device)
        settings = Settings.of(options, decoder.eos_id)
        whole.memory.lengths[rows] = to_device(torch.tensor([len(memory) for memory in memories]), device)
        whole.float_params[rows] = to_device(settings.float_params.to(whole.float_params.dtype), device)
        whole.int_params[rows] = to_device(settings.int_params, device)
        whole.prefix[rows, : settings.prefix.shape[1]] = to_device(settings.prefix, device)
        whole.seeds[rows] = to_device(torch.tensor(list(seeds)), device)
        whole.inputs[rows] = decoder.start_id
        whole.scores[rows] = to_device(first_scores(settings.int_params, self.beams).to(whole.scores.dtype), device)
        for name in ("finished", "pool_beams", "pool_ends", "pool_finished", "pool_last_logprobs", "ended", "done"):
            getattr(whole, name)[rows] = 0
        whole.pool_scores[rows] = -torch.inf
        own = torch.arange(self.beams, dtype=torch.uint8, device=device)
        for half in range(2 if self.guided else 1):
            whole.lengths[rows + half * self.count] = 0
            whole.ancestors[rows + half * self.count, :, 0] = own
        self.seats += [None] * (max(places, default=-1) + 1 - len(self.seats))
        for place, owner, memory, each in zip(places, owners, memories, options, strict=True):
            self.seats[place] = Seat(owner, each, len(memory))

    def _project(self, place: int, memory: Tensor) -> None:
        """Writes the cross-attention keys and values of an utterance, once for all of its hypotheses."""
        decoder = self.decoder
        projected = decoder.memory_key_value(memory.to(decoder.dtype))
        projected = projected.view(len(memory), len(decoder.layers), 2, decoder.heads, decoder.head_dim)
        for i in range(len(decoder.layers)):
            for j, buffer in enumerate((self.all.memory.keys[i], self.all.memory.values[i])):
                buffer[place, :, : len(memory)] = projected[:, i, j].transpose(0, 1)

    def harvest(self) -> list[tuple[Any, DecodingResult]]:
        """Frees the places of all that are done; returns owners and results, each of one utterance, on the CPU."""
        done = self.all.done[: len(self.seats)].tolist()
        found = [(place, seat) for place, seat in enumerate(self.seats) if seat is not None and done[place]]
        if not found:
            return []
        places, seats = zip(*found, strict=True)
        results = self._results(places, seats)
        self._vacate(places)
        return [(seat.owner, result) for seat, result in zip(seats, results, strict=True)]

    def drop(self, unwanted: Callable[[Any], bool]) -> None:
        """Frees the places of unwanted owners."""
        self._vacate([place for place, seat in enumerate(self.seats) if seat is not None and unwanted(seat.owner)])

    def _vacate(self, places: Sequence[int]) -> None:
        for place in places:
            self.seats[place] = None
            self.all.done[place] = True

    def _close_up(self) -> None:
        """Moves the last utterances into the places that nobody has taken."""
        if None not in self.seats:
            return
        seated = [(place, seat) for place, seat in enumerate(self.seats) if seat is not None]
        vacant = [place for place in range(len(seated)) if self.seats[place] is None]
        # as many are behind the first places as are free among them
        for target, (origin, seat) in zip(vacant, reversed(seated), strict=False):
            self._move(seat, origin, target)
            self.seats[target] = seat
            self.all.done[origin] = True
        del self.seats[len(seated) :]

    def _move(self, seat: Seat, origin: int, target: int) -> None:
        whole, beams = self.all, self.beams
        written = min(seat.made + 1, self.limit)
        for half in range(2 if self.guided else 1):
            source, goal = half * self.count + origin, half * self.count + target
            old, new = slice(source * beams, (source + 1) * beams), slice(goal * beams, (goal + 1) * beams)
            for buffer in (*whole.keys, *whole.values):
                buffer[new, :, :written] = buffer[old, :, :written]
            whole.lengths[goal] = whole.lengths[source]
            whole.ancestors[goal] = whole.ancestors[source]
        for buffer in (*whole.memory.keys, *whole.memory.values):
            buffer[target, :, : seat.source] = buffer[origin, :, : seat.source]
        whole.memory.lengths[target] = whole.memory.lengths[origin]
        for name in ROWS:
            getattr(whole, name)[target] = getattr(whole, name)[origin]

    def _results(self, places: Sequence[int], seats: Sequence[Seat]) -> list[DecodingResult]:
        index, whole = to_device(torch.tensor(places), self.decoder.device), self.all
        names = ("scores", "finished", "pool_scores", "pool_beams", "pool_ends", "pool_finished", "pool_last_logprobs")
        histories = ("tokens", "parents", "logprobs")
        steps = max(seat.made for seat in seats)
        taken = {name: getattr(whole, name)[index] for name in (*names, "lengths")}
        taken |= {name: getattr(whole, name)[index, :steps] for name in histories}
        rows = to_host(taken)
        results = [
            walked_back(
                {name: values[i] for name, values in rows.items()},
                {name: rows[name][i] for name in histories},
                seat.options,
                eos_id=self.decoder.eos_id,
                pad_id=self.decoder.pad_id,
            )
            for i, seat in enumerate(seats)
        ]
        each = zip(places, seats, results, strict=True)
        return [self._aligned(place, seat, result) for place, seat, result in each]

    def _aligned(self, place: int, seat: Seat, result: DecodingResult) -> DecodingResult:
        memory = self.all.memory
        if not seat.options.aligns:
            return result
        keys, values = ([each[place : place + 1] for each in buffers] for buffers in (memory.keys, memory.values))
        found = aligned(self.decoder, result, seat.options, keys, values, seat.source)
        # tensors of inference mode could not be written to by the caller
        with torch.inference_mode(False):
            return found.clone()
