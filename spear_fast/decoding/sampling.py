"""Drawing tokens: what may be drawn, with which probability, and the draw itself."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_fast.decoding.options import DecodingOptions


def allowed(
    logits: Tensor, generated: Tensor, eos_id: int | None, options: DecodingOptions, *, banning_only: bool = False
) -> Tensor:
    """Returns logits with -inf where a token must not come next.

    logits: `[..., vocabulary]`, float. generated: `[...]` int64, tokens so far. banning_only: leave out the filters and
    only keep the end of sequence away before `min_length`.
    """
    if options.min_length and eos_id is not None:
        logits = logits.clone()
        logits[..., eos_id] = logits[..., eos_id].masked_fill(generated < options.min_length, -torch.inf)
    if banning_only:
        return logits
    if options.filter_logits is not None:
        logits = options.filter_logits(logits.flatten(0, -2)).view_as(logits)
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None:
        logits = keep_top_p(logits / max(options.temperature, 1e-10), options.top_p, logits)
    return logits


def keep_top_k(logits: Tensor, count: int) -> Tensor:
    """Returns logits `[..., vocabulary]` with all but the `count` largest at -inf."""
    values, index = logits.topk(min(count, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, values)


def keep_top_p(scaled: Tensor, share: float, logits: Tensor) -> Tensor:
    """Returns `logits` with -inf outside the smallest set of tokens that holds at least `share` of softmax(scaled)."""
    ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    # what comes before a token must not hold the share already; the first always stays
    beyond = probability.cumsum(dim=-1) - probability >= share
    beyond[..., 0] = False
    return logits.masked_fill(torch.empty_like(beyond).scatter(-1, index, beyond), -torch.inf)


def probabilities(logits: Tensor, options: DecodingOptions) -> Tensor:
    """Returns the distribution `[..., vocabulary]` of the next token; all on the first maximum at temperature 0."""
    if options.deterministic:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return (logits / options.temperature).softmax(dim=-1)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Returns the index drawn for each row, `[...]` int64, never one of weight 0.

    weights: `[..., vocabulary]`, 0 or more, of any sum above 0. uniform: `[...]` in [0, 1), one number for each row, so
    that what a row draws does not depend on the others.
    """
    cumulative = weights.to(uniform.dtype).cumsum(dim=-1)
    total = cumulative[..., -1:]
    # the first index that reaches the total bounds the draw where rounding would step over the end
    last = (cumulative < total).sum(dim=-1)
    return torch.minimum((cumulative <= uniform[..., None] * total).sum(dim=-1), last)
