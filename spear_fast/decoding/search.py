"""What becomes of the logits of a step: greedy, sampling, and the two beam searches.

Each function takes the state behind a step and the step's logits, chooses tokens, and leaves the state ready for the
next step. All of it stays on the device: lengths and ends are tensors, and an utterance that is done stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.decoding.decoder import Decoder
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.sampling import allowed, draw, probabilities
from spear_fast.decoding.state import DecodeState

Select = Callable[[Decoder, DecodeState, Tensor, DecodingOptions], None]


def selection(options: DecodingOptions) -> Select:
    """Returns the function that `options` ask for; not for speculative decoding."""
    if options.method != "beam":
        return select_one
    return select_reference_beam if options.beam_mode == "reference" else select_standard_beam


def select_one(decoder: Decoder, state: DecodeState, logits: Tensor, options: DecodingOptions) -> None:
    """Appends one token to every hypothesis: the likeliest or a draw.

    logits: `[B, K, vocabulary]`. Log-probabilities are the model's, before filters and temperature.
    """
    filtered = allowed(logits, state.generated, decoder.eos_id, options)
    if options.deterministic:
        chosen = filtered.argmax(dim=-1)
    else:
        uniform = torch.rand(state.inputs.shape, generator=options.generator, device=logits.device, dtype=torch.float64)
        chosen = draw(probabilities(filtered, options), uniform)
    logprobs = logits.log_softmax(dim=-1).gather(-1, chosen[..., None])[..., 0]
    live = ~state.finished
    _record(state, chosen, None, logprobs)
    state.inputs = chosen
    # where logits are NaN nothing sensible can follow
    ends = logprobs.isnan() if decoder.eos_id is None else (chosen == decoder.eos_id) | logprobs.isnan()
    state.finished = state.finished | ends
    state.scores = torch.where(live, state.scores + logprobs, state.scores)
    state.lengths += live if not state.guided else torch.cat((live, live))
    state.done = state.finished.all(dim=-1)
    _stop_when(state, state.done.all())


def select_reference_beam(decoder: Decoder, state: DecodeState, logits: Tensor, options: DecodingOptions) -> None:
    """The reference's search (its lines 722 to 794): K candidates of each beam, the best K of those; past the end too.

    logits: `[B, K, vocabulary]`.
    """
    _, beams, vocab = logits.shape
    logprobs = log_probabilities(logits, options)
    width = min(beams, vocab)
    best, ids = logprobs.topk(width, dim=-1)
    totals = (state.scores[:, :, None] + best).flatten(1)
    order = totals.sort(dim=-1, descending=True, stable=True).indices[:, :beams]
    parents = order // width
    chosen = ids.flatten(1).gather(1, order)
    state.scores = totals.gather(1, order)
    _record(state, chosen, parents, best.flatten(1).gather(1, order))
    _follow(state, parents)
    state.inputs = chosen
    state.lengths += 1
    if decoder.eos_id is not None:
        state.finished = state.finished.gather(1, parents) | (chosen == decoder.eos_id)
    _stop_when(state, (state.finished | state.scores.isnan()).all())


def select_standard_beam(decoder: Decoder, state: DecodeState, logits: Tensor, options: DecodingOptions) -> None:
    """Beam search with a pool of ended hypotheses.

    Of the best 2K candidates, those among the first K that end enter the pool, and the best K that do not end go on.
    A hypothesis that reaches `max_length` competes for the pool as well, unfinished. Ties go to the lower beam and id.
    logits: `[B, K, vocabulary]`.
    """
    _, beams, vocab = logits.shape
    logprobs = log_probabilities(logits, options)
    ranked = allowed(logprobs, state.generated, decoder.eos_id, options, banning_only=True)
    values, index = best_candidates((state.scores[:, :, None] + ranked).flatten(1), 2 * beams)
    parents, chosen = index // vocab, index % vocab
    chosen_logprobs = logprobs.flatten(1).gather(1, index)
    length = state.generated[:, :1] + 1
    ends = chosen == decoder.eos_id if decoder.eos_id is not None else torch.zeros_like(chosen, dtype=torch.bool)
    scale = length.to(values.dtype) ** options.length_penalty

    # a stable sort of the flag keeps the order by score within those that go on
    goes_on = ends.to(torch.uint8).sort(dim=-1, stable=True).indices[:, :beams]
    running = values.masked_fill(ends, -torch.inf).gather(1, goes_on)
    limit = length >= options.max_length

    may_enter = ends & ~state.done[:, None]
    may_enter[:, beams:] = False
    _enter_pool(
        state,
        torch.cat((
            (values / scale).masked_fill(~may_enter, -torch.inf),
            (running / scale).masked_fill(~(limit & ~state.done[:, None]), -torch.inf),
        ), dim=1),
        slots=torch.cat((parents, _slots(state)), dim=1),
        ends=torch.cat(((length - 1).expand(-1, 2 * beams), length.expand(-1, beams)), dim=1),
        finished=torch.cat((ends, torch.zeros_like(running, dtype=torch.bool)), dim=1),
        last_logprobs=torch.cat((chosen_logprobs, torch.zeros_like(running)), dim=1),
    )  # fmt: skip

    parents, chosen = parents.gather(1, goes_on), chosen.gather(1, goes_on)
    _record(state, chosen, parents, chosen_logprobs.gather(1, goes_on))
    _follow(state, parents)
    state.inputs, state.scores = chosen, running
    state.lengths += (~state.done if not state.guided else (~state.done).repeat(2))[:, None]
    state.done = state.done | limit[:, 0] | _cannot_improve(state, running, length, options)
    _stop_when(state, state.done.all())


def _cannot_improve(state: DecodeState, running: Tensor, length: Tensor, options: DecodingOptions) -> Tensor:
    """Returns `[B]` bool: the pool is full and, by `early_stopping`, no hypothesis that goes on will still enter it."""
    assert state.pool is not None
    worst = state.pool.scores[:, -1]
    full = worst > -torch.inf
    # true of NaN too
    nothing_left = ~(running[:, 0] > -torch.inf)
    if options.early_stopping is True:
        return full | nothing_left
    if options.early_stopping == "never" and options.length_penalty > 0:
        # sums are negative: the longest hypothesis divides by most
        length = torch.full_like(length, options.max_length)
    best = running[:, 0] / length[:, 0].to(running.dtype) ** options.length_penalty
    return (full & (best <= worst)) | nothing_left


def _enter_pool(state: DecodeState, scores: Tensor, **entries: Tensor) -> None:
    """Merges candidates into the pool: the best K stay, the earlier one at equal scores."""
    pool = state.pool
    assert pool is not None
    merged = torch.cat((pool.scores, scores), dim=1)
    pool.scores, order = merged.sort(dim=-1, descending=True, stable=True)
    pool.scores, order = pool.scores[:, : state.beams], order[:, : state.beams]
    for name, entry in entries.items():
        setattr(pool, name, torch.cat((getattr(pool, name), entry), dim=1).gather(1, order))


def log_probabilities(logits: Tensor, options: DecodingOptions) -> Tensor:
    """Returns `log_softmax(logits / temperature)` over the last dimension."""
    return (logits if options.temperature == 1 else logits / max(options.temperature, 1e-10)).log_softmax(dim=-1)


def best_candidates(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the `count` largest values `[B, count]`, largest first, and their indices, the lowest first among equals.

    values: `[B, candidates]`, float32 or float64. Where there are fewer candidates the rest is -inf with index 0.
    """
    short = count - values.shape[-1]
    if short > 0:
        values, index = values.sort(dim=-1, descending=True, stable=True)
        return F.pad(values, (0, short), value=-torch.inf), F.pad(index, (0, short))
    if values.dtype != torch.float32:
        values, index = values.sort(dim=-1, descending=True, stable=True)
        return values[:, :count], index[:, :count]
    # topk leaves the order of equals open, so the index goes into the low half of the key; adding 0 turns -0 into 0
    bits = (values + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = torch.arange(values.shape[-1], device=values.device)
    keys = (ordered.to(torch.int64) << 32) - index
    index = keys.topk(count, dim=-1).indices
    return values.gather(-1, index), index


def _slots(state: DecodeState) -> Tensor:
    return torch.arange(state.beams, device=state.inputs.device).expand(state.batch, -1)


def _record(state: DecodeState, tokens: Tensor, parents: Tensor | None, logprobs: Tensor) -> None:
    """Writes what a step chose, `[B, K]` each, at the place of each hypothesis' next token."""
    place = state.generated[None]
    state.tokens.scatter_(0, place, tokens[None].to(state.tokens.dtype))
    state.logprobs.scatter_(0, place, logprobs[None])
    if parents is None:
        parents = _slots(state)
    state.parents.scatter_(0, place, parents[None].to(state.parents.dtype))


def _follow(state: DecodeState, parents: Tensor) -> None:
    """Lets each hypothesis read the positions of its parent: rows of bytes move, keys and values stay."""
    rows = parents + torch.arange(state.batch, device=parents.device)[:, None] * state.beams
    if state.guided:
        rows = torch.cat((rows, rows + state.batch * state.beams))
    table = state.ancestors.flatten(0, 1)
    table.copy_(table[rows.flatten()])


def _stop_when(state: DecodeState, holds: Tensor) -> None:
    """Notes the number of steps, all hypotheses of a lockstep batch having as many, the first time that `holds`."""
    steps = state.generated.max()
    state.stop = torch.where((state.stop < 0) & holds, steps, state.stop)
