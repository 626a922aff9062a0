"""Loss of tied-embedding logits: a tile of logits lives in registers, and no larger piece of them in memory.

Backward, the logits are computed again and turned into their own gradients, some rows at a time in the inputs' dtype;
the two matmuls with the embedding and the hidden states are then the library's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import INTERPRETED, product, rows_apart
from .declaration import Declaration
from .tiles import tile

# gradients of logits that are held at once
CHUNK = 1 << 25


@triton.jit
def _logits(
    hidden,
    weight,
    o_row,
    o_word,
    rows,
    words,
    dim,
    s_hidden,
    s_weight,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Returns `[ROWS, WORDS]` logits in float32, -inf for what is no word."""
    b_logits = tl.zeros([ROWS, WORDS], tl.float32)
    p_hidden = hidden + o_row.to(tl.int64)[:, None] * s_hidden
    p_weight = weight + o_word.to(tl.int64)[:, None] * s_weight
    for start in range(0, dim, DEPTH):
        o_depth = (start + tl.arange(0, DEPTH))[None, :]
        b_hidden = tl.load(p_hidden + o_depth, mask=(o_row < rows)[:, None] & (o_depth < dim), other=0.0)
        b_weight = tl.load(p_weight + o_depth, mask=(o_word < words)[:, None] & (o_depth < dim), other=0.0)
        b_logits += product(b_hidden, tl.trans(b_weight), INTERPRETED)
    return tl.where((o_word < words)[None, :], b_logits, float("-inf"))


