"""The one table of hardware numbers: how large a tile each Triton kernel works on, with how many warps and stages.

A kernel asks `tile()` when it is launched; `python -m spear_fast.kernels.audit` compiles every kernel at every row for
sm_80, sm_90 and sm_100 and fails on spilled registers, too much shared memory, a single block a multiprocessor or a
missing matrix instruction. Versions of Triton take registers differently: these rows pass under 3.6 and 3.9. To add a
kernel, add its rows to TABLE under a name of its own and declare it to the audit (declaration.py).

Rows of architecture 80 also serve the consumer cards 8.6, 8.9 and 12.x, with 99 KB of shared memory: the audit holds
them to that. Rows of architecture 0 are for Triton's interpreter on the CPU: small, so that small tests cross the edges
of blocks. Kernels without rows of architecture 0 are interpreted with their rows of 80.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch

INTERPRETER = 0
ARCHITECTURES = (80, 90, 100)
# bytes of shared memory that one block may use
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Entry(NamedTuple):
    """A row of the table.

    kernel: a name that the launcher and the declaration to the audit use.
    architecture: 80, 90, 100, or INTERPRETER.
    size: the largest head size (or row width) that the row is meant for.
    bits: of the dtype: 16 (bfloat16, float16) or 32.
    blocks: constexpr arguments of the kernel, by name.
    """

    kernel: str
    architecture: int
    size: int
    bits: int
    num_warps: int
    num_stages: int
    blocks: Mapping[str, int]

    def keywords(self) -> dict[str, int]:
        """Returns what the launch gets: the blocks, num_warps and num_stages."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


