"""`decode_self_attention` by csrc/cuda/decode_self_attention.cu: its launch, and its arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spear_fast.ops.checks import refuse
from spear_fast.ops.cuda import runtime
from spear_fast.ops.cuda.runtime import SCALARS, Launch

SOURCE, STRUCT = "decode_self_attention.cu", "SelfAttention"
# as in the source: threads of a block, positions of a chunk, query rows that a warp of the merge takes
THREADS, CHUNK, MERGED = 128, 128, 4
# lanes of a warp that share a row of the cache, 16 bytes each
LANES = (8, 16, 32)
ADVICE = "call .contiguous() when they are made"


class LaunchPlan(NamedTuple):
    """How a call is cut up; csrc/cuda/plan.h computes the same in C++, and a test compares the two.

    lanes: of a row. rows: query rows of a block, at most. splits: chunks of the buffer. tiles: blocks that the query
    rows of an utterance and key head need. blocks: of the whole grid. partial: floats of memory that the chunks need.
    """

    lanes: int
    rows: int
    splits: int
    tiles: int
    blocks: int
    partial: int


def plan(sizes: tuple[int, ...], itemsize: int, aligned: bool) -> LaunchPlan:
    """Returns how to cut up a call.

    sizes: utterances, beams, tokens, heads, groups, head_dim, buffer. itemsize: bytes of a number.
    aligned: whether rows start on 16-byte addresses and end on one.
    """
    utterances, beams, tokens, heads, groups, size, buffer = sizes
    all_rows = beams * tokens * (heads // groups)
    rows = 5 if all_rows <= 5 or not aligned else 8
    rows = 1 if all_rows == 1 and aligned else rows
    splits, tiles = max(1, -(-buffer // CHUNK)), -(-all_rows // rows)
    partial = utterances * all_rows * groups * splits * (size + 2) if splits > 1 else 0
    lanes = next(lanes for lanes in LANES if lanes * 16 >= size * itemsize)
    return LaunchPlan(lanes, rows, splits, tiles, utterances * groups * splits * tiles, partial)


def aligned(size: int, *tensors: Tensor) -> bool:
    """Returns whether rows of `size` numbers of the tensors can be read 16 bytes at a time."""
    pack = 16 // tensors[0].element_size()
    return size % pack == 0 and all(
        tensor.data_ptr() % 16 == 0 and all(stride % pack == 0 for stride in tensor.stride()[:-1]) for tensor in tensors
    )


def decode_self_attention(
    query: Tensor, freqs: Tensor, cache_key: Tensor, cache_value: Tensor, ancestors: Tensor, lengths: Tensor
) -> Tensor:
    utterances, beams, tokens, heads, size = query.shape
    groups, buffer = cache_key.shape[1], cache_key.shape[2]
    if cache_key.stride(3) != 1 or cache_value.stride(3) != 1:
        found = f"{cache_key.stride()} and {cache_value.stride()}"
        refuse("decode_self_attention", "the caches", "contiguous in their last dimension", found, ADVICE)
    out = query.new_empty(query.shape)
    if out.numel() == 0:
        return out
    whole = aligned(size, cache_key, cache_value)
    cut = plan((utterances, beams, tokens, heads, groups, size, buffer), query.element_size(), whole)
    partial = query.new_empty(cut.partial, dtype=torch.float32)
    tensors = {
        "query": query,
        "freqs": freqs,
        "cache_key": cache_key,
        "cache_value": cache_value,
        "ancestors": ancestors,
        "lengths": lengths,
        "out": out,
        "partial": partial,
    }
    strides = {
        "query": (query, ("utterance", "beam", "token", "head", "element")),
        "freqs": (freqs, ("element",)),
        "key": (cache_key, ("row", "group", "position")),
        "value": (cache_value, ("row", "group", "position")),
        "ancestors": (ancestors, ("utterance", "beam", "position")),
        "lengths": (lengths, ("utterance", "beam")),
    }
    values = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for name, (tensor, axes) in strides.items():
        values |= {f"{name}_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=False)}
    values |= {"utterances": utterances, "beams": beams, "tokens": tokens, "heads": heads, "groups": groups}
    values |= {"size": size, "buffer": buffer, "splits": cut.splits, "tiles": cut.tiles}
    scalar = SCALARS[query.dtype]
    options = f"{scalar}, {cut.lanes}, {cut.rows}, {'true' if whole else 'false'}"
    kernel = f"spear_fast::decode_self_attention<{options}>"
    runtime.launch(Launch(SOURCE, kernel, STRUCT, cut.blocks, THREADS), values, query.device)
    if cut.splits > 1:
        rows = utterances * beams * tokens * heads
        kernel = f"spear_fast::merge_self_attention<{scalar}>"
        runtime.launch(Launch(SOURCE, kernel, STRUCT, -(-rows // MERGED), THREADS), values, query.device)
    return out
