"""Speculative decoding without loss: an early-exit head or an n-gram table drafts, the whole decoder verifies.

A row that rejects a draft simply keeps a lower length; rows of a batch accept different numbers of tokens. The layers
below the exit run once for each token: what they wrote and their hidden states serve the verification too. Without a
head the tokens are drafted that followed the last ones where those came before. (arXiv 2211.17192, 2304.04487)
"""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.packed.layout import EarlyExit
from spear_fast.decoding.packed.linear import normalize
from spear_fast.decoding.search import call_filter, slot_mask
from spear_fast.decoding.state import DecodeState
from spear_fast.decoding.step import claim_positions, early_logits, embed, guided_logits, run_layers
from spear_fast.ops.reference.candidates import draw, restrict_to_top_k, restrict_to_top_p
from spear_fast.ops.reference.philox import uniform

# the most tokens that are looked for among those before
LONGEST_NGRAM = 3


class _Draw(IntEnum):
    """What a number is drawn for: one stream each."""

    DRAFT = 0
    ACCEPT = 1
    FINAL = 2


def speculate(decoder: Decoder, state: DecodeState, options: DecodingOptions, slots: list[int]) -> None:
    """Makes one round in some slots, all of these options: `gamma` drafts, one verification, 1 to `gamma + 1` tokens.

    Needs room for `gamma + 1` more positions. The first hypothesis of a slot is decoded. The tokens are distributed as
    those of sampling; at temperature 0 they are the likeliest ones. A draw depends on the utterance's seed, its round
    and the token's position alone. Every slot of the state is computed, and only those named are written, but for
    positions that are not in use yet.
    """
    if options.drafter == "ngram":
        depth = 0
        drafts, drafted, hidden = _draft_by_ngrams(decoder, state, options)
    else:
        head = decoder.early_exit
        if head is None:
            raise ValueError("drafting by an early-exit head needs a decoder that has one, and this one has none.")
        depth = head.depth
        drafts, drafted, hidden = _draft(decoder, head, state, options)
    x = run_layers(decoder, state, hidden, range(depth, len(decoder.layers)))
    logits = guided_logits(decoder.logits(normalize(x, decoder.final_gamma)), state, options.cond_scale)[:, 0]
    steps = torch.arange(options.gamma + 1, device=logits.device)
    generated = state.generated[:, :1]
    target = _probabilities(_allowed(logits, generated + steps, decoder.eos_id, options), options)

    accepted = _accepted(state, drafts, drafted, target, options)
    # after a rejection draw from what the target has and the draft lacks; after the last draft from the target itself
    wanted, had = (_at(rows, accepted) for rows in (target, F.pad(drafted, (0, 0, 0, 1))))
    lacking = (wanted - had).clamp(min=0)
    # rounding alone can leave nothing
    weights = torch.where(lacking.sum(dim=-1, keepdim=True) > 0, lacking, wanted)
    final = _choose(state, weights, generated[:, 0] + accepted, _Draw.FINAL, options)
    tokens = torch.where(steps == accepted[:, None], final[:, None], F.pad(drafts, (0, 1)))
    _commit(decoder, state, tokens, accepted + 1, logits, options, slot_mask(state, slots) & ~state.done)


