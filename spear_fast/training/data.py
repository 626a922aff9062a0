"""Datasets: the reference's folder of rows, and the output of `spear-fast label`; how rows become a batch."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from spear_fast.evaluation import evaluation_mode

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
    """A folder of `.pt` rows (reference data.py:22): speech ids, a delimiter, text ids; in the order of their numbers.

    Gives speech and text ids, `[n]` and `[m]`, int64. Negative ids are pads and left out.
    speech_eos_id, text_eos_id: where given, a half ends before its first end-of-sequence: the reference saved
    them, and training appends its own.

    Raises ValueError for a folder without rows, and for a row that is damaged or has no delimiter.
    """

    def __init__(
        self,
        folder: str | Path,
        delimiter_id: int = -1,
        *,
        speech_eos_id: int | None = None,
        text_eos_id: int | None = None,
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
        row = _read_row(path)
        delimiters = (row == self.delimiter_id).nonzero().flatten()
        if not len(delimiters):
            raise ValueError(f"{path} has no delimiter {self.delimiter_id}; wanted speech ids, it, text ids.")
        # pads of speech may stand before the delimiter, and look the same
        halves = (row[: delimiters[0]], row[delimiters[0] + 1 :])
        speech, text = (_until(half[half >= 0], eos_id) for half, eos_id in zip(halves, self.eos_ids, strict=True))
        return speech, text


def _read_row(path: Path) -> Tensor:
    try:
        row = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or holds more than a tensor; generate it again.") from error
    if not isinstance(row, Tensor) or row.ndim != 1 or row.is_floating_point():
        raise ValueError(f"{path} must hold one row of integers; give the folder that a generator wrote.")
    return row.long()


def _natural_order(path: Path) -> list[tuple[int, str]]:
    # digits by value, so that 10.pt comes after 9.pt
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem) if part]


def _until(ids: Tensor, eos_id: int | None) -> Tensor:
    ends = (ids == eos_id).nonzero().flatten() if eos_id is not None else ids[:0]
    return ids[: ends[0]] if len(ends) else ids


class LabelledDataset(Dataset[Pair]):
    """Speech and text ids, `[n]` and `[m]`, int64, from a folder that `spear-fast label` wrote; empty ones left out.

    min_mean_logprob: leaves out labels with a lower (or no) mean log-probability per token, in nats.
    finished_only: leaves out labels that were cut at the maximal length: they teach to stop too early.

    Raises ValueError when the folder holds no labels, or none passes; ImportError without pyarrow.
    """

    def __init__(
        self, folder: str | Path, *, min_mean_logprob: float | None = None, finished_only: bool = True
    ) -> None:
        try:
            import pyarrow.compute as compute
            import pyarrow.dataset as parquet
        except ImportError as error:
            raise ImportError("reading labels needs the package pyarrow: pip install 'spear_fast[label]'.") from error
        # folders of earlier versions hold them without data/
        found = [*Path(folder).glob("data/labels-*.parquet")] or Path(folder).glob("labels-*.parquet")
        paths = sorted(map(str, found))
        if not paths:
            raise ValueError(f"there are no labels in {folder}; give a folder that spear-fast label wrote.")
        field = compute.field
        lengths = {name: compute.list_value_length(field(name)) for name in ("source", "target")}
        wanted = (lengths["source"] > 0) & (lengths["target"] > 0)
        if finished_only:
            # null where no label has an end
            wanted &= field("finished") | field("finished").is_null()
        if min_mean_logprob is not None:
            wanted &= field("mean_logprob") >= min_mean_logprob
        # stays in Arrow's memory: lists of Python integers would take twenty times as much
        self.table = parquet.dataset(paths).to_table(columns=["source", "target"], filter=wanted)
        if not self.table.num_rows:
            raise ValueError(
                f"no label in {folder} passes the filter; lower min_mean_logprob or allow unfinished ones."
            )
        counts = [compute.list_value_length(self.table[name]).to_numpy() for name in ("source", "target")]
        # tokens of each row, `[rows]`, for batches by token budget
        self.lengths = torch.from_numpy((counts[0] + counts[1]).astype(np.int64))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, ind: int) -> Pair:
        return self._ids("source", ind), self._ids("target", ind)

    def _ids(self, name: str, index: int) -> Tensor:
        return torch.from_numpy(self.table[name][index].values.to_numpy().astype(np.int64))


class Collate:
    """Turns rows into one entry per column: ids padded at the end with that column's pad id, `[batch, length]`, int64.

    Strings stay a list, and so does raw audio, `[samples]` each: the silence of padding would become tokens too.
    """

    def __init__(self, pad_ids: Sequence[int]) -> None:
        self.pad_ids = pad_ids

    def __call__(self, rows: Sequence[Any]) -> list[Any]:
        tuples = [row if isinstance(row, (tuple, list)) else (row,) for row in rows]
        wrong = [row for row in tuples if len(row) != len(self.pad_ids)]
        if wrong:
            raise ValueError(f"the dataset must give {len(self.pad_ids)} tensors a row, got {len(wrong[0])}.")
        columns = zip(*tuples, strict=True)
        return [self._column(list(column), pad_id) for column, pad_id in zip(columns, self.pad_ids, strict=True)]

    def _column(self, column: list[Any], pad_id: int) -> Any:
        if all(isinstance(entry, str) for entry in column):
            return column
        for entry in column:
            if not isinstance(entry, Tensor) or entry.ndim != 1:
                got = list(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
                raise ValueError(f"the dataset must give tensors of shape [length], got {got}; take off other sizes.")
        kinds = {_kind(entry) for entry in column}
        if len(kinds) > 1 or None in kinds:
            types = sorted({str(entry.dtype) for entry in column})
            raise ValueError(f"the dataset must give ids of integer types or waves of float types, got {types}.")
        if kinds == {"wave"}:
            return column
        return pad_sequence([ids.long() for ids in column], batch_first=True, padding_value=pad_id)


def _kind(entry: Tensor) -> str | None:
    if entry.is_floating_point():
        return "wave"
    return None if entry.is_complex() or entry.dtype == torch.bool else "ids"


@torch.no_grad()
def speech_ids(
    speech: Any, wav2vec: nn.Module | None, device: torch.device, *, pad_id: int, input_sample_hz: int | None = None
) -> Any:
    """Returns ids `[batch, length]` of a list of waves `[samples]`, padded with `pad_id`; anything else as it is.

    Waves of one length are tokenized together. Raises ValueError without `wav2vec`.
    """
    if not isinstance(speech, list) or not isinstance(speech[0], Tensor):
        return speech
    if wav2vec is None:
        raise ValueError("the dataset gives raw audio, but there is no wav2vec module; give it ids or a wav2vec.")
    rate = {} if input_sample_hz is None else {"input_sample_hz": input_sample_hz}
    rows: list[Tensor] = [torch.empty(0)] * len(speech)
    for length in sorted({len(wave) for wave in speech}):
        alike = [row for row, wave in enumerate(speech) if len(wave) == length]
        with evaluation_mode(wav2vec):
            found = wav2vec(torch.stack([speech[row] for row in alike]).to(device), **rate)
        for row, ids in zip(alike, found, strict=True):
            rows[row] = ids.flatten()
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
