"""Batches without padding: the tokens of all rows one after the other, and which of them attention reads.

What is packed is worked out on the host, from ids and masks that are there; a device is never waited for.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from spear_fast.transfer import to_device

# stands where a row's start vector will be
_START = -1


class Reads(NamedTuple):
    """Which keys the queries of an attention read: all of their row, or as `ops.attention` says of these arguments.

    Where `cu_query` is given and a tensor is still `[rows, length, ...]`, its rows are all of one length.
    """

    key_mask: Tensor | None = None
    cu_query: Tensor | None = None
    cu_key: Tensor | None = None
    max_query: int | None = None
    max_key: int | None = None


class PackedRows(NamedTuple):
    """Where the rows of a batch begin and end among its tokens.

    offsets: `[rows + 1]`, int32, cumulative lengths from 0, on the tokens' device. total: of tokens. longest: tokens of
    the longest row.
    """

    offsets: Tensor
    rows: int
    total: int
    longest: int

    @property
    def even(self) -> bool:
        """Whether all rows are of one length: then nothing has to be packed."""
        return self.rows * self.longest == self.total

    def shaped(self, tokens: Tensor) -> Tensor:
        """Returns tokens `[total, ...]` as `[rows, longest, ...]` where all rows are of one length."""
        return tokens.unflatten(0, (self.rows, self.longest)) if self.even else tokens

    def reads_itself(self) -> Reads:
        """Returns what self-attention over these rows reads."""
        if self.even:
            return Reads()
        return Reads(None, self.offsets, self.offsets, self.longest, self.longest)

    def reads(self, keys: PackedRows, dropped: Tensor | None = None) -> Reads:
        """Returns what cross-attention from these rows to `keys`, row by row, reads.

        dropped: `[rows]`, bool, rows that read none of their keys. Every second row of the result holds the keys that
        nobody reads: so their number needs not be known to the host.
        """
        if dropped is None:
            if self.even and keys.even:
                return Reads()
            return Reads(None, self.offsets, keys.offsets, self.longest, keys.longest)
        begins, ends = keys.offsets[:-1], keys.offsets[1:]
        read = torch.stack((torch.where(dropped, begins, ends), ends), dim=-1).flatten()
        cu_query = torch.cat((self.offsets[:1], self.offsets[1:].repeat_interleave(2)))
        return Reads(None, cu_query, torch.cat((keys.offsets[:1], read)), self.longest, keys.longest)


class PackedBatch(NamedTuple):
    """A batch of sources and targets, ready for the loss.

    source_ids: `[source.total]`, int64. inputs: `[target.total]`, int64, ids that the decoder reads; 0 where is_start,
    `[target.total]`, bool, says that the start vector is read instead. labels: `[n]`, int64. predicting: `[n]`, int64,
    which of the decoder's positions the labels belong to; None for all, in their order.
    """

    source_ids: Tensor
    source: PackedRows
    inputs: Tensor
    is_start: Tensor
    target: PackedRows
    labels: Tensor
    predicting: Tensor | None


def row_lengths(mask: Tensor) -> Tensor | None:
    """Returns the tokens of each row, `[batch]`, int64; None where a row has a hole, or the mask is on an accelerator.

    mask: `[batch, length]`, bool.
    """
    if mask.device.type != "cpu":
        return None
    lengths = mask.sum(dim=-1)
    filled = torch.arange(mask.shape[-1]) < lengths[:, None]
    return lengths if torch.equal(mask, filled) else None


def packed_batch(
    source: Tensor, source_lengths: Tensor, target: Tensor, target_lengths: Tensor, device: torch.device, *, whole: bool
) -> PackedBatch:
    """Returns a batch on the device, in one copy.

    source, target: ids `[batch, length]`, int64, on the CPU; all of them that count may be embedded.
    source_lengths, target_lengths: `[batch]`, how many of each row count, from its first on.
    whole: the decoder reads each target's last id too, which predicts nothing.
    """
    count = target.shape[0]
    inputs = torch.cat((target.new_full((count, 1), _START), target), dim=-1)
    place = torch.arange(inputs.shape[-1])
    read = place < (target_lengths + int(whole))[:, None]
    inputs = inputs[read]
    predicting = (place < target_lengths[:, None])[read].nonzero().flatten() if whole else target.new_empty(0)
    offsets = [_offsets(lengths) for lengths in (source_lengths, read.sum(dim=-1))]
    parts = [
        source[torch.arange(source.shape[-1]) < source_lengths[:, None]],
        inputs.clamp(min=0),
        (inputs == _START).long(),
        target[torch.arange(target.shape[-1]) < target_lengths[:, None]],
        predicting,
        *offsets,
    ]
    joined = to_device(torch.cat(parts), device)
    ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    moved = [joined[begin:end] for begin, end in pairwise([0, *ends])]
    rows = [
        PackedRows(each.int(), count, int(there[-1]), int(there.diff().max()))
        for each, there in zip(moved[-2:], offsets, strict=True)
    ]
    return PackedBatch(moved[0], rows[0], moved[1], moved[2].bool(), rows[1], moved[3], moved[4] if whole else None)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
