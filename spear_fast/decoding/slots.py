"""The engine's buffers: a place for each utterance in flight, planned once, filled and freed one by one.

Utterances stand in the first places: where one leaves and none waits, the last one moves into its place, so that a step
works on whole buffers' beginnings and on nothing idle. With `fixed` all places take part in every step, so that a
product always has the same number of rows; under guidance it is so too, because the buffers have a second half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.decoding.decoder import Decoder, ProjectedMemory
from spear_fast.decoding.linear import rounded_rows
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.result import DecodingResult
from spear_fast.decoding.settings import Settings, first_scores
from spear_fast.ops.selection_settings import Real, Whole


@dataclass
class View:
    """The places that take part in a step; what each tensor is: `ops.beam_step`. R = U, or 2 U under guidance.

    keys, values: for each layer `[R * K, kv_heads, T, head_dim]`. memory: keys and values `[U, heads, S, head_dim]`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    memory: ProjectedMemory
    real_settings: Tensor
    whole_settings: Tensor
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
    pool_slots: Tensor
    pool_ends: Tensor
    pool_finished: Tensor
    pool_last_logprobs: Tensor
    ended: Tensor
    done: Tensor

    @property
    def batch(self) -> int:
        return self.inputs.shape[0]

    @property
    def beams(self) -> int:
        return self.inputs.shape[1]

    @property
    def guided(self) -> bool:
        return self.lengths.shape[0] > self.batch


# what is per utterance and small: moved and reset by rows
_ROWS = tuple(
    field.name for field in fields(View) if field.name not in ("keys", "values", "memory", "lengths", "ancestors")
)


class Slots:
    """Buffers for `count` utterances of `beams` hypotheses, `positions` inputs and `source` memory positions each."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        count: int,
        beams: int,
        positions: int,
        source: int,
        guided: bool = False,
        fixed: bool = False,
    ) -> None:
        self.decoder = decoder
        self.count, self.beams, self.positions, self.source, self.guided = count, beams, positions, source, guided
        self.fixed = fixed or guided
        self.used = 0
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
            real_settings=zeros(count, len(Real), dtype=precise),
            whole_settings=zeros(count, len(Whole), dtype=torch.int32),
            prefix=zeros(count, positions, dtype=torch.int32),
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
            pool_slots=zeros(count, beams, dtype=torch.int64),
            pool_ends=zeros(count, beams, dtype=torch.int64),
            pool_finished=zeros(count, beams, dtype=torch.bool),
            pool_last_logprobs=zeros(count, beams, dtype=precise),
            ended=zeros(count, dtype=torch.int64),
            done=torch.ones(count, dtype=torch.bool, device=device),
        )
        # a free place is of a kind that the ops know
        self.all.whole_settings[:, Whole.BEAM_SIZE] = 1
        self._views: dict[int, View] = {count: self.all}

    def view(self) -> View:
        """Returns the places that the next step works on."""
        used = self.count if self.fixed else self.used
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
                **{name: getattr(whole, name)[:used] for name in _ROWS},
            )
        return self._views[used]

    def admit(self, memories: Sequence[Tensor], options: Sequence[DecodingOptions], seeds: Sequence[int]) -> list[int]:
        """Gives utterances places, and returns which: the encoder's output of each, `[n, dim]`, options and seed."""
        whole, decoder, first = self.all, self.decoder, self.used
        places = list(range(first, first + len(memories)))
        self.used += len(memories)
        lengths = [len(memory) for memory in memories]
        for place, memory in zip(places, memories, strict=True):
            self._project(place, memory)
        rows = slice(first, self.used)
        whole.memory.lengths[rows] = torch.tensor(lengths, device=decoder.device)
        settings = Settings.of(options, decoder.eos_id)
        whole.real_settings[rows] = settings.reals.to(whole.real_settings)
        whole.whole_settings[rows] = settings.wholes.to(whole.whole_settings.device)
        whole.prefix[rows, : settings.prefix.shape[1]] = settings.prefix.to(whole.prefix.device)
        whole.seeds[rows] = torch.tensor(list(seeds), device=decoder.device)
        whole.inputs[rows] = decoder.start_id
        whole.scores[rows] = first_scores(settings.wholes, self.beams).to(whole.scores)
        for name in ("finished", "pool_slots", "pool_ends", "pool_finished", "pool_last_logprobs", "ended", "done"):
            getattr(whole, name)[rows] = 0
        whole.pool_scores[rows] = -torch.inf
        own = torch.arange(self.beams, dtype=torch.uint8, device=decoder.device)
        for half in range(2 if self.guided else 1):
            both = slice(half * self.count + first, half * self.count + self.used)
            whole.lengths[both] = 0
            whole.ancestors[both, :, 0] = own
        return places

    def _project(self, place: int, memory: Tensor) -> None:
        """Writes the cross-attention keys and values of an utterance, once for all of its hypotheses."""
        decoder = self.decoder
        spare = rounded_rows(len(memory)) - len(memory)
        projected = decoder.memory_key_value(F.pad(memory.to(decoder.dtype), (0, 0, 0, spare)))[: len(memory)]
        projected = projected.view(len(memory), len(decoder.layers), 2, decoder.heads, decoder.head_dim)
        for i in range(len(decoder.layers)):
            for j, buffer in enumerate((self.all.memory.keys[i], self.all.memory.values[i])):
                buffer[place, :, : len(memory)] = projected[:, i, j].transpose(0, 1)

    def release(self, places: Sequence[int]) -> dict[int, int]:
        """Frees places; returns which of the others have moved, from where to where."""
        gone, moved = set(places), {}
        for place in sorted(gone):
            while self.used - 1 in gone and self.used - 1 >= place:
                self.used -= 1
                gone.discard(self.used)
            if place >= self.used:
                break
            self._move(self.used - 1, place)
            moved[self.used - 1] = place
            gone.discard(place)
            self.used -= 1
        self.all.done[self.used :] = True
        return moved

    def _move(self, origin: int, target: int) -> None:
        whole, beams = self.all, self.beams
        for half in range(2 if self.guided else 1):
            source, goal = half * self.count + origin, half * self.count + target
            length = int(whole.lengths[source].max()) + 1
            old, new = slice(source * beams, (source + 1) * beams), slice(goal * beams, (goal + 1) * beams)
            for buffer in (*whole.keys, *whole.values):
                buffer[new, :, :length] = buffer[old, :, :length]
            whole.lengths[goal] = whole.lengths[source]
            whole.ancestors[goal] = whole.ancestors[source]
        count = int(whole.memory.lengths[origin])
        for buffer in (*whole.memory.keys, *whole.memory.values):
            buffer[target, :, :count] = buffer[origin, :, :count]
        whole.memory.lengths[target] = count
        for name in _ROWS:
            getattr(whole, name)[target] = getattr(whole, name)[origin]

    def collect(self, places: Sequence[int], options: Sequence[DecodingOptions]) -> list[DecodingResult]:
        """Returns the results of utterances that are done, on the CPU, each of one utterance."""
        index = torch.tensor(places, device=self.decoder.device)
        whole = self.all
        names = ("scores", "finished", "pool_scores", "pool_slots", "pool_ends", "pool_finished", "pool_last_logprobs")
        rows = {name: getattr(whole, name)[index].cpu().numpy() for name in names}
        rows["lengths"] = whole.lengths[index].cpu().numpy()
        steps = int(rows["lengths"].max())
        histories = {
            name: getattr(whole, name)[index, :steps].cpu().numpy() for name in ("tokens", "parents", "logprobs")
        }
        return [
            _result(
                {name: values[i] for name, values in rows.items()},
                {name: values[i] for name, values in histories.items()},
                options[i],
                self.decoder,
            )
            for i in range(len(places))
        ]


