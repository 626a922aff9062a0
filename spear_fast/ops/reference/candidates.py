"""The order of candidates, the filters of sampling and the draw, in plain torch: the same to the last tie."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def best_candidates(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the `count` largest values `[..., count]`, largest first, and their indices, the lowest among equals.

    values: `[..., candidates]`, float32 or float64. NaN counts as the largest. Where there are fewer candidates the
    rest is -inf with index 0.
    """
    short = count - values.shape[-1]
    if short > 0:
        values, index = values.sort(dim=-1, descending=True, stable=True)
        return F.pad(values, (0, short), value=-torch.inf), F.pad(index, (0, short))
    if values.dtype != torch.float32:
        values, index = values.sort(dim=-1, descending=True, stable=True)
        return values[..., :count], index[..., :count]
    # topk leaves the order of equals open, so the index goes into the low half of the key; adding 0 turns -0 into 0,
    # and NaN may come with either sign
    bits = (values + 0.0).masked_fill(values.isnan(), torch.nan).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = torch.arange(values.shape[-1], device=values.device)
    keys = (ordered.to(torch.int64) << 32) - index
    index = keys.topk(count, dim=-1).indices
    return values.gather(-1, index), index


def restrict_to_top_k(logits: Tensor, count: int | Tensor) -> Tensor:
    """Returns logits `[..., vocabulary]` with all but the `count` largest at -inf, the lowest index first among equals.

    count: a number, or `[..., 1]` int64 with one for each row.
    """
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    beyond = torch.arange(logits.shape[-1], device=logits.device).expand_as(order) >= count
    return logits.masked_fill(torch.empty_like(beyond).scatter(-1, order, beyond), -torch.inf)


def restrict_to_top_p(scaled: Tensor, share: float | Tensor, logits: Tensor) -> Tensor:
    """Returns `logits` with -inf outside the smallest set of tokens that holds at least `share` of softmax(scaled).

    share: a number, or `[..., 1]` with one for each row.
    """
    ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    # what comes before a token must not hold the share already; the first always stays
    beyond = probability.cumsum(dim=-1) - probability >= share
    beyond[..., 0] = False
    return logits.masked_fill(torch.empty_like(beyond).scatter(-1, index, beyond), -torch.inf)


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
