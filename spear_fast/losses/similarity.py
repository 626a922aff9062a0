"""The regulariser that keeps encoder and decoder alike where training drops the condition (arXiv 2309.08773)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.losses.gather import all_gather_rows, is_distributed


def _pool(states: Tensor, mask: Tensor, temperature: float | None) -> Tensor:
    lowest = torch.finfo(states.dtype).min
    masked = states.masked_fill(~mask[..., None], lowest)
    if temperature is None:
        return masked.amax(dim=1)
    return (masked / temperature).logsumexp(dim=1) * temperature


def alignment_loss(
    source: Tensor, source_mask: Tensor, target: Tensor, target_mask: Tensor, rows: Tensor, temperature: float | None
) -> Tensor:
    """Returns the mean squared difference between the cosine similarities among sources and among targets, [].

    From reference line 1123 on. source: `[batch, source length, dim]`, target: `[batch, target length, dim]`, both
    floating point. Masks: bool, `[batch, length]`.
    rows: `[batch]`, bool, the rows that take part; those of all processes are compared with each other.
    temperature: of the log-sum-exp over positions, or None for the maximum.
    Zero where fewer than two rows take part.
    """
    # pooled before they are gathered: one vector a row crosses the wire, whatever the lengths elsewhere
    pooled = [_pool(source, source_mask, temperature), _pool(target, target_mask, temperature)]
    pooled = [F.normalize(states, dim=-1)[rows] for states in pooled]
    if is_distributed():
        pooled = [all_gather_rows(states) for states in pooled]
    count = pooled[0].shape[0]
    if count < 2:
        return (pooled[0].sum() + pooled[1].sum()) * 0.0
    source_similarity, target_similarity = (states @ states.T for states in pooled)
    apart = ~torch.eye(count, dtype=torch.bool, device=source.device)
    return F.mse_loss(source_similarity[apart], target_similarity[apart])