def _draft(
    decoder: Decoder, head: EarlyExit, state: DecodeState, options: DecodingOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns drafts `[U, gamma]`, distributions `[U, gamma, vocabulary]`, hidden `[R * K * (gamma + 1), dim]`."""
    tokens, distributions, hidden = [], [], []
    inputs = state.inputs
    for i in range(options.gamma + 1):
        claim_positions(state, state.lengths + i)
        x = run_layers(decoder, state, embed(decoder, state, inputs[:, :, None]), range(head.depth), first=i)
        hidden.append(x)
        if i == options.gamma:
            break
        logits = early_logits(head, state, x, options.cond_scale)[:, 0, 0]
        position = state.generated[:, 0] + i
        logits = _allowed(logits, position, decoder.eos_id, options)
        distributions.append(_probabilities(logits, options))
        tokens.append(_choose(state, distributions[-1], position, _Draw.DRAFT, options))
        inputs = tokens[-1][:, None].expand_as(state.inputs)
    return torch.stack(tokens, dim=1), torch.stack(distributions, dim=1), torch.stack(hidden, dim=1).flatten(0, 1)


def _draft_by_ngrams(decoder: Decoder, state: DecodeState, options: DecodingOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Returns drafts and all chances on them, as `_draft` does, and the inputs' embeddings, below all layers."""
    drafts = repeated(state.tokens[:, :, 0], state.generated[:, 0], options.gamma)
    for i in range(options.gamma + 1):
        claim_positions(state, state.lengths + i)
    chances = F.one_hot(drafts, decoder.vocab_size).to(torch.promote_types(decoder.dtype, torch.float32))
    inputs = torch.cat((state.inputs[:, :, None], drafts[:, None].expand(-1, state.beams, -1)), dim=2)
    return drafts, chances, embed(decoder, state, inputs)


def repeated(tokens: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Returns what followed the last tokens of each row when they came before, `[U, count]` int64.

    The longest match counts, of up to LONGEST_NGRAM tokens, and of those the latest; what lies between it and the end
    is repeated over and over. Where nothing matches, and of a row without tokens, any will do: drafts are verified.

    tokens: `[U, T]`. lengths: `[U]` int64, tokens of each row.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    last = (lengths - 1).clamp(min=0)[:, None]
    # how many tokens that end at a position are the row's last ones
    matched = torch.zeros_like(tokens, dtype=torch.int64)
    goes_on = position < last
    for i in range(LONGEST_NGRAM):
        own = tokens.gather(1, (last - i).clamp(min=0))
        goes_on = goes_on & (tokens.roll(i, dims=1) == own) & (position >= i) & (i <= last)
        matched += goes_on
    found = torch.where(position < last, matched * tokens.shape[1] + position, -1).argmax(dim=1, keepdim=True)
    steps = torch.arange(count, device=tokens.device)
    period = (last - found).clamp(min=1)
    return tokens.gather(1, (found + 1 + steps % period).minimum(last)).long()


def _accepted(state: DecodeState, drafts: Tensor, drafted: Tensor, target: Tensor, options: DecodingOptions) -> Tensor:
    """Returns `[U]` int64, drafts accepted: each with probability `min(1, target / (lenience * drafted))`."""
    wanted, had = (rows.gather(-1, drafts[..., None])[..., 0] for rows in (target[:, :-1], drafted))
    positions = state.generated[:, :1] + torch.arange(options.gamma, device=drafts.device)
    # in [0, 1): a draft that the target gives all its weight is always accepted, one that it gives none never
    numbers = _uniform(state, positions, _Draw.ACCEPT)
    return (numbers * options.lenience * had < wanted).long().cumprod(dim=-1).sum(dim=-1)


def _commit(
    decoder: Decoder,
    state: DecodeState,
    tokens: Tensor,
    count: Tensor,
    logits: Tensor,
    options: DecodingOptions,
    live: Tensor,
) -> None:
    """Appends the first `count` `[U]` of `tokens` `[U, Q]` where `live`, fewer where the sequence ends."""
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    generated = state.generated[:, :1]
    count = torch.minimum(count, options.max_length - generated[:, 0]).masked_fill(~live, 0)
    finished = state.finished[:, 0]
    if decoder.eos_id is not None:
        ended = (tokens == decoder.eos_id) & (steps < count[:, None])
        first = torch.where(ended.any(dim=-1), ended.byte().argmax(dim=-1) + 1, count)
        count = torch.minimum(count, first)
        finished = finished | ended.any(dim=-1)
    logprobs = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    written = steps < count[:, None]
    positions = generated + steps
    # what comes after a length is never read: there drafts may stand that were not accepted
    for history, new in ((state.tokens, tokens), (state.logprobs, logprobs), (state.parents, torch.zeros_like(tokens))):
        old = history[:, :, 0].gather(1, positions)
        history[:, :, 0] = history[:, :, 0].scatter(1, positions, torch.where(written, new.to(history.dtype), old))
    # where logits are NaN nothing sensible can follow
    finished = finished | (logprobs[:, 0].isnan() & live)
    state.finished[:, 0] = finished
    state.scores[:, 0] += logprobs.masked_fill(~written, 0).sum(dim=-1)
    last = tokens.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
    state.inputs[:, 0] = torch.where(count > 0, last, state.inputs[:, 0])
    state.ended += live
    state.lengths[:, 0] += count.repeat(state.lengths.shape[0] // state.batch)
    state.done |= live & (finished | (state.generated[:, 0] >= options.max_length))


def _allowed(logits: Tensor, generated: Tensor, eos_id: int | None, options: DecodingOptions) -> Tensor:
    """Returns logits with -inf where a token must not come next.

    logits: `[..., vocabulary]`, float. generated: `[...]` int64, tokens so far.
    """
    if options.min_length and eos_id is not None:
        logits = logits.clone()
        logits[..., eos_id] = logits[..., eos_id].masked_fill(generated < options.min_length, -torch.inf)
    if options.filter_logits is not None:
        logits = call_filter(options.filter_logits, logits.flatten(0, -2)).view_as(logits)
    if options.top_k is not None:
        logits = restrict_to_top_k(logits, options.top_k)
    if options.top_p is not None:
        logits = restrict_to_top_p(logits / max(options.temperature, 1e-10), options.top_p, logits)
    return logits


def _probabilities(logits: Tensor, options: DecodingOptions) -> Tensor:
    """Returns the distribution `[..., vocabulary]` of the next token; all on the first maximum at temperature 0."""
    if options.deterministic:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return (logits / options.temperature).softmax(dim=-1)


def _at(rows: Tensor, index: Tensor) -> Tensor:
    """Returns `rows[u, index[u]]` of `[U, Q, vocabulary]`."""
    return rows[torch.arange(rows.shape[0], device=rows.device), index]


def _uniform(state: DecodeState, positions: Tensor, kind: _Draw) -> Tensor:
    """Returns a number in [0, 1) for each position `[U, ...]`, float64: of the utterance's seed, round and kind."""
    shape = (-1, *(1 for _ in positions.shape[1:]))
    rounds, seeds = (each.view(shape).expand_as(positions) for each in (state.ended, state.seeds))
    return uniform((positions, torch.full_like(positions, kind), rounds, torch.ones_like(positions)), seeds)


def _choose(state: DecodeState, weights: Tensor, positions: Tensor, kind: _Draw, options: DecodingOptions) -> Tensor:
    """Returns a draw `[U]` from weights `[U, vocabulary]` for positions `[U]`, or the largest at temperature 0."""
    if options.deterministic:
        return weights.argmax(dim=-1)
    return draw(weights, _uniform(state, positions, kind))
