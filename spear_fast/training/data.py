"""Datasets for training: the reference's folder of rows, the output of `spear-fast label`, and how they are batched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

Pair = tuple[Tensor, Tensor]


class MockDataset(Dataset[Tensor]):
    """`length` waves of 1,024 random samples (reference data.py:10)."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, ind: int) -> Tensor:
        return torch.randn(1024)


class GeneratedAudioTextDataset(Dataset[Pair]):
    """The reference's folder of `.pt` rows, `<speech ids> <delimiter> <text ids>`, in the order of their numbers.

    speech_eos_id, text_eos_id: where given, a half ends in front of its first end-of-sequence: the reference saved
    them, and training appends its own. Raises ValueError for a folder without rows, or a row without a delimiter.
    """

    def __init__(
        self, folder: str, delimiter_id: int = -1, *, speech_eos_id: int | None = None, text_eos_id: int | None = None
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give the folder of .pt rows that a generator wrote.")
        self.paths = sorted(self.folder.glob("*.pt"), key=_natural_order)
        if not self.paths:
            raise ValueError(f"there is no .pt row in {folder}; give the folder that a generator wrote.")
        self.delimiter_id = delimiter_id
        self.eos_ids = (speech_eos_id, text_eos_id)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, ind: int) -> Pair:
        path = self.paths[ind]
        row = torch.load(path, weights_only=True)
        delimiters = (row == self.delimiter_id).nonzero().flatten()
        if not len(delimiters):
            raise ValueError(f"{path} has no delimiter {self.delimiter_id}; wanted speech ids, it, text ids.")
        # between the first and the last stand pads of speech, which look the same
        halves = (row[: delimiters[0]], row[delimiters[-1] + 1 :])
        speech, text = (_until(half, eos_id) for half, eos_id in zip(halves, self.eos_ids, strict=True))
        return speech, text


def _natural_order(path: Path) -> list[tuple[int, str]]:
    # digits by value, so that 10.pt comes behind 9.pt
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem) if part]


def _until(ids: Tensor, eos_id: int | None) -> Tensor:
    ends = (ids == eos_id).nonzero().flatten() if eos_id is not None else ids[:0]
    return ids[: ends[0]] if len(ends) else ids


class LabelledDataset(Dataset[Pair]):
    """Speech and text ids from a folder that `spear-fast label` wrote.

    min_mean_logprob: leaves out labels with a lower mean log-probability per token, in nats.
    finished_only: leaves out labels that were cut at the maximal length.
    Raises ValueError when the folder holds no labels, or none passes.
    """

    def __init__(
        self, folder: str | Path, *, min_mean_logprob: float | None = None, finished_only: bool = True
    ) -> None:
        try:
            import pyarrow.dataset as parquet
        except ImportError as error:
            raise ValueError("reading labels needs the package pyarrow; pip install 'spear_fast[label]'.") from error
        paths = sorted(str(path) for path in Path(folder).glob("labels-*.parquet"))
        if not paths:
            raise ValueError(f"there are no labels in {folder}; give a folder that spear-fast label wrote.")
        kept = None
        if finished_only:
            kept = parquet.field("finished")
        if min_mean_logprob is not None:
            confident = parquet.field("mean_logprob") >= min_mean_logprob
            kept = confident if kept is None else kept & confident
        # stays in Arrow's memory: lists of Python integers would take twenty times as much
        self.table = parquet.dataset(paths).to_table(columns=["source", "target"], filter=kept)
        if not self.table.num_rows:
            raise ValueError(
                f"no label in {folder} passes the filter; lower min_mean_logprob or allow unfinished ones."
            )

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, ind: int) -> Pair:
        speech, text = (torch.tensor(self.table[name][ind].as_py(), dtype=torch.long) for name in ("source", "target"))
        return speech, text


class EpochShuffle(Sampler[int]):
    """Every index once an epoch, in an order that seed and epoch determine, so that a run can be gone on with."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.size, generator=generator).tolist()


class Collate:
    """Turns rows into one tensor per column, padded behind with that column's pad id.

    Raw audio stays a list of waves `[samples]`: padded, its silence would be labelled too.
    """

    def __init__(self, pad_ids: Sequence[int]) -> None:
        self.pad_ids = pad_ids

    def __call__(self, rows: Sequence[Any]) -> list[Any]:
        tuples = [row if isinstance(row, (tuple, list)) else (row,) for row in rows]
        if any(len(row) != len(self.pad_ids) for row in tuples):
            raise ValueError(f"the dataset must give {len(self.pad_ids)} tensors a row, got {len(tuples[0])}.")
        columns = zip(*tuples, strict=True)
        return [self._column(list(column), pad_id) for column, pad_id in zip(columns, self.pad_ids, strict=True)]

    def _column(self, column: list[Tensor], pad_id: int) -> Any:
        if column[0].is_floating_point():
            return column
        return pad_sequence([ids.long() for ids in column], batch_first=True, padding_value=pad_id)
