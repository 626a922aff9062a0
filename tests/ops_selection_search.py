"""Whole searches by the selection ops over models that are tables: logits by the tokens so far."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ops_matrix import device_of
from ops_selection_inputs import Buffers, new_buffers, settings_of
from plain_selection import Ended, Tokens
from torch import Tensor

from spear_fast.ops import providers
from spear_fast.ops.selection_params import SelectionMethod


class Table:
    """Logits `[vocabulary]` for any tokens so far: random, and always the same."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.vocab, self.seed = vocab, seed
        self.known: dict[Tokens, list[float]] = {}

    def __call__(self, tokens: Tokens) -> list[float]:
        if tokens not in self.known:
            generator = torch.Generator().manual_seed(hash((self.seed, *tokens)) % 2**63)
            self.known[tokens] = (2 * torch.randn(self.vocab, generator=generator, dtype=torch.float64)).tolist()
        return self.known[tokens]


def call(op: str, provider: str, arguments: list, state: tuple[Tensor, ...]) -> None:
    """Makes a step where the provider runs; `state` lies on the CPU and is written there."""
    row = providers.get(op, provider)
    moved = [each if each is None else each.to(device_of(row)) for each in (*arguments, *state)]
    row.function(*moved)
    for old, new in zip(state, moved[len(arguments) :], strict=True):
        old.copy_(new)


def backtrace(buffers: Buffers, utterance: int, beam: int, count: int) -> Tokens:
    """The tokens of a hypothesis, by its parents."""
    found = []
    for step in reversed(range(count)):
        found.append(int(buffers.tokens[utterance, step, beam]))
        beam = int(buffers.parents[utterance, step, beam])
    return tuple(reversed(found))


def assert_addressable(buffers: Buffers, utterance: int, beam: int, tokens: Tokens) -> None:
    """The ancestor table must lead to the same tokens, one by one, and every half of it."""
    for table in buffers.ancestors[utterance :: buffers.inputs.shape[0], beam]:
        sources = table[1 : len(tokens) + 1].tolist()
        assert [int(buffers.tokens[utterance, i, source]) for i, source in enumerate(sources)] == list(tokens)


def run(
    provider: str,
    method: SelectionMethod,
    tables: list[Callable],
    rows: list[dict],
    beams: int,
    capacity: int,
    *,
    starts: list[int] | None = None,
    guided: bool = False,
    filtered: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Buffers:
    """Decodes one utterance for each table, each from its own start on, to their ends; checks the buffers on the way.

    guided: the logits are spread over a null half, so that the mix at each utterance's guidance gives the table's.
    filtered: the table's logits come as filtered ones too.
    """
    op = "beam_step" if method is SelectionMethod.BEAM else "sample_step"
    utterances, vocab = len(tables), len(tables[0](()))
    buffers = new_buffers(utterances, beams, capacity, guided=guided, precise=torch.promote_types(dtype, torch.float32))
    if method is SelectionMethod.SAMPLE:
        buffers.scores.zero_()
    settings = settings_of([{"method": method, **each} for each in rows], beams, buffers.scores.dtype)
    starts = starts or [0] * utterances
    for time in range(max(starts) + capacity):
        buffers.done |= torch.tensor([start > time for start in starts])
        buffers.done &= torch.tensor([start != time for start in starts])
        logits = torch.full((utterances, beams, vocab), 0.5, dtype=torch.float64)
        for i in range(utterances):
            for k in range(beams):
                count = int(buffers.lengths[i, k])
                if not buffers.done[i] and count < capacity:
                    tokens = backtrace(buffers, i, k, count)
                    assert_addressable(buffers, i, k, tokens)
                    logits[i, k] = torch.tensor(tables[i](tokens), dtype=torch.float64)
        scale = settings[0][:, 1].double()[:, None, None]
        null = torch.sin(17 * logits) if guided else None
        # null + (given - null) * scale is the table's again
        given = torch.where(scale == 1, logits, null + (logits - null) / scale) if guided else logits
        extra = [logits.to(dtype)] if filtered else [None] * (method is SelectionMethod.SAMPLE)
        arguments = [given.to(dtype), null if null is None else null.to(dtype), *extra, *settings]
        state = buffers.beam() if method is SelectionMethod.BEAM else buffers.sample()
        call(op, provider, arguments, state)
        if buffers.done.all() and time >= max(starts):
            break
    assert buffers.done.all()
    return buffers


def pool_of(buffers: Buffers, utterance: int, eos_id: int) -> list[Ended]:
    """The ended hypotheses of an utterance, best first."""
    found = []
    for rank, score in enumerate(buffers.pool_scores[utterance].tolist()):
        if score == -torch.inf:
            continue
        beam, count = (int(each[utterance, rank]) for each in (buffers.pool_beams, buffers.pool_ends))
        finished = bool(buffers.pool_finished[utterance, rank])
        tokens = backtrace(buffers, utterance, beam, count) + ((eos_id,) if finished else ())
        found.append(Ended(tokens, finished, score))
    return found


def logprob_sums(buffers: Buffers) -> Tensor:
    """Sums of the recorded log-probabilities `[utterances, beams]` of samplers."""
    inside = torch.arange(buffers.tokens.shape[1])[:, None] < buffers.lengths[: len(buffers.done), None]
    return (buffers.logprobs * inside).sum(dim=1)
