"""Collectives with gradients, for losses that compare rows across processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Returns whether more than one process trains together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # type: ignore[override]
        count = torch.tensor([rows.shape[0]], device=rows.device)
        counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, count)
        ctx.sizes = [int(size) for size in counts]
        # collectives want one size everywhere
        padded = rows.new_zeros(max(ctx.sizes), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        gathered = [torch.empty_like(padded) for _ in ctx.sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.split(ctx.sizes)[dist.get_rank()]


def all_gather_rows(rows: Tensor) -> Tensor:
    """Returns the rows of all processes in the order of their ranks, `[total, ...]`; alone, `rows` as they are.

    rows: `[n, ...]`, where n may differ between processes and may be 0.
    Its gradient is summed over processes, so that averaging parameter gradients, as DistributedDataParallel does,
    gives those of one process over the whole batch. Every process must call it.
    """
    return _AllGatherRows.apply(rows) if is_distributed() else rows  # type: ignore[no-any-return]


def all_gather(t: Tensor, dim: int = 0, sizes: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Returns the tensors of all processes joined along `dim`, and their sizes there; alone, `t` and None.

    The reference's name, with the result of its `AllGather` (reference distributed.py:36).
    sizes: `[processes]`, taken for its signature; they are asked for anyway.
    """
    if not is_distributed():
        return t, None
    gathered = all_gather_rows(t.movedim(dim, 0)).movedim(0, dim)
    count = torch.tensor([t.shape[dim]], device=t.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    return gathered, torch.cat(counts)