TABLE: tuple[Entry, ...] = (
    # kernel, architecture, size, bits, num_warps, num_stages, blocks
    Entry("attention_forward", 0, 128, 16, 4, 1, {"BLOCK_QUERY": 32, "BLOCK_KEY": 32}),
    Entry("attention_forward_plain", 0, 128, 16, 4, 1, {"BLOCK_QUERY": 32, "BLOCK_KEY": 32}),
    Entry("attention_backward_query", 0, 128, 16, 4, 1, {"BLOCK_QUERY": 32, "BLOCK_KEY": 32}),
    Entry("attention_backward_query_plain", 0, 128, 16, 4, 1, {"BLOCK_QUERY": 32, "BLOCK_KEY": 32}),
    Entry("attention_backward_key_value", 0, 128, 16, 4, 1, {"BLOCK_QUERY": 32, "BLOCK_KEY": 32, "SWEEPS": 2}),
    Entry("attention_backward_key_value_plain", 0, 128, 16, 4, 1, {"BLOCK_QUERY": 32, "BLOCK_KEY": 32, "SWEEPS": 1}),
    Entry("attention_forward", 80, 64, 16, 4, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 64}),
    Entry("attention_forward", 80, 128, 16, 4, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_forward", 90, 64, 16, 4, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_forward", 90, 128, 16, 4, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_forward", 100, 64, 16, 8, 3, {"BLOCK_QUERY": 128, "BLOCK_KEY": 32}),
    Entry("attention_forward", 100, 128, 16, 4, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_forward", 80, 128, 32, 4, 2, {"BLOCK_QUERY": 16, "BLOCK_KEY": 32}),
    Entry("attention_forward", 90, 128, 32, 8, 1, {"BLOCK_QUERY": 16, "BLOCK_KEY": 32}),
    Entry("attention_forward_plain", 80, 64, 16, 4, 3, {"BLOCK_QUERY": 128, "BLOCK_KEY": 32}),
    Entry("attention_forward_plain", 80, 128, 16, 4, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_forward_plain", 90, 64, 16, 4, 3, {"BLOCK_QUERY": 64, "BLOCK_KEY": 64}),
    Entry("attention_forward_plain", 90, 128, 16, 4, 3, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_backward_query", 80, 64, 16, 4, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_backward_query", 80, 128, 16, 8, 1, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_backward_query", 90, 64, 16, 4, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_backward_query", 90, 128, 16, 8, 2, {"BLOCK_QUERY": 128, "BLOCK_KEY": 32}),
    Entry("attention_backward_query", 100, 64, 16, 4, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_backward_query", 100, 128, 16, 8, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_backward_query", 80, 128, 32, 8, 1, {"BLOCK_QUERY": 16, "BLOCK_KEY": 16}),
    Entry("attention_backward_query_plain", 80, 64, 16, 4, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_backward_query_plain", 80, 128, 16, 8, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32}),
    Entry("attention_backward_query_plain", 90, 64, 16, 4, 2, {"BLOCK_QUERY": 64, "BLOCK_KEY": 64}),
    Entry("attention_backward_query_plain", 90, 128, 16, 8, 2, {"BLOCK_QUERY": 128, "BLOCK_KEY": 64}),
    Entry("attention_backward_key_value", 80, 64, 16, 4, 1, {"BLOCK_QUERY": 32, "BLOCK_KEY": 64, "SWEEPS": 1}),
    Entry("attention_backward_key_value", 80, 128, 16, 8, 1, {"BLOCK_QUERY": 64, "BLOCK_KEY": 32, "SWEEPS": 1}),
    Entry("attention_backward_key_value", 90, 64, 16, 8, 2, {"BLOCK_QUERY": 32, "BLOCK_KEY": 128, "SWEEPS": 1}),
    Entry("attention_backward_key_value", 90, 128, 16, 8, 1, {"BLOCK_QUERY": 32, "BLOCK_KEY": 128, "SWEEPS": 2}),
    Entry("attention_backward_key_value", 100, 64, 16, 8, 1, {"BLOCK_QUERY": 32, "BLOCK_KEY": 64, "SWEEPS": 1}),
    Entry("attention_backward_key_value", 100, 128, 16, 8, 1, {"BLOCK_QUERY": 16, "BLOCK_KEY": 64, "SWEEPS": 2}),
    Entry("attention_backward_key_value", 80, 128, 32, 16, 2, {"BLOCK_QUERY": 16, "BLOCK_KEY": 16, "SWEEPS": 1}),
    Entry("attention_backward_key_value", 90, 128, 32, 16, 2, {"BLOCK_QUERY": 32, "BLOCK_KEY": 32, "SWEEPS": 1}),
    Entry("attention_backward_key_value_plain", 80, 64, 16, 4, 1, {"BLOCK_QUERY": 32, "BLOCK_KEY": 64, "SWEEPS": 1}),
    Entry("attention_backward_key_value_plain", 80, 128, 16, 8, 2, {"BLOCK_QUERY": 32, "BLOCK_KEY": 64, "SWEEPS": 1}),
    Entry("attention_backward_key_value_plain", 90, 64, 16, 8, 2, {"BLOCK_QUERY": 32, "BLOCK_KEY": 128, "SWEEPS": 1}),
    Entry("attention_backward_key_value_plain", 90, 128, 16, 8, 2, {"BLOCK_QUERY": 32, "BLOCK_KEY": 128, "SWEEPS": 2}),
    Entry("attention_backward_key_value_plain", 100, 64, 16, 8, 2, {"BLOCK_QUERY": 32, "BLOCK_KEY": 64, "SWEEPS": 1}),
    Entry("attention_backward_key_value_plain", 100, 128, 16, 8, 2, {"BLOCK_QUERY": 16, "BLOCK_KEY": 64, "SWEEPS": 2}),
    Entry("attention_rotation", 0, 128, 16, 4, 1, {"BLOCK": 16}),
    Entry("attention_rotation", 80, 128, 16, 4, 1, {"BLOCK": 32}),
    Entry("append_kv", 0, 128, 16, 1, 1, {"HEADS": 2}),
    Entry("append_kv", 80, 64, 16, 1, 1, {"HEADS": 8}),
    Entry("append_kv", 80, 128, 16, 2, 1, {"HEADS": 8}),
    Entry("append_kv", 80, 64, 32, 2, 1, {"HEADS": 8}),
    Entry("append_kv", 80, 128, 32, 4, 1, {"HEADS": 8}),
    Entry("column_sums", 0, 64, 16, 1, 1, {"ROWS": 2, "BLOCK": 16}),
    Entry("column_sums", 80, 1024, 16, 4, 1, {"ROWS": 32, "BLOCK": 64}),
    Entry("cross_entropy", 0, 64, 16, 1, 1, {"ROWS": 16, "WORDS": 32, "DEPTH": 16, "SPLIT_SIZE": 64}),
    Entry("cross_entropy", 80, 1024, 16, 8, 3, {"ROWS": 128, "WORDS": 128, "DEPTH": 32, "SPLIT_SIZE": 4096}),
    Entry("cross_entropy", 80, 1024, 32, 8, 2, {"ROWS": 64, "WORDS": 64, "DEPTH": 16, "SPLIT_SIZE": 4096}),
    Entry("cross_entropy", 90, 1024, 16, 8, 3, {"ROWS": 128, "WORDS": 128, "DEPTH": 64, "SPLIT_SIZE": 4096}),
    Entry("cross_entropy_backward", 0, 64, 16, 1, 1, {"ROWS": 16, "WORDS": 32, "DEPTH": 16}),
    Entry("cross_entropy_backward", 80, 1024, 16, 8, 3, {"ROWS": 128, "WORDS": 128, "DEPTH": 32}),
    Entry("cross_entropy_backward", 80, 1024, 32, 8, 2, {"ROWS": 64, "WORDS": 64, "DEPTH": 16}),
    Entry("cross_entropy_backward", 90, 1024, 16, 8, 3, {"ROWS": 128, "WORDS": 128, "DEPTH": 64}),
    Entry("cross_entropy_merge", 0, 64, 16, 1, 1, {"ROWS": 8}),
    Entry("cross_entropy_merge", 80, 1024, 16, 4, 1, {"ROWS": 128}),
    Entry("decode_self_attention", 0, 128, 16, 4, 1, {"ROWS": 16, "BLOCK": 16, "SPLIT_SIZE": 32}),
    Entry("decode_self_attention", 80, 64, 16, 4, 3, {"ROWS": 16, "BLOCK": 64, "SPLIT_SIZE": 512}),
    Entry("decode_self_attention", 80, 128, 16, 4, 2, {"ROWS": 16, "BLOCK": 64, "SPLIT_SIZE": 512}),
    Entry("decode_self_attention", 80, 64, 32, 4, 2, {"ROWS": 16, "BLOCK": 16, "SPLIT_SIZE": 512}),
    Entry("decode_self_attention", 80, 128, 32, 4, 3, {"ROWS": 16, "BLOCK": 16, "SPLIT_SIZE": 512}),
    Entry("decode_cross_attention", 0, 128, 16, 4, 1, {"ROWS": 16, "BLOCK": 16}),
    Entry("decode_cross_attention", 80, 64, 16, 4, 2, {"ROWS": 16, "BLOCK": 64}),
    Entry("decode_cross_attention", 80, 128, 16, 4, 3, {"ROWS": 16, "BLOCK": 64}),
    Entry("decode_cross_attention", 90, 64, 16, 4, 3, {"ROWS": 16, "BLOCK": 64}),
    Entry("decode_cross_attention", 90, 128, 16, 4, 3, {"ROWS": 16, "BLOCK": 64}),
    Entry("decode_cross_attention", 80, 64, 32, 4, 2, {"ROWS": 16, "BLOCK": 32}),
    Entry("decode_cross_attention", 80, 128, 32, 8, 2, {"ROWS": 16, "BLOCK": 16}),
    Entry("decode_cross_attention_many", 0, 128, 16, 4, 1, {"ROWS": 32, "BLOCK": 16}),
    Entry("decode_cross_attention_many", 80, 64, 16, 8, 2, {"ROWS": 64, "BLOCK": 64}),
    Entry("decode_cross_attention_many", 80, 128, 16, 8, 2, {"ROWS": 64, "BLOCK": 32}),
    Entry("decode_cross_attention_many", 100, 128, 16, 8, 2, {"ROWS": 64, "BLOCK": 64}),
    Entry("decode_cross_attention_many", 80, 64, 32, 4, 2, {"ROWS": 16, "BLOCK": 32}),
    Entry("decode_cross_attention_many", 80, 128, 32, 8, 2, {"ROWS": 16, "BLOCK": 16}),
    # CONVERTS: whether there are instructions that convert e4m3, from sm_89 on
    Entry("decode_cross_attention_fp8", 0, 128, 16, 4, 1, {"ROWS": 16, "BLOCK": 16, "CONVERTS": 0}),
    Entry("decode_cross_attention_fp8", 80, 64, 16, 4, 3, {"ROWS": 16, "BLOCK": 64, "CONVERTS": 0}),
    Entry("decode_cross_attention_fp8", 80, 128, 16, 4, 3, {"ROWS": 16, "BLOCK": 32, "CONVERTS": 0}),
    Entry("decode_cross_attention_fp8", 80, 64, 32, 4, 2, {"ROWS": 16, "BLOCK": 32, "CONVERTS": 0}),
    Entry("decode_cross_attention_fp8", 80, 128, 32, 8, 2, {"ROWS": 16, "BLOCK": 16, "CONVERTS": 0}),
    Entry("decode_cross_attention_fp8", 90, 64, 16, 4, 3, {"ROWS": 16, "BLOCK": 64, "CONVERTS": 1}),
    Entry("decode_cross_attention_fp8", 90, 128, 16, 4, 3, {"ROWS": 16, "BLOCK": 64, "CONVERTS": 1}),
    Entry("decode_cross_attention_fp8", 90, 64, 32, 4, 2, {"ROWS": 16, "BLOCK": 32, "CONVERTS": 1}),
    Entry("decode_cross_attention_fp8", 90, 128, 32, 8, 2, {"ROWS": 16, "BLOCK": 16, "CONVERTS": 1}),
    Entry("decode_cross_attention_fp8_many", 0, 128, 16, 4, 1, {"ROWS": 32, "BLOCK": 16, "CONVERTS": 1}),
    Entry("decode_cross_attention_fp8_many", 80, 64, 16, 8, 2, {"ROWS": 64, "BLOCK": 32, "CONVERTS": 0}),
    Entry("decode_cross_attention_fp8_many", 80, 128, 16, 8, 2, {"ROWS": 64, "BLOCK": 32, "CONVERTS": 0}),
    Entry("decode_cross_attention_fp8_many", 80, 64, 32, 4, 2, {"ROWS": 16, "BLOCK": 32, "CONVERTS": 0}),
    Entry("decode_cross_attention_fp8_many", 80, 128, 32, 8, 2, {"ROWS": 16, "BLOCK": 16, "CONVERTS": 0}),
    Entry("decode_cross_attention_fp8_many", 90, 64, 16, 8, 2, {"ROWS": 64, "BLOCK": 64, "CONVERTS": 1}),
    Entry("decode_cross_attention_fp8_many", 90, 128, 16, 8, 2, {"ROWS": 64, "BLOCK": 32, "CONVERTS": 1}),
    Entry("decode_cross_attention_fp8_many", 100, 64, 16, 8, 2, {"ROWS": 64, "BLOCK": 64, "CONVERTS": 1}),
    Entry("decode_cross_attention_fp8_many", 100, 128, 16, 8, 3, {"ROWS": 64, "BLOCK": 32, "CONVERTS": 1}),
    Entry("decode_cross_attention_fp8_many", 90, 64, 32, 4, 2, {"ROWS": 16, "BLOCK": 32, "CONVERTS": 1}),
    Entry("decode_cross_attention_fp8_many", 90, 128, 32, 8, 2, {"ROWS": 16, "BLOCK": 16, "CONVERTS": 1}),
    Entry("decode_cross_weights", 0, 64, 16, 1, 1, {"BLOCK": 32}),
    Entry("decode_cross_weights", 80, 1024, 16, 4, 1, {"BLOCK": 1024}),
    Entry("geglu", 0, 64, 16, 1, 1, {"ROWS": 2, "BLOCK": 32}),
    Entry("geglu", 80, 4096, 16, 4, 1, {"ROWS": 1, "BLOCK": 1024}),
    Entry("geglu_backward", 0, 64, 16, 1, 1, {"ROWS": 2, "BLOCK": 32, "PARTS": 2}),
    Entry("geglu_backward", 80, 4096, 16, 4, 1, {"ROWS": 2, "BLOCK": 512, "PARTS": 256}),
    Entry("merge_splits", 0, 128, 16, 4, 1, {"ROWS": 4}),
    Entry("merge_splits", 80, 64, 16, 4, 1, {"ROWS": 8}),
    Entry("merge_splits", 80, 128, 16, 4, 1, {"ROWS": 4}),
    Entry("rms_norm", 0, 64, 16, 1, 1, {"ROWS": 2}),
    Entry("rms_norm", 80, 512, 16, 4, 1, {"ROWS": 4}),
    Entry("rms_norm", 80, 1024, 16, 4, 1, {"ROWS": 2}),
    Entry("rms_norm", 80, 4096, 16, 8, 1, {"ROWS": 1}),
    Entry("rms_norm", 80, 8192, 16, 16, 1, {"ROWS": 1}),
    Entry("rms_norm_backward", 0, 64, 16, 1, 1, {"ROWS": 2, "PARTS": 2}),
    Entry("rms_norm_backward", 80, 512, 16, 4, 1, {"ROWS": 4, "PARTS": 512}),
    Entry("rms_norm_backward", 80, 1024, 16, 4, 1, {"ROWS": 2, "PARTS": 512}),
    Entry("rms_norm_backward", 80, 4096, 16, 8, 1, {"ROWS": 1, "PARTS": 512}),
    Entry("rms_norm_backward", 80, 8192, 16, 16, 1, {"ROWS": 1, "PARTS": 256}),
    Entry("rotary", 0, 128, 16, 1, 1, {"HEADS": 2}),
    Entry("rotary", 80, 64, 16, 1, 1, {"HEADS": 8}),
    Entry("rotary", 80, 128, 16, 2, 1, {"HEADS": 8}),
)


def architecture(device: torch.device) -> int:
    """Returns the architecture in the table that stands for a device."""
    if device.type != "cuda":
        return INTERPRETER
    return nearest_architecture(*_capability(device.index or 0))


def nearest_architecture(major: int, minor: int) -> int:
    """Returns the newest architecture of the table whose rows also fit a device of this compute capability."""
    # consumer Blackwell has neither the shared memory nor the matrix instructions of 10.0
    if major == 12:
        return ARCHITECTURES[0]
    older = [each for each in ARCHITECTURES if each <= 10 * major + minor]
    return max(older, default=ARCHITECTURES[0])


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def tile(kernel: str, device: torch.device, size: int, dtype: torch.dtype) -> dict[str, int]:
    """Returns the launch keywords (blocks, num_warps, num_stages) for a kernel on a device.

    size: head size or row width; the row of the next larger size is taken, or the largest.
    dtype: of the main tensors.
    """
    return dict(lookup(kernel, architecture(device), size, 8 * dtype.itemsize).keywords())


@functools.cache
def lookup(kernel: str, architecture: int, size: int, bits: int) -> Entry:
    """Returns the nearest row: of the same bits, of the newest architecture not above, of the next size."""
    rows = [row for row in TABLE if row.kernel == kernel]
    if not rows:
        known = ", ".join(sorted({row.kernel for row in TABLE}))
        raise ValueError(f"tile: kernel must be one of {known}, got {kernel}; add its rows to kernels/tiles.py")
    if architecture == INTERPRETER and any(row.architecture == INTERPRETER for row in rows):
        rows = [row for row in rows if row.architecture == INTERPRETER]
    else:
        rows = [row for row in rows if row.architecture != INTERPRETER]
    of_bits = min({row.bits for row in rows}, key=lambda each: abs(each - bits))
    rows = [row for row in rows if row.bits == of_bits]
    built = {row.architecture for row in rows}
    newest = max((each for each in built if each <= architecture), default=min(built))
    rows = sorted((row for row in rows if row.architecture == newest), key=lambda row: row.size)
    return next((row for row in rows if row.size >= size), rows[-1])


def entries(kernel: str) -> list[Entry]:
    """Returns the rows at which the audit compiles a kernel: each size and dtype on each architecture."""
    sizes = sorted({(row.size, row.bits) for row in TABLE if row.kernel == kernel and row.architecture != INTERPRETER})
    return [
        lookup(kernel, target, size, bits)._replace(architecture=target, size=size)
        for target in ARCHITECTURES
        for size, bits in sizes
    ]
