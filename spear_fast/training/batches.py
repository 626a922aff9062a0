"""Which rows make a batch: drawn from seed and epoch alone, so that any position in the data can be found again."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Sampler, Subset


@dataclass(frozen=True)
class Epoch(Sequence[list[int]]):
    """The batches of one epoch. order: `[rows]`, indices. bounds: `[n, 2]`, where each batch begins and ends in it."""

    order: Tensor
    bounds: Tensor

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: Any) -> Any:
        begin, end = self.bounds[index].tolist()
        return self.order[begin:end].tolist()


class BatchSampler(Sampler[list[int]]):
    """Batches of row indices; iterates over those of `epoch`, which may be set. Base of the two kinds below."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = 0

    def batches(self, epoch: int) -> Epoch:
        """Returns all batches of an epoch, the same at every call."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches(self.epoch))

    def __len__(self) -> int:
        return len(self.batches(self.epoch))

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)


class ShuffledBatchSampler(BatchSampler):
    """Batches of `batch_size` rows in random order. drop_last: leaves out a smaller one at the end."""

    def __init__(self, num_rows: int, batch_size: int, *, seed: int = 0, drop_last: bool = False) -> None:
        super().__init__(seed)
        self.num_rows, self.batch_size, self.drop_last = num_rows, batch_size, drop_last

    def batches(self, epoch: int) -> Epoch:
        order = torch.randperm(self.num_rows, generator=self._generator(epoch))
        begins = torch.arange(0, self.num_rows, self.batch_size)
        ends = (begins + self.batch_size).clamp(max=self.num_rows)
        bounds = torch.stack((begins, ends), dim=-1)
        return Epoch(order, bounds[ends - begins == self.batch_size] if self.drop_last else bounds)


class TokenBudgetBatchSampler(BatchSampler):
    """Batches of rows of about one length, as many as fit in `max_tokens`; padding is not counted.

    A row longer than that is a batch by itself. lengths: tokens of each row, `[rows]`; see `lengths_of`.
    """

    # rows whose lengths differ by less than this share may meet in a batch
    SPREAD = 0.1

    def __init__(self, lengths: Tensor | Sequence[int], max_tokens: int, *, seed: int = 0) -> None:
        super().__init__(seed)
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
        self.max_tokens = max_tokens
        self.lengths = torch.as_tensor(lengths).clamp(min=1)
        self.buckets = (self.lengths.double().log() / math.log1p(self.SPREAD)).long()

    def batches(self, epoch: int) -> Epoch:
        generator = self._generator(epoch)
        order = torch.randperm(len(self.buckets), generator=generator)
        order = order[self.buckets[order].argsort(descending=True, stable=True)]
        # tokens of all rows up to each one, itself included
        totals = self.lengths[order].cumsum(0).tolist()
        ends = [0]
        while ends[-1] < len(totals):
            before = totals[ends[-1] - 1] if ends[-1] else 0
            ends.append(max(bisect_right(totals, before + self.max_tokens), ends[-1] + 1))
        bounds = torch.tensor([ends[:-1], ends[1:]]).T
        return Epoch(order, bounds[torch.randperm(len(bounds), generator=generator)])


class EndlessBatches(Sampler[list[int]]):
    """Every `stride`-th batch of epoch after epoch, without end, from number `start` (counted over all epochs) on."""

    def __init__(self, sampler: BatchSampler, *, stride: int = 1) -> None:
        self.sampler, self.stride = sampler, stride
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        number, epoch = self.start, 0
        batches = self.sampler.batches(0)
        while True:
            while number >= len(batches):
                number, epoch = number - len(batches), epoch + 1
                batches = self.sampler.batches(epoch)
            yield batches[number]
            number += self.stride


def lengths_of(dataset: Dataset[Any]) -> Tensor:
    """Returns the tokens (of raw audio: samples) of each row, all its columns together, `[rows]`, int64.

    Taken from the dataset's own `lengths` where it has them; otherwise every row is read.
    """
    if isinstance(dataset, Subset):
        return lengths_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([lengths_of(part) for part in dataset.datasets])
    if hasattr(dataset, "lengths"):
        return torch.as_tensor(dataset.lengths)
    size: int = len(dataset)  # type: ignore[arg-type]
    rows = (dataset[index] for index in range(size))
    return torch.tensor([sum(map(len, row)) if isinstance(row, (tuple, list)) else len(row) for row in rows])


def batch_sampler(
    dataset: Dataset[Any], batch_size: int, max_tokens: int | None, *, seed: int, drop_last: bool
) -> BatchSampler:
    """Returns batches of `batch_size` rows, or by token budget where `max_tokens` is given."""
    if max_tokens is not None:
        return TokenBudgetBatchSampler(lengths_of(dataset), max_tokens, seed=seed)
    return ShuffledBatchSampler(len(dataset), batch_size, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]
