"""Cross-attention's keys and values of the utterances in flight, and how their attention is divided on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.ops.decode_cross_attention import arrivals_for, planned_split
from spear_fast.transfer import to_device

# how cross-attention's keys and values are held: as the model computes, or in 8 bits with a scale for each utterance,
# layer and head
KvDtype = Literal["exact", "fp8"]
FP8 = torch.float8_e4m3fn
# the largest number of e4m3
LARGEST = 448.0


@dataclass(frozen=True)
class ProjectedMemory:
    """Cross-attention keys and values of a batch, once for each utterance and layer; see `allocate`, `over`.

    store: `[layers, 2, batch, heads, length, head_dim]`, first keys, then values: one buffer, so that one kernel writes
    those of all layers. keys, values: the views of it for each layer, `[batch, heads, length, head_dim]`.
    lengths: `[batch]` int64. scales: `[layers, 2, batch, heads]` float32, by which a store of float8_e4m3fn is to be
    multiplied; None of another. arrivals, split: see `ops.decode_cross_attention`; the same whatever part of the batch
    is looked at, so that an utterance has the same bits in all of them.
    """

    store: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    scales: Tensor | None
    arrivals: Tensor | None
    split: int

    @classmethod
    def over(
        cls,
        store: Tensor,
        lengths: Tensor,
        scales: Tensor | None = None,
        arrivals: Tensor | None = None,
        split: int = 0,
    ) -> ProjectedMemory:
        """Returns the views of a store."""
        keys, values = (list(store[:, j].unbind()) for j in range(2))
        return cls(store, keys, values, lengths, scales, arrivals, split)

    @classmethod
    def allocate(
        cls, decoder: Decoder, *, slots: int, beams: int, length: int, kv_dtype: KvDtype = "exact"
    ) -> ProjectedMemory:
        """Returns room for sources of up to `length` positions, and a plan for attending to them from all slots."""
        device, shape = decoder.device, (len(decoder.layers), 2, slots, decoder.heads, length, decoder.head_dim)
        exact = kv_dtype == "exact"
        return cls.over(
            torch.empty(shape, dtype=decoder.dtype if exact else FP8, device=device),
            torch.zeros(slots, dtype=torch.int64, device=device),
            None if exact else torch.ones(shape[:4], dtype=torch.float32, device=device),
            arrivals_for(slots, decoder.heads, beams, device),
            planned_split(slots, decoder.heads),
        )

    @property
    def bits(self) -> Tensor:
        """The store as it is copied and indexed, which not all of torch knows of e4m3."""
        return self.store if self.scales is None else self.store.view(torch.uint8)

    def scales_of(self, layer: int) -> Tensor | None:
        """Returns the scales of a layer, `[2, batch, heads]`, for the op."""
        return None if self.scales is None else self.scales[layer]

    def part(self, begin: int, end: int) -> ProjectedMemory:
        """Returns some of the utterances, over the same buffers."""
        scales = None if self.scales is None else self.scales[:, :, begin:end]
        return self.over(self.store[:, :, begin:end], self.lengths[begin:end], scales, self.arrivals, self.split)

    def alone(self, projected: Tensor) -> ProjectedMemory:
        """Returns a memory like this one, of a single utterance: `Decoder.project`'s rows."""
        scales = None
        if self.scales is not None:
            projected, found = quantised(projected, [len(projected)])
            scales = found.permute(1, 2, 0, 3)
        store = projected.permute(1, 2, 3, 0, 4)[:, :, None]
        return self.over(store, self.lengths.new_full((1,), len(projected)), scales)

    def move(self, origin: int, target: int, length: int) -> None:
        """Copies an utterance of so many positions to another slot."""
        bits = self.bits
        bits[:, :, target, :, :length] = bits[:, :, origin, :, :length]
        self.lengths[target] = self.lengths[origin]
        if self.scales is not None:
            self.scales[:, :, target] = self.scales[:, :, origin]

    def put(self, projected: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Writes `Decoder.project`'s rows of utterances, one after the other, each from the first position of its slot.

        projected: `[rows, layers, 2, heads, head_dim]`. slots, lengths: of each utterance; no slot twice.
        """
        if self.scales is not None:
            projected, scales = quantised(projected, lengths)
            index = to_device(torch.tensor(list(slots), device="cpu"), projected.device)
            self.scales.permute(2, 0, 1, 3).index_copy_(0, index, scales)
            projected = projected.view(torch.uint8)
        write = self.copy if projected.device.type == "cpu" else self.scatter
        write(projected, slots, lengths)

    def scatter(self, projected: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """`put` in one launch, however many utterances and layers there are."""
        counts = torch.tensor(lengths, device="cpu")
        slot_of = torch.tensor(slots, device="cpu").repeat_interleave(counts)
        position_of = torch.cat([torch.arange(length, device="cpu") for length in lengths])
        index = to_device(torch.stack((slot_of, position_of)), projected.device)
        self.bits.permute(2, 4, 0, 1, 3, 5).index_put_(tuple(index), projected)

    def copy(self, projected: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """`put` by a copy for each utterance: on a CPU a third of the scatter's time."""
        bits = self.bits
        for slot, rows in zip(slots, projected.split(list(lengths)), strict=True):
            bits[:, :, slot, :, : len(rows)] = rows.permute(1, 2, 3, 0, 4)


def quantised(projected: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns rows in e4m3, `[rows, layers, 2, heads, head_dim]`, and their scales `[utterances, layers, 2, heads]`.

    The largest number of an utterance's keys, or values, of a layer and head becomes the largest of e4m3; no other
    utterance plays a part. Numbers that are not finite leave a scale that is not, and so all of that head.

    projected: like the rows, floating point. lengths: rows of each utterance, one after the other.
    """
    counts = torch.tensor(list(lengths), device="cpu")
    utterance = to_device(torch.arange(len(counts), device="cpu").repeat_interleave(counts), projected.device)
    largest = torch.linalg.vector_norm(projected, torch.inf, dim=-1).float()
    index = utterance[:, None, None, None].expand_as(largest)
    found = largest.new_zeros(len(counts), *largest.shape[1:]).scatter_reduce_(0, index, largest, "amax")
    # zeros stay zeros whatever the scale
    scales = torch.where(found == 0, 1.0, found / LARGEST)
    return (projected.float() / scales[utterance][..., None]).to(FP8), scales