def _result(
    row: dict[str, np.ndarray], history: dict[str, np.ndarray], options: DecodingOptions, decoder: Decoder
) -> DecodingResult:
    """Returns the hypotheses of one utterance, best first. row: `[K]` each. history: `[T, K]` each."""
    count = options.num_return_sequences
    if options.method == "beam":
        scores = row["pool_scores"][:count]
        taken = scores > -np.inf
        slots, ends = row["pool_slots"][:count], np.where(taken, row["pool_ends"][:count], 0)
        finished, last = row["pool_finished"][:count] & taken, row["pool_last_logprobs"][:count]
    else:
        used = options.hypotheses
        finished = row["finished"][:used] & np.isfinite(row["scores"][:used])
        generated = row["lengths"][:used]
        scores = row["scores"][:used] / np.maximum(generated, 1) ** options.length_penalty
        order = np.argsort(-scores, kind="stable")[:count]
        slots, scores, finished = order, scores[order], finished[order]
        ends, last = generated[order] - finished, None
    widths = ends + finished
    longest = int(widths.max())
    tokens = np.full((len(ends), longest), decoder.pad_id, dtype=np.int64)
    logprobs = np.zeros((len(ends), longest), dtype=history["logprobs"].dtype)
    walked = ends if last is not None else widths
    slots = slots.copy()
    for i in reversed(range(int(walked.max()))):
        live = np.flatnonzero(i < walked)
        at = slots[live]
        tokens[live, i], logprobs[live, i] = history["tokens"][i, at], history["logprobs"][i, at]
        slots[live] = history["parents"][i, at]
    if last is not None:
        ended = np.flatnonzero(finished)
        tokens[ended, ends[ended]] = -1 if decoder.eos_id is None else decoder.eos_id
        logprobs[ended, ends[ended]] = last[ended]
    # tensors of inference mode could not be written to by the caller
    with torch.inference_mode(False):
        return DecodingResult(
            tokens=torch.from_numpy(tokens)[None],
            lengths=torch.from_numpy(np.asarray(ends, dtype=np.int64))[None],
            finished=torch.from_numpy(np.asarray(finished, dtype=bool))[None],
            scores=torch.from_numpy(np.asarray(scores, dtype=np.float32))[None],
            sum_logprobs=torch.from_numpy(logprobs.sum(axis=1).astype(np.float32))[None],
            token_logprobs=torch.from_numpy(logprobs.astype(np.float32))[None],
        )
