"""The regulariser that keeps encoder and decoder alike where training drops the condition (arXiv 2309.08773)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.losses.gather import all_gather_rows, is_distributed
from spear_fast.packing import PackedRows


def pool(states: Tensor, mask: Tensor | None, temperature: float | None) -> Tensor:
    """Returns one vector for each row, `[batch, dim]`: the maximum over its positions, or a soft one.

    states: `[batch, length, dim]`, floating point. mask: `[batch, length]`, bool, positions that count; None for all.
    temperature: of a log-sum-exp over positions, or None for the maximum.
    """
    if mask is not None:
        states = states.masked_fill(~mask[..., None], torch.finfo(states.dtype).min)
    if temperature is None:
        return states.amax(dim=1)
    return (states / temperature).logsumexp(dim=1) * temperature


def pool_packed(states: Tensor, rows: PackedRows, temperature: float | None) -> Tensor:
    """Returns what `pool` does of packed rows, of which none is empty.

    states: `[total, dim]`, or `[batch, length, dim]` where all rows are of one length.
    """
    if rows.even:
        return pool(states, None, temperature)
    lengths = rows.offsets.diff()
    row = torch.arange(rows.rows, device=states.device).repeat_interleave(lengths, output_size=rows.total)
    empty = states.new_full((rows.rows, states.shape[-1]), -torch.inf)
    scaled = states if temperature is None else states / temperature
    largest = empty.scatter_reduce(0, row[:, None].expand_as(states), scaled, "amax")
    if temperature is None:
        return largest
    largest = largest.detach()
    sums = torch.zeros_like(empty).index_add(0, row, (scaled - largest[row]).exp())
    return (sums.log() + largest) * temperature


def alignment_loss(source: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """Returns the mean squared difference between the cosine similarities among sources and among targets, [].

    From reference line 1123 on. source, target: `[batch, dim]`, floating point, each row pooled over its positions.
    rows: `[batch]`, bool, the rows that take part; those of all processes are compared with each other.
    Zero where fewer than two rows take part.
    """
    # one vector a row crosses the wire, whatever the lengths elsewhere
    pooled = [F.normalize(states.masked_fill(~rows[:, None], 0), dim=-1) for states in (source, target)]
    if is_distributed():
        pooled = [all_gather_rows(states[rows]) for states in pooled]
        rows = rows.new_ones(pooled[0].shape[0])
    # rows that take no part stay, with weight zero: to leave them out, the host would have to know their number
    pairs = rows[:, None] & rows & ~torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
    source_similarity, target_similarity = (states @ states.T for states in pooled)
    squares = (source_similarity - target_similarity).square().masked_fill(~pairs, 0)
    return squares.sum() / pairs.sum().clamp(min=1)
