"""Speculative decoding without loss: the early-exit head drafts, the whole decoder verifies.

A row that rejects a draft simply keeps a lower length; rows of a batch accept different numbers of tokens. The layers
below the exit run once for each token: what they wrote and their hidden states serve the verification too.
(arXiv 2211.17192)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.decoding.decoder import Decoder, EarlyExit
from spear_fast.decoding.linear import unit
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.sampling import allowed, probabilities
from spear_fast.decoding.state import DecodeState
from spear_fast.decoding.step import claim_slots, early_logits, embed, guided_logits, run_layers
from spear_fast.ops.reference.candidates import draw


def speculate(decoder: Decoder, state: DecodeState, options: DecodingOptions) -> None:
    """Makes one round: `gamma` drafts, one verification, between 1 and `gamma + 1` new tokens for each row.

    Needs one hypothesis for each utterance and room for `gamma + 1` more positions. The tokens are distributed as those
    of sampling; at temperature 0 they are the likeliest ones.
    """
    head = decoder.early_exit
    if head is None:
        raise ValueError("speculative decoding needs a decoder with an early-exit head, and this one has none.")
    drafts, drafted, hidden = _draft(decoder, head, state, options)
    x = run_layers(decoder, state, hidden, range(head.depth, len(decoder.layers)))
    logits = guided_logits(decoder.logits(unit(x)), state, options.cond_scale)[:, 0]
    steps = torch.arange(options.gamma + 1, device=logits.device)
    target = probabilities(allowed(logits, state.generated + steps, decoder.eos_id, options), options)

    accepted = _accepted(drafts, drafted, target, options)
    # after a rejection draw from what the target has and the draft lacks; after the last draft from the target itself
    wanted, had = (_at(rows, accepted) for rows in (target, F.pad(drafted, (0, 0, 0, 1))))
    lacking = (wanted - had).clamp(min=0)
    # rounding alone can leave nothing
    final = _choose(torch.where(lacking.sum(dim=-1, keepdim=True) > 0, lacking, wanted), options)
    tokens = torch.where(steps == accepted[:, None], final[:, None], F.pad(drafts, (0, 1)))
    _commit(decoder, state, tokens, accepted + 1, logits, options)


def _draft(
    decoder: Decoder, head: EarlyExit, state: DecodeState, options: DecodingOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns drafts `[B, gamma]`, distributions `[B, gamma, vocabulary]`, hidden states `[R * (gamma + 1), dim]`."""
    tokens, distributions, hidden = [], [], []
    inputs = state.inputs
    for i in range(options.gamma + 1):
        claim_slots(state, state.lengths + i)
        x = run_layers(decoder, state, embed(decoder, state, inputs[:, :, None]), range(head.depth), first=i)
        hidden.append(x)
        if i == options.gamma:
            break
        logits = early_logits(head, state, x, options.cond_scale)[:, 0, 0]
        logits = allowed(logits, state.generated[:, 0] + i, decoder.eos_id, options)
        distributions.append(probabilities(logits, options))
        tokens.append(_choose(distributions[-1], options))
        inputs = tokens[-1][:, None]
    return torch.stack(tokens, dim=1), torch.stack(distributions, dim=1), torch.stack(hidden, dim=1).flatten(0, 1)


def _accepted(drafts: Tensor, drafted: Tensor, target: Tensor, options: DecodingOptions) -> Tensor:
    """Returns `[B]` int64, drafts accepted: each with probability `min(1, target / (lenience * drafted))`."""
    wanted, had = (rows.gather(-1, drafts[..., None])[..., 0] for rows in (target[:, :-1], drafted))
    # in [0, 1): a draft that the target gives all its weight is always accepted, one that it gives none never
    uniform = _uniform(drafts.shape, drafts.device, options)
    return (uniform * options.lenience * had < wanted).long().cumprod(dim=-1).sum(dim=-1)


def _commit(
    decoder: Decoder, state: DecodeState, tokens: Tensor, count: Tensor, logits: Tensor, options: DecodingOptions
) -> None:
    """Appends the first `count` `[B]` of `tokens` `[B, Q]`, fewer where the sequence ends, none where it has ended."""
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    generated = state.generated
    count = torch.minimum(count, options.max_length - generated[:, 0]).masked_fill(state.done, 0)
    if decoder.eos_id is not None:
        ended = (tokens == decoder.eos_id) & (steps < count[:, None])
        first = torch.where(ended.any(dim=-1), ended.byte().argmax(dim=-1) + 1, count)
        count = torch.minimum(count, first)
        state.finished = state.finished | ended.any(dim=-1, keepdim=True)
    logprobs = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    places = (generated + steps).t()[..., None]
    state.tokens.scatter_(0, places, tokens.t()[..., None].to(state.tokens.dtype))
    state.logprobs.scatter_(0, places, logprobs.t()[..., None])
    # where logits are NaN nothing sensible can follow
    state.finished = state.finished | (logprobs[:, :1].isnan() & ~state.done[:, None])
    state.scores = state.scores + logprobs.masked_fill(steps >= count[:, None], 0).sum(dim=-1, keepdim=True)
    last = tokens.gather(1, (count - 1).clamp(min=0)[:, None])
    state.inputs = torch.where(count[:, None] > 0, last, state.inputs)
    state.lengths += (count.repeat(2) if state.guided else count)[:, None]
    state.done = state.finished[:, 0] | (state.generated[:, 0] >= options.max_length)
    state.stop = torch.where(state.done.all(), state.generated.max(), state.stop)


def _at(rows: Tensor, index: Tensor) -> Tensor:
    """Returns `rows[b, index[b]]` of `[B, Q, vocabulary]`."""
    return rows[torch.arange(rows.shape[0], device=rows.device), index]


def _uniform(shape: torch.Size, device: torch.device, options: DecodingOptions) -> Tensor:
    return torch.rand(shape, generator=options.generator, device=device, dtype=torch.float64)


def _choose(weights: Tensor, options: DecodingOptions) -> Tensor:
    """Returns a draw `[B]` from weights `[B, vocabulary]`, or the largest at temperature 0."""
    if options.deterministic:
        return weights.argmax(dim=-1)
    return draw(weights, _uniform(weights.shape[:-1], weights.device, options))
