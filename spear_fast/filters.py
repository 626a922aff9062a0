"""The reference's filters of logits, by their names there (lines 113 and 121)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top_k(logits: Tensor, thres: float = 0.1, k: int | None = None) -> Tensor:
    """Returns logits with all but the `k` largest at -inf (reference line 121); of equal ones any are taken.

    logits: `[..., vocabulary]`, floating point. k: by default `ceil(thres * vocabulary)`.
    """
    if k is None:
        k = math.ceil(thres * logits.shape[-1])
    values, indices = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values)


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Returns logits with -inf outside the smallest set whose probability passes `thres` (reference line 113).

    logits: `[..., vocabulary]`, floating point. thres: in [0, 1]; the most probable token always stays.
    """
    ordered, indices = logits.sort(dim=-1, descending=True)
    cumulative = ordered.softmax(dim=-1).cumsum(dim=-1)
    beyond = torch.cat(
        (torch.zeros_like(cumulative[..., :1], dtype=torch.bool), (cumulative > thres)[..., :-1]), dim=-1
    )
    return torch.empty_like(logits).scatter(-1, indices, ordered.masked_fill(beyond, -torch.inf))