@triton.jit
def cross_entropy_kernel(
    hidden,
    weight,
    labels,
    largest,
    sums,
    picked,
    rows,
    words,
    dim,
    s_hidden,
    s_weight,
    s_labels,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Of ROWS rows and one split of the vocabulary a program.

    largest, sums, picked: `[splits, rows]`, float32; the largest logit, the sum of exponentials below it, and the
    label's logit, or zero where it is in another split.
    """
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_split = tl.program_id(1)
    b_label = tl.load(labels + o_row.to(tl.int64) * s_labels, mask=o_row < rows, other=-1)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_picked = tl.zeros([ROWS], tl.float32)
    for first in range(i_split * SPLIT_SIZE, tl.minimum((i_split + 1) * SPLIT_SIZE, words), WORDS):
        o_word = first + tl.arange(0, WORDS)
        b_logits = _logits(
            hidden, weight, o_row, o_word, rows, words, dim, s_hidden, s_weight, ROWS, WORDS, DEPTH, INTERPRETED
        )
        b_picked += tl.sum(tl.where(o_word[None, :] == b_label[:, None], b_logits, 0.0), 1)
        b_new = tl.maximum(b_max, tl.max(b_logits, 1))
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_logits - b_new[:, None]), 1)
        b_max = b_new
    o_out = i_split.to(tl.int64) * rows + o_row
    tl.store(largest + o_out, b_max, mask=o_row < rows)
    tl.store(sums + o_out, b_sum, mask=o_row < rows)
    tl.store(picked + o_out, b_picked, mask=o_row < rows)


@triton.jit
def cross_entropy_merge_kernel(
    largest, sums, picked, labels, losses, lse, rows, splits, ignore_index, s_labels, ROWS: tl.constexpr
):
    """Merges the splits of ROWS rows a program; losses and lse: `[rows]`, float32, the loss zero where ignored."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_picked = tl.zeros([ROWS], tl.float32)
    for i_split in range(splits):
        b_largest = tl.load(largest + i_split * rows + o_row, mask=m_row, other=0.0)
        b_new = tl.maximum(b_max, b_largest)
        b_part = tl.load(sums + i_split * rows + o_row, mask=m_row, other=1.0)
        b_sum = b_sum * tl.exp(b_max - b_new) + b_part * tl.exp(b_largest - b_new)
        b_picked += tl.load(picked + i_split * rows + o_row, mask=m_row, other=0.0)
        b_max = b_new
    b_rest = tl.log(b_sum)
    b_label = tl.load(labels + o_row * s_labels, mask=m_row, other=0)
    # large logits cancel before the small rest is added
    b_loss = tl.where(b_label == ignore_index, 0.0, (b_max - b_picked) + b_rest)
    tl.store(losses + o_row, b_loss, mask=m_row)
    tl.store(lse + o_row, b_max + b_rest, mask=m_row)


@triton.jit
def cross_entropy_backward_kernel(
    grad_losses,
    peak,
    hidden,
    weight,
    labels,
    lse,
    shares,
    rows,
    words,
    dim,
    ignore_index,
    s_grad_losses,
    s_hidden,
    s_weight,
    s_labels,
    s_lse,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Writes `[ROWS, WORDS]` of `shares`, `[rows, words]`: the logits' gradients divided by `peak`, `[1]`.

    Divided so, they are of the order of one, which a half type holds however small the losses' gradients are.
    """
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    m_row = o_row < rows
    b_logits = _logits(
        hidden, weight, o_row, o_word, rows, words, dim, s_hidden, s_weight, ROWS, WORDS, DEPTH, INTERPRETED
    )
    o_long = o_row.to(tl.int64)
    b_label = tl.load(labels + o_long * s_labels, mask=m_row, other=-1)
    b_lse = tl.load(lse + o_long * s_lse, mask=m_row, other=0.0)
    b_grad = tl.load(grad_losses + o_long * s_grad_losses, mask=m_row, other=0.0) / tl.load(peak)
    b_grad = tl.where(b_label == ignore_index, 0.0, b_grad)
    b_share = tl.exp(b_logits - b_lse[:, None])
    b_share -= tl.where(o_word[None, :] == b_label[:, None], 1.0, 0.0)
    b_share *= b_grad[:, None]
    p_share = shares + o_long[:, None] * words + o_word[None, :]
    m_share = m_row[:, None] & (o_word < words)[None, :]
    tl.store(p_share, b_share.to(shares.dtype.element_ty), mask=m_share)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Returns losses and log-sum-exps, `[n]`, float32; see the op."""
    rows, dim = hidden.shape
    losses, lse = (torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(2))
    if rows == 0:
        return losses, lse
    hidden, weight = rows_apart(hidden), rows_apart(weight)
    blocks = tile("cross_entropy", hidden.device, dim, hidden.dtype)
    splits = triton.cdiv(weight.shape[0], blocks["SPLIT_SIZE"])
    parts = torch.empty(3, splits, rows, dtype=torch.float32, device=hidden.device)
    cross_entropy_kernel[(triton.cdiv(rows, blocks["ROWS"]), splits)](
        hidden,
        weight,
        labels,
        *parts,
        rows,
        weight.shape[0],
        dim,
        hidden.stride(0),
        weight.stride(0),
        labels.stride(0),
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    blocks = tile("cross_entropy_merge", hidden.device, dim, hidden.dtype)
    cross_entropy_merge_kernel[(triton.cdiv(rows, blocks["ROWS"]),)](
        *parts, labels, losses, lse, rows, splits, ignore_index, labels.stride(0), **blocks
    )
    return losses, lse


def cross_entropy_backward(
    grad_losses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of hidden, `[n, dim]`, and weight, `[vocabulary, dim]`; see the op."""
    rows, dim = hidden.shape
    words = weight.shape[0]
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return grad_hidden, grad_weight.to(weight.dtype)
    hidden, weight = rows_apart(hidden), rows_apart(weight)
    blocks = tile("cross_entropy_backward", hidden.device, dim, hidden.dtype)
    peak = grad_losses.masked_fill(labels == ignore_index, 0).abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    size = max(blocks["ROWS"], CHUNK // words)
    shares = torch.empty(min(size, rows), words, dtype=hidden.dtype, device=hidden.device)
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        count = part.stop - part.start
        cross_entropy_backward_kernel[(triton.cdiv(count, blocks["ROWS"]), triton.cdiv(words, blocks["WORDS"]))](
            grad_losses[part],
            peak,
            hidden[part],
            weight,
            labels[part],
            lse[part],
            shares,
            count,
            words,
            dim,
            ignore_index,
            grad_losses.stride(0),
            hidden.stride(0),
            weight.stride(0),
            labels.stride(0),
            lse.stride(0),
            INTERPRETED=INTERPRETED,
            **blocks,
        )
        grad_hidden[part] = (shares[:count] @ weight).float() * peak
        grad_weight += shares[:count].mT @ hidden[part]
    return grad_hidden, (grad_weight * peak).to(weight.dtype)


_SIGNATURE = {
    **dict.fromkeys(("hidden", "weight", "shares"), "*T:16"),
    "labels": "*i64:16",
    **dict.fromkeys(("grad_losses", "peak", "lse", "largest", "sums", "picked", "losses"), "*fp32:16"),
    **dict.fromkeys(("rows", "words", "splits", "ignore_index"), "i32"),
    **dict.fromkeys(("dim", "s_hidden", "s_weight"), "i32:16"),
}


def _signature(kernel: triton.JITFunction) -> dict[str, str]:
    return {name: _SIGNATURE[name] for name in kernel.arg_names if name in _SIGNATURE}


AUDIT = [
    Declaration(
        kernel=cross_entropy_kernel,
        tile="cross_entropy",
        signature=_signature(cross_entropy_kernel),
        constants=lambda size: {"INTERPRETED": False, "s_labels": 1},
        matrix=True,
    ),
    Declaration(
        kernel=cross_entropy_merge_kernel,
        tile="cross_entropy_merge",
        signature=_signature(cross_entropy_merge_kernel),
        constants=lambda size: {"s_labels": 1},
    ),
    Declaration(
        kernel=cross_entropy_backward_kernel,
        tile="cross_entropy_backward",
        signature=_signature(cross_entropy_backward_kernel),
        constants=lambda size: {"INTERPRETED": False, **dict.fromkeys(("s_grad_losses", "s_labels", "s_lse"), 1)},
        matrix=True,
    ),
]
