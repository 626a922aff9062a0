"""Cross-entropy of tied-embedding logits in plain torch, some rows at a time; logits are float32 at least."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.ops.reference.ranges import check_range

# logits that are held at once
CHUNK = 1 << 22


def check_labels(labels: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raises ValueError where a label is neither an id of the vocabulary nor ignored, where looking is free."""
    advice = f"pass ids of the vocabulary, or {ignore_index} for what is ignored"
    check_range("cross_entropy", "labels", labels.masked_fill(labels == ignore_index, 0), vocab_size - 1, advice)


def _chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    size = max(1, CHUNK // vocab_size)
    return (slice(start, start + size) for start in range(0, max(rows, 1), size))


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    check_labels(labels, weight.shape[0], ignore_index)
    precision = torch.promote_types(torch.float32, hidden.dtype)
    matrix = weight.to(precision)
    losses, sums = [], []
    for part in _chunks(hidden.shape[0], weight.shape[0]):
        logits = F.linear(hidden[part].to(precision), matrix)
        ignored = labels[part] == ignore_index
        picked = logits.gather(-1, labels[part].masked_fill(ignored, 0)[:, None])[:, 0]
        largest = logits.amax(-1)
        rest = (logits - largest[:, None]).exp().sum(-1).log()
        # large logits cancel before the small rest is added
        losses.append((largest - picked + rest).masked_fill(ignored, 0))
        sums.append(largest + rest)
    return torch.cat(losses), torch.cat(sums)


def cross_entropy_backward(
    grad_losses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    check_labels(labels, weight.shape[0], ignore_index)
    precision = lse.dtype
    matrix = weight.to(precision)
    grad_hidden, grad_weight = [], torch.zeros_like(matrix, memory_format=torch.contiguous_format)
    for part in _chunks(hidden.shape[0], weight.shape[0]):
        rows = hidden[part].to(precision)
        ignored = labels[part] == ignore_index
        share = (F.linear(rows, matrix) - lse[part, None]).exp()
        share[torch.arange(rows.shape[0], device=rows.device), labels[part].masked_fill(ignored, 0)] -= 1
        share *= grad_losses[part].masked_fill(ignored, 0)[:, None]
        grad_hidden.append((share @ matrix).to(hidden.dtype))
        grad_weight += share.mT @ rows
    return torch.cat(grad_hidden), grad_weight.to(weight.dtype)
