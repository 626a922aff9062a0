"""All tensors of a batch decoded in lockstep: data only, in buffers that stay where they are between two growths.

Nothing here is moved when hypotheses change places: keys and values stay in the slot in which they were written, and
the ancestor table says for each hypothesis and position which slot that was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.decoding.decoder import Decoder, ProjectedMemory
from spear_fast.decoding.options import DecodingOptions

# positions that the buffers hold at first; they double whenever they are full
FIRST_CAPACITY = 64


@dataclass
class DecodeState:
    """B utterances with K hypotheses each; R = B, or 2·B under guidance: first with their source, then without.

    keys, values: for each layer `[R * K, kv_heads, T, head_dim]`, keys rotated. ancestors: `[R, K, T]` uint8.
    memory: cross-attention keys and values of the B utterances.
    lengths: `[R, K]` int64, inputs in the cache, and as many generated tokens: input 0 is the start.
    inputs: `[B, K]` int64, the next input. scores: `[B, K]` float, sums of log-probabilities.
    finished: `[B, K]` bool, the hypothesis holds an end of sequence. done: `[B]` bool, the utterance is frozen.
    stop: `[]` int64, the number of steps after which the whole batch may stop, -1 before that is known.
    tokens, parents, logprobs: `[T, B, K]` int32, uint8, float: what each step appended, to which hypothesis.
    """

    keys: list[Tensor]
    values: list[Tensor]
    ancestors: Tensor
    memory: ProjectedMemory
    lengths: Tensor
    inputs: Tensor
    scores: Tensor
    finished: Tensor
    done: Tensor
    stop: Tensor
    tokens: Tensor
    parents: Tensor
    logprobs: Tensor

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
        """`[B, K]` int64: tokens of each hypothesis so far, the end of sequence included."""
        return self.lengths[: self.batch]

    def reserve(self, positions: int, limit: int) -> None:
        """Makes room for `positions`, doubling up to `limit`; layer by layer, so that little is held twice."""
        if positions <= self.capacity:
            return
        capacity = max(positions, min(2 * self.capacity, limit))
        more = capacity - self.capacity
        for buffers in (self.keys, self.values):
            for i in range(len(buffers)):
                buffers[i] = F.pad(buffers[i], (0, 0, 0, more))
        self.ancestors = F.pad(self.ancestors, (0, more))
        self.tokens, self.parents, self.logprobs = (
            F.pad(history, (0, 0, 0, 0, 0, more)) for history in (self.tokens, self.parents, self.logprobs)
        )

    def keep(self, rows: Tensor) -> None:
        """Lets go of all utterances but `rows` `[b]` int64, in that order; what stays is copied, layer by layer."""
        both = torch.cat((rows, rows + self.batch)) if self.guided else rows
        slots = (both[:, None] * self.beams + torch.arange(self.beams, device=rows.device)).flatten()
        for buffers, index in (
            (self.keys, slots),
            (self.values, slots),
            (self.memory.keys, rows),
            (self.memory.values, rows),
        ):
            for i in range(len(buffers)):
                buffers[i] = buffers[i][index]
        self.memory = ProjectedMemory(self.memory.keys, self.memory.values, self.memory.lengths[rows])
        self.ancestors, self.lengths = self.ancestors[both], self.lengths[both]
        for name in ("inputs", "scores", "finished", "done"):
            setattr(self, name, getattr(self, name)[rows])
        for name in ("tokens", "parents", "logprobs"):
            setattr(self, name, getattr(self, name)[:, rows])


def new_state(decoder: Decoder, memory: ProjectedMemory, options: DecodingOptions, limit: int) -> DecodeState:
    """Returns the state before the first step. limit: most positions that will ever be needed."""
    device, batch, beams = decoder.device, memory.lengths.shape[0], options.hypotheses
    rows, capacity = batch * (2 if options.guided else 1), min(FIRST_CAPACITY, limit)
    # sums and log-probabilities of halves are kept in float32
    precise = torch.promote_types(decoder.dtype, torch.float32)
    cache = (rows * beams, decoder.kv_heads, capacity, decoder.head_dim)

    def full(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    def caches() -> list[Tensor]:
        return [torch.zeros(cache, dtype=decoder.dtype, device=device) for _ in decoder.layers]

    history, pair = (capacity, batch, beams), (batch, beams)
    scores = full(pair, 0, precise)
    if options.method == "beam":
        # all hypotheses start out the same, so that only one may have descendants
        scores[:, 1:] = -torch.inf
    return DecodeState(
        keys=caches(),
        values=caches(),
        ancestors=full((rows, beams, capacity), 0, torch.uint8),
        memory=memory,
        lengths=full((rows, beams), 0, torch.int64),
        inputs=full(pair, decoder.start_id, torch.int64),
        scores=scores,
        finished=full(pair, False, torch.bool),
        done=full((batch,), False, torch.bool),
        stop=full((), -1, torch.int64),
        tokens=full(history, 0, torch.int32),
        parents=full(history, 0, torch.uint8),
        logprobs=full(history, 0, precise),
    )
