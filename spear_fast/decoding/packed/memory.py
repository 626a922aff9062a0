"""Cross-attention's keys and values of the utterances in flight, and how their attention is divided on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spear_fast.transfer import to_device


@dataclass(frozen=True)
class ProjectedMemory:
    """Cross-attention keys and values of a batch, once for each utterance and layer; `over` makes it.

    store: `[layers, 2, batch, heads, length, head_dim]`, first keys, then values: one buffer, so that one kernel writes
    those of all layers. keys, values: the views of it for each layer, `[batch, heads, length, head_dim]`.
    lengths: `[batch]` int64. arrivals, split: see `ops.decode_cross_attention`; the same whatever part of the batch is
    looked at, so that an utterance has the same bits in all of them.
    """

    store: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    arrivals: Tensor | None
    split: int

    @classmethod
    def over(cls, store: Tensor, lengths: Tensor, arrivals: Tensor | None = None, split: int = 0) -> ProjectedMemory:
        """Returns the views of a store."""
        keys, values = (list(store[:, j].unbind()) for j in range(2))
        return cls(store, keys, values, lengths, arrivals, split)

    def part(self, begin: int, end: int) -> ProjectedMemory:
        """Returns some of the utterances, over the same buffers."""
        return self.over(self.store[:, :, begin:end], self.lengths[begin:end], self.arrivals, self.split)

    def alone(self, projected: Tensor) -> ProjectedMemory:
        """Returns a memory like this one, of a single utterance: `Decoder.project`'s rows."""
        store = projected.permute(1, 2, 3, 0, 4)[:, :, None]
        return self.over(store, self.lengths.new_full((1,), len(projected)))

    def move(self, origin: int, target: int, length: int) -> None:
        """Copies an utterance of so many positions to another slot."""
        self.store[:, :, target, :, :length] = self.store[:, :, origin, :, :length]
        self.lengths[target] = self.lengths[origin]

    def put(self, projected: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Writes `Decoder.project`'s rows of utterances, one after the other, each from the first position of its slot.

        projected: `[rows, layers, 2, heads, head_dim]`. slots, lengths: of each utterance; no slot twice.
        """
        write = self.copy if projected.device.type == "cpu" else self.scatter
        write(projected, slots, lengths)

    def scatter(self, projected: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """`put` in one launch, however many utterances and layers there are."""
        counts = torch.tensor(lengths, device="cpu")
        slot_of = torch.tensor(slots, device="cpu").repeat_interleave(counts)
        position_of = torch.cat([torch.arange(length, device="cpu") for length in lengths])
        index = to_device(torch.stack((slot_of, position_of)), projected.device)
        self.store.permute(2, 4, 0, 1, 3, 5).index_put_(tuple(index), projected)

    def copy(self, projected: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """`put` by a copy for each utterance: on a CPU a third of the scatter's time."""
        for slot, rows in zip(slots, projected.split(list(lengths)), strict=True):
            self.store[:, :, slot, :, : len(rows)] = rows.permute(1, 2, 3, 0, 4)
