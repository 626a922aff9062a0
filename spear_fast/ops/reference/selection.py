"""Selection of the next tokens, in plain torch. Nothing is read back from a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spear_fast.ops.arguments import takes
from spear_fast.ops.reference.candidates import best_candidates, draw, restrict_to_top_k, restrict_to_top_p
from spear_fast.ops.reference.philox import uniform
from spear_fast.ops.reference.ranges import check_selection
from spear_fast.ops.reference.restrictions import column, mixed, own_history, restricted
from spear_fast.ops.selection_params import COLDEST, EarlyStopping, FloatParam, IntParam, SelectionMethod
from spear_fast.ops.selection_state import BeamState, SampleState


@dataclass
class _Pool:
    """`[utterances, beams]` each: scores float, beams and ends int64, finished bool, last_logprobs float."""

    scores: Tensor
    beams: Tensor
    ends: Tensor
    finished: Tensor
    last_logprobs: Tensor


@takes(BeamState)
def beam_step(logits: Tensor, null_logits: Tensor | None, state: BeamState) -> None:
    utterances, beams, vocab = logits.shape
    float_params, int_params = state.float_params, state.int_params
    live = ~state.done & (int_params[:, IntParam.METHOD] == SelectionMethod.BEAM)
    if not utterances:
        return
    size = column(int_params, IntParam.BEAM_SIZE, 2)
    steps = state.lengths[:utterances, :1].masked_fill(~live[:, None], 0)
    check_selection("beam_step", logits, live, int_params, state.prefix, steps, state.tokens)
    rank = torch.arange(2 * beams, device=logits.device)
    beam = rank[:beams]
    used = beam < size

    scaled = mixed(logits, null_logits, float_params) / column(float_params, FloatParam.TEMPERATURE).clamp(min=COLDEST)
    likely = scaled.log_softmax(dim=-1)
    each = steps.expand(-1, beams)
    history = own_history(state.tokens, state.ancestors[:utterances], each)
    ranked = restricted(likely, history, each, float_params, int_params, state.prefix)
    ranked = (state.scores[..., None] + ranked).masked_fill(~used[..., None], -torch.inf)
    values, index = best_candidates(ranked.flatten(1), 2 * beams)
    # where the vocabulary has too few candidates, those of no beam come last
    index = index.masked_fill(index >= size * vocab, 0)
    origins, chosen = index // vocab, index % vocab
    chosen_logprobs = likely.flatten(1).gather(1, index)

    eos = column(int_params, IntParam.EOS_ID, 2)
    ends = (chosen == eos) & (eos >= 0)
    # a stable sort keeps the order by score within those that go on; then come those that end, then the superfluous
    order = torch.where(rank < 2 * size, ends.to(torch.uint8), 2)
    goes_on = order.sort(dim=-1, stable=True).indices[:, :beams]
    running = values.masked_fill(ends, -torch.inf).gather(1, goes_on)

    length = steps + 1
    limit = length >= column(int_params, IntParam.MAX_LENGTH, 2)
    counted = _counted(length, float_params, int_params)
    enters = torch.cat((ends & (rank < size) & live[:, None], limit & used & live[:, None]), dim=1)
    totals = torch.cat((values, running), dim=1)
    enters = enters & ~(totals == -torch.inf)
    pool = _Pool(state.pool_scores, state.pool_beams, state.pool_ends, state.pool_finished, state.pool_last_logprobs)
    _enter(
        pool,
        (totals / counted).masked_fill(~enters, -torch.inf),
        used & live[:, None],
        beams=torch.cat((origins, beam.expand(utterances, -1)), dim=1),
        ends=torch.cat(((length - 1).expand(-1, 2 * beams), length.expand(-1, beams)), dim=1),
        finished=torch.cat((ends, torch.zeros_like(used)), dim=1),
        last_logprobs=torch.cat((chosen_logprobs, torch.zeros_like(running)), dim=1),
    )
    state.ended.add_(enters.sum(dim=1))

    origins, chosen = origins.gather(1, goes_on), chosen.gather(1, goes_on)
    written = used & live[:, None]
    for history, new in (
        (state.tokens, chosen),
        (state.parents, origins),
        (state.logprobs, chosen_logprobs.gather(1, goes_on)),
    ):
        record_step(history, each, new, written)
    follow_parents(state.ancestors, origins, steps, written)
    state.inputs.copy_(torch.where(written, chosen, state.inputs))
    state.scores.copy_(torch.where(written, running, state.scores))
    state.lengths.add_(written.repeat(state.lengths.shape[0] // utterances, 1))
    over = limit[:, 0] | _cannot_improve(pool, running[:, :1], length, state.ended, float_params, int_params)
    state.done.logical_or_(live & over)


@takes(SampleState)
def sample_step(logits: Tensor, null_logits: Tensor | None, filtered: Tensor | None, state: SampleState) -> None:
    utterances, beams, _ = logits.shape
    float_params, int_params = state.float_params, state.int_params
    live = ~state.done & (int_params[:, IntParam.METHOD] == SelectionMethod.SAMPLE)
    if not utterances:
        return
    beam = torch.arange(beams, device=logits.device)
    used = beam < column(int_params, IntParam.BEAM_SIZE, 2)
    written = used & ~state.finished & live[:, None]
    steps = state.lengths[:utterances].masked_fill(~written, 0)
    check_selection("sample_step", logits, live, int_params, state.prefix, steps, state.tokens)

    exact = mixed(logits, null_logits, float_params)
    history = own_history(state.tokens, beam.to(torch.uint8)[:, None].expand_as(state.ancestors[:utterances]), steps)
    allowed = exact if filtered is None else filtered.to(exact.dtype)
    allowed = restricted(allowed, history, steps, float_params, int_params, state.prefix)
    chosen = _chosen(allowed, steps, state.seeds, float_params, int_params)
    chosen_logprobs = exact.log_softmax(dim=-1).gather(-1, chosen[..., None])[..., 0]
    nothing_left = (allowed == -torch.inf).all(dim=-1)
    chosen_logprobs = chosen_logprobs.masked_fill(nothing_left, -torch.inf)

    parents = beam.expand_as(chosen)
    for history, new in ((state.tokens, chosen), (state.parents, parents), (state.logprobs, chosen_logprobs)):
        record_step(history, steps, new, written)
    next_position = torch.arange(state.ancestors.shape[2], device=beam.device) == steps[..., None] + 1
    table = state.ancestors.view(-1, *state.tokens.shape[::2], state.ancestors.shape[2])
    table.copy_(torch.where(next_position & written[..., None], beam[:, None].to(torch.uint8), table))
    given = steps < column(int_params, IntParam.PREFIX_LENGTH, 2)
    state.inputs.copy_(torch.where(written, chosen, state.inputs))
    state.scores.copy_(torch.where(written & ~given, state.scores + chosen_logprobs, state.scores))
    state.lengths.add_(written.repeat(state.lengths.shape[0] // utterances, 1))
    eos = column(int_params, IntParam.EOS_ID, 2)
    # where logits are NaN, or nothing may come, nothing sensible can follow
    ends = ((chosen == eos) & (eos >= 0)) | ~(chosen_logprobs > -torch.inf)
    state.finished.logical_or_(written & ends)
    at_limit = state.lengths[:utterances] >= column(int_params, IntParam.MAX_LENGTH, 2)
    state.done.logical_or_(live & (state.finished | at_limit | ~used).all(dim=-1))


def _chosen(allowed: Tensor, steps: Tensor, seeds: Tensor, float_params: Tensor, int_params: Tensor) -> Tensor:
    """Returns the token of each hypothesis `[utterances, beams]`, int64: the likeliest, or a draw."""
    best = allowed.argmax(dim=-1)
    top_k, top_p = column(int_params, IntParam.TOP_K).long(), column(float_params, FloatParam.TOP_P)
    temperature = column(float_params, FloatParam.TEMPERATURE)
    kept = restrict_to_top_k(allowed, torch.where(top_k > 0, top_k, allowed.shape[-1]))
    scaled = kept / temperature.clamp(min=COLDEST)
    weights = restrict_to_top_p(scaled, torch.where(top_p < 1, top_p, torch.inf), scaled).softmax(dim=-1)
    drawn = draw(weights, uniform_numbers(seeds, steps))
    sensible = weights.sum(dim=-1) > 0
    return torch.where(sensible & (temperature[..., 0] > COLDEST), drawn, best)


def uniform_numbers(seeds: Tensor, steps: Tensor) -> Tensor:
    """Returns a number in [0, 1) for each hypothesis, `[utterances, beams]` float64 of 53 bits.

    seeds: `[utterances]`, int64, Philox' key. steps: `[utterances, beams]`, int64; the counter is (step, beam, 0, 0).
    """
    beam = torch.arange(steps.shape[1], device=steps.device).expand_as(steps)
    zero = torch.zeros_like(steps)
    return uniform((steps, beam, zero, zero), seeds[:, None].expand_as(steps))


def _counted(length: Tensor, float_params: Tensor, int_params: Tensor) -> Tensor:
    """Returns what divides a score of `length` tokens, `[utterances, 1]`; those of the prefix do not count."""
    counted = (length - column(int_params, IntParam.PREFIX_LENGTH, 2)).clamp(min=1)
    return counted.to(float_params.dtype) ** column(float_params, FloatParam.LENGTH_PENALTY, 2)


def _cannot_improve(
    pool: _Pool, best: Tensor, length: Tensor, ended: Tensor, float_params: Tensor, int_params: Tensor
) -> Tensor:
    """Returns `[utterances]` bool: enough have ended and, by early stopping, no other will still enter the pool."""
    size = column(int_params, IntParam.BEAM_SIZE, 2)
    worst = pool.scores.gather(1, size.long() - 1)
    enough = ended[:, None] >= _enough(size, float_params)
    mode = column(int_params, IntParam.EARLY_STOPPING, 2)
    # sums are negative: where the penalty is positive, the longest hypothesis divides by most
    longest = (mode == EarlyStopping.NEVER) & (column(float_params, FloatParam.LENGTH_PENALTY, 2) > 0)
    length = torch.where(longest, column(int_params, IntParam.MAX_LENGTH, 2), length)
    beaten = best / _counted(length, float_params, int_params) <= worst
    # true of NaN too
    nothing_left = ~(best > -torch.inf)
    return ((enough & (beaten | (mode == EarlyStopping.AT_ONCE))) | nothing_left)[:, 0]


def _enough(size: Tensor, float_params: Tensor) -> Tensor:
    """Returns how many hypotheses must have ended, `[utterances, 1]`: patience times the beam, halves rounded up."""
    return (size * column(float_params, FloatParam.PATIENCE, 2) + 0.5).floor().clamp(min=1)


def _enter(pool: _Pool, scores: Tensor, written: Tensor, **entries: Tensor) -> None:
    """Merges candidates into the pool, in place: the best stay, the earlier one at equal scores."""
    beams = written.shape[1]
    merged, order = torch.cat((pool.scores, scores), dim=1).sort(dim=-1, descending=True, stable=True)
    order = order[:, :beams]
    for name, entry in entries.items():
        kept = getattr(pool, name)
        kept.copy_(torch.where(written, torch.cat((kept, entry), dim=1).gather(1, order), kept))
    pool.scores.copy_(torch.where(written, merged[:, :beams], pool.scores))


def record_step(history: Tensor, steps: Tensor, new: Tensor, written: Tensor) -> None:
    """Writes what a step chose, `[utterances, beams]`, as the next step of `[utterances, capacity, beams]`."""
    step = steps[:, None]
    old = history.gather(1, step)
    history.scatter_(1, step, torch.where(written[:, None], new[:, None].to(history.dtype), old))


def follow_parents(ancestors: Tensor, origins: Tensor, steps: Tensor, written: Tensor) -> None:
    """Lets each hypothesis read the positions of its origin, and the next position from its own beam index."""
    utterances, beams = origins.shape
    table = ancestors.view(-1, utterances, beams, ancestors.shape[2])
    position = torch.arange(ancestors.shape[2], device=ancestors.device)
    inherited = table.gather(2, origins[None, :, :, None].expand_as(table))
    own = torch.arange(beams, device=ancestors.device)[:, None].to(torch.uint8)
    new = torch.where(position < steps[..., None], inherited, table)
    # the newest input of each origin stands under its own beam index
    new = torch.where(position == steps[..., None], origins[..., None].to(torch.uint8), new)
    new = torch.where(position == steps[..., None] + 1, own, new)
    table.copy_(torch.where(written[..., None], new, table))
