"""A decoder's weights as csrc/cuda/fused_step.cu finds them: a table of addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from spear_fast.decoding.packed.decoder import Decoder

DTYPES = (torch.bfloat16, torch.float16)
# as in the sources: layers, a head's numbers, and numbers of a row that is normed, at most
LAYERS, HEAD_DIM, DIM = 24, 128, 1024
# numbers that are read at once
PACK = 8


@dataclass(frozen=True)
class FusedWeights:
    """Addresses of a decoder's weights; `of` makes it.

    table: `[layers, weights]` int64 on the decoder's device, in the order of the enum FusedWeight. inner: features of
    the second matmul of the feed-forward. numbers: how many weights the matmuls have. held: what the addresses are of.
    """

    table: Tensor
    inner: int
    numbers: int
    held: list[list[Tensor | None]]

    @classmethod
    def of(cls, decoder: Decoder) -> FusedWeights | None:
        """Returns the weights of a decoder, or None where they are not as the kernel reads them."""
        linears = [decoder.logits]
        rows: list[list[Tensor | None]] = []
        for layer in decoder.layers:
            feed = layer.feed_forward
            matmuls = (layer.query_key_value, layer.self_output, layer.cross_query, layer.cross_output)
            linears += [*matmuls, feed.up_gate, feed.down]
            if any(each.packed is not None or each.bias is not None for each in linears):
                return None
            project, self_output, ask, cross_output = (each.weight for each in matmuls)
            rows.append([
                layer.self_gamma, project, self_output, layer.cross_gamma, ask, cross_output, layer.null_key,
                layer.null_value, layer.null_output, layer.feed_gamma, feed.up_gate.weight, feed.bias,
                feed.down.weight, layer.freqs,
            ])  # fmt: skip
        shared = [decoder.embedding, decoder.final_gamma, decoder.logits.weight]
        tensors = [each for row in [*rows, shared] for each in row if each is not None]
        inner = decoder.layers[0].feed_forward.down.weight.shape[1]
        fits = (
            decoder.dtype in DTYPES
            and all(each.dtype in (decoder.dtype, torch.float32) for each in tensors)
            and all(each.is_contiguous() and each.data_ptr() % 16 == 0 for each in tensors)
            and all(each.numel() < 1 << 31 for each in tensors)
            and len(rows) <= LAYERS
            and decoder.dim <= DIM
            and decoder.head_dim <= HEAD_DIM
            and all(size % PACK == 0 for size in (decoder.dim, decoder.head_dim, inner))
        )
        if not fits:
            return None
        addresses = [[0 if each is None else each.data_ptr() for each in row] for row in rows]
        table = torch.tensor(addresses, dtype=torch.int64, device="cpu").to(decoder.device)
        numbers = sum(each.weight.numel() for each in linears)
        return cls(table, inner, numbers, [*rows, shared])
