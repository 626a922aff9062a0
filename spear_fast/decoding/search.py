"""The reference's beam search, whose rows stop together: what becomes of the logits of a step.

All of it stays on the device; the search leaves the state ready for the next step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spear_fast.decoding.decoder import Decoder
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.state import DecodeState


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


def log_probabilities(logits: Tensor, options: DecodingOptions) -> Tensor:
    """Returns `log_softmax(logits / temperature)` over the last dimension."""
    return (logits if options.temperature == 1 else logits / max(options.temperature, 1e-10)).log_softmax(dim=-1)


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
