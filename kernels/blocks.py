"""What several kernels and launchers share: matmuls of blocks, the merge of softmax sums, and where Triton runs."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

from .declaration import Declaration
from .tiles import tile

# read when kernels are defined, as Triton does
INTERPRETED = os.environ.get("TRITON_INTERPRET", "") == "1"


def rows_apart(tensor: Tensor) -> Tensor:
    """Returns the tensor with the numbers of its last dimension side by side, which is how kernels read them."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] < 2 else tensor.contiguous()


def padded(size: int, least: int = 16) -> int:
    """Returns the next power of two, which is what a block's sizes must be; matrix instructions want at least 16."""
    return max(least, triton.next_power_of_2(size))


@triton.jit
def product(a, b, INTERPRETED: tl.constexpr):
    """Returns the matrix product of two blocks in float32: in full precision where they are float32."""
    if INTERPRETED:
        # the interpreter's product of bfloat16 blocks multiplies their bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def softmax_step(b_scores, b_max, b_sum):
    """Takes a block of scores into running softmax sums of rows, all in base 2.

    b_scores: `[ROWS, BLOCK]`, float32, -inf where nothing is read.
    b_max, b_sum: `[ROWS]`, float32; the largest score and the sum of weights so far, -inf and 0 at first.
    Returns the block's weights, what earlier sums are to be multiplied by, and the new two.
    """
    b_new = tl.maximum(b_max, tl.max(b_scores, 1))
    # a row that has read nothing yet has no largest score to subtract
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_weights = tl.exp2(b_scores - b_base[:, None])
    b_shrink = tl.exp2(b_max - b_base)
    return b_weights, b_shrink, b_new, b_sum * b_shrink + tl.sum(b_weights, 1)


@triton.jit
def inverse_rms(row, dim, root, WIDTH: tl.constexpr):
    """Returns what a row of a matmul's result is multiplied by where the norm before the matmul was left out.

    row: `[dim]`, what went into the matmul. root: the square root of dim. WIDTH: at least dim, a power of two.
    """
    o_width = tl.arange(0, WIDTH)
    b_row = tl.load(row + o_width, mask=o_width < dim, other=0.0).to(tl.float32)
    return root / tl.maximum(tl.sqrt(tl.sum(b_row * b_row, 0)), 1e-12)


@triton.jit
def inverse_rms_of_rows(p_row, m_row, dim, root, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr = 128):
    """`inverse_rms` of several rows, `[ROWS]`. p_row: `[ROWS]`, where each begins; those past m_row are not read."""
    b_squares = tl.zeros([ROWS, CHUNK], tl.float32)
    # all loads of few rows are under way at once; those of many would take more registers than there are
    for start in tl.range(0, WIDTH, CHUNK, loop_unroll_factor=8 if ROWS <= 16 else 1):
        o_width = start + tl.arange(0, CHUNK)
        b_part = tl.load(p_row[:, None] + o_width[None, :], mask=m_row[:, None] & (o_width < dim)[None, :], other=0.0)
        b_squares += b_part.to(tl.float32) * b_part.to(tl.float32)
    return root / tl.maximum(tl.sqrt(tl.sum(b_squares, 1)), 1e-12)


@triton.jit
def merged(
    partial, log_sums, o_row, m_row, rows, splits, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr
):
    """Returns what the splits of ROWS rows computed together, `[ROWS, SIZE]`.

    partial: `[splits, rows, HEAD_DIM]`, float32; not read where the log-sum-exp is -inf.
    log_sums: `[splits, rows]`, float32, base 2; -inf for a split that read nothing.
    o_row, m_row: `[ROWS]`, int64 and bool; the rows, and which of them there are.

    In the order of splits, whoever calls: the bits are the same.
    """
    o_size = tl.arange(0, SIZE)
    m_size = o_size < HEAD_DIM
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, SIZE], tl.float32)
    for i_split in range(splits):
        b_log = tl.load(log_sums + i_split * rows + o_row, mask=m_row, other=float("-inf"))
        m_read = b_log != float("-inf")
        p_part = partial + (i_split * rows + o_row)[:, None] * HEAD_DIM + o_size[None, :]
        b_part = tl.load(p_part, mask=m_read[:, None] & m_size[None, :], other=0.0)
        b_weight, b_shrink, b_max, b_sum = softmax_step(b_log[:, None], b_max, b_sum)
        b_out = b_out * b_shrink[:, None] + b_part * b_weight
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    return b_out / b_sum[:, None]


@triton.jit
def arrived_last(arrivals, splits):
    """Returns whether this program is the last of `splits` to come here: it then sees what the others have written.

    arrivals: int32, of these programs alone while they run; 0 before, and again 0 once the last has come, so that a
        buffer is zeroed once and kept by whoever owns the launches' other memory: never shared by two streams.
    """
    # the count may not overtake what other threads of this program have written
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def merge_splits_kernel(
    partial, log_sums, out, rows, splits, HEAD_DIM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr
):
    """Merges what the splits of each row computed, by their log-sum-exp.

    partial, log_sums: see `merged`.
    out: `[rows, HEAD_DIM]`; zeros where no split read anything.
    """
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_size = tl.arange(0, SIZE)
    m_row = o_row < rows
    m_size = o_size < HEAD_DIM
    b_out = merged(partial, log_sums, o_row, m_row, rows, splits, HEAD_DIM, SIZE, ROWS)
    p_out = out + o_row[:, None] * HEAD_DIM + o_size[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_row[:, None] & m_size[None, :])


def merge_splits(partial: Tensor, log_sums: Tensor, out: Tensor) -> None:
    """Merges `partial` `[splits, rows, head_dim]` into `out`, by `log_sums` `[splits, rows]`."""
    splits, rows, size = partial.shape
    blocks = tile("merge_splits", out.device, size, out.dtype)
    merge_splits_kernel[(triton.cdiv(rows, blocks["ROWS"]),)](
        partial, log_sums, out, rows, splits, HEAD_DIM=size, SIZE=padded(size), **blocks
    )


AUDIT = [
    Declaration(
        kernel=merge_splits_kernel,
        tile="merge_splits",
        signature={
            **dict.fromkeys(("partial", "log_sums"), "*fp32:16"),
            "out": "*T:16",
            **dict.fromkeys(("rows", "splits"), "i32"),
        },
        constants=lambda size: {"HEAD_DIM": size, "SIZE": padded(size)},
    )
]
