"""Attention of the newest tokens over the source: the beams of an utterance as the query rows of one tile.

A program takes one head of one utterance and one split of the source, and reads each key and value once for all beams.
The last program of an utterance and head to finish merges its splits, in their order. Their size is an argument, so
that an utterance's result has the same bits whatever else is in the batch.

Keys and values may be bytes of e4m3 with a scale for each head of an utterance: they are multiplied as they are, which
is exact, and the scales multiply scores and sums.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import INTERPRETED, arrived_last, inverse_rms_of_rows, merged, padded, product, rows_apart, softmax_step
from .declaration import Declaration
from .tiles import tile


@triton.jit
def power_of_two(b_numbers):
    """Returns the power of two at or below each of some positive numbers, float32; 1 for 0 and what is smaller yet."""
    b_bits = b_numbers.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(b_bits == 0, 1.0, b_bits.to(tl.float32, bitcast=True))


@triton.jit
def from_e4m3(b_bits, CONVERTS: tl.constexpr):
    """Returns the numbers of a block of bytes in float16, exactly, but without CONVERTS 256 times too small.

    float16 has the same layout with a wider mantissa and another bias, subnormal numbers included: the bits need only
    be moved, which takes NaN for a number, where the processor does not convert them itself.
    """
    if CONVERTS:
        b_half = b_bits.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        # the sign's copies go, but for one
        b_half = ((b_bits.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4080).to(tl.float16, bitcast=True)
    return b_half


@triton.jit
def decode_cross_attention_kernel(
    query,
    key,
    value,
    null_key,
    null_value,
    lengths,
    residual,
    scales,
    out,
    partial,
    log_sums,
    arrivals,
    totals,
    scores,
    scale,
    root,
    beams,
    heads,
    source,
    dim,
    tiles,
    split,
    s_query_utterance,
    s_query_beam,
    s_query_head,
    s_key_utterance,
    s_key_head,
    s_key_position,
    s_value_utterance,
    s_value_head,
    s_value_position,
    s_null_key_head,
    s_null_value_head,
    s_length,
    s_residual,
    s_scale_kind,
    s_scale_utterance,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    CONVERTS: tl.constexpr = 0,
):
    """A program computes ROWS beams of one head and utterance over one split; the null position is the first split's.

    residual: `[utterances * beams, dim]`, see `inverse_rms`, or None. root: the square root of dim.
    scales: `[2, utterances, heads]`, float32, of keys and values that are bytes of e4m3; None of others.
    out: `[utterances, beams, heads, HEAD_DIM]`.
    partial, log_sums: `[splits, utterances, beams, heads, HEAD_DIM]` and without HEAD_DIM, float32; see `merged`.
    arrivals: `[programs of a split]`, int32, see `arrived_last`. The three are None without SPLIT.
    totals: `[utterances, beams, heads]`, float32, the log-sum-exp of all positions, base 2.
    scores: `[utterances, beams, heads, source + 1]`, float32, base 2, written where something is read. These two are
        None with SPLIT, and where nobody wants weights.
    split: source positions of a program, with SPLIT.
    """
    i_tile = tl.program_id(0) % tiles
    i_head = (tl.program_id(0) // tiles) % heads
    i_utterance = (tl.program_id(0) // (tiles * heads)).to(tl.int64)
    i_split = tl.program_id(1)
    utterances = tl.num_programs(0) // (tiles * heads)
    o_beam = i_tile * ROWS + tl.arange(0, ROWS)
    o_size = tl.arange(0, SIZE)
    m_beam = o_beam < beams
    m_size = o_size < HEAD_DIM
    m_rows = m_beam[:, None] & m_size[None, :]
    o_row = (i_utterance * beams + o_beam) * heads + i_head

    p_query = query + i_utterance * s_query_utterance + i_head * s_query_head
    b_query = tl.load(p_query + o_beam[:, None] * s_query_beam + o_size[None, :], mask=m_rows, other=0.0)
    length = tl.minimum(tl.load(lengths + i_utterance * s_length), source).to(tl.int32)
    begin = 0
    end = length
    if SPLIT:
        begin = i_split * split
        end = tl.minimum(length, begin + split)
        # those past the length have nothing to merge, and nobody waits for them
        splits = tl.maximum(tl.cdiv(length, split), 1)
        if i_split >= splits:
            return
    if residual is not None:
        p_residual = residual + (i_utterance * beams + o_beam) * s_residual
        b_inverse = inverse_rms_of_rows(p_residual, m_beam, dim, root, WIDTH, ROWS)
        b_query = (b_query.to(tl.float32) * b_inverse[:, None]).to(query.dtype.element_ty)

    b_asked = b_query
    b_scale = tl.full([ROWS], 1.0, tl.float32) * scale
    value_scale = 1.0
    if scales is not None:
        p_scale = scales + i_utterance * s_scale_utterance + i_head
        value_scale = tl.load(p_scale + s_scale_kind)
        b_scale *= tl.load(p_scale)
        if not CONVERTS:
            # what `from_e4m3` leaves out
            value_scale *= 256.0
            b_scale *= 256.0
        if query.dtype.element_ty != tl.float32:
            # bytes become float16 in fewer instructions than bfloat16, into whose range the queries are brought
            b_power = power_of_two(tl.max(tl.abs(b_query.to(tl.float32)), 1))
            b_asked = (b_query.to(tl.float32) / b_power[:, None]).to(tl.float16)
            b_scale *= b_power

    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, SIZE], tl.float32)
    if i_split == 0:
        b_null = tl.load(null_key + i_head * s_null_key_head + o_size, mask=m_size, other=0.0).to(tl.float32)
        b_max = tl.sum(b_query.to(tl.float32) * b_null[None, :], 1) * scale
        b_sum += 1.0
        b_null = tl.load(null_value + i_head * s_null_value_head + o_size, mask=m_size, other=0.0).to(tl.float32)
        if scales is not None:
            b_null /= value_scale
        b_out += b_null[None, :]
        if scores is not None:
            tl.store(scores + o_row * (source + 1), b_max, mask=m_beam)

    p_key = key + i_utterance * s_key_utterance + i_head * s_key_head + o_size[None, :]
    p_value = value + i_utterance * s_value_utterance + i_head * s_value_head + o_size[None, :]
    for start in range(begin, end, BLOCK):
        o_position = start + tl.arange(0, BLOCK)
        m_position = o_position < end
        m_block = m_position[:, None] & m_size[None, :]
        o_wide = o_position.to(tl.int64)[:, None]
        # all of it is read once a step, and a step's sources are together larger than the cache
        b_key = tl.load(p_key + o_wide * s_key_position, mask=m_block, other=0.0, eviction_policy="evict_first")
        b_value = tl.load(p_value + o_wide * s_value_position, mask=m_block, other=0.0, eviction_policy="evict_first")
        if scales is not None:
            b_key = from_e4m3(b_key, CONVERTS).to(b_asked.dtype)
            b_value = from_e4m3(b_value, CONVERTS).to(b_asked.dtype)
        b_scores = product(b_asked, tl.trans(b_key), INTERPRETED) * b_scale[:, None]
        b_scores = tl.where(m_position[None, :], b_scores, float("-inf"))
        if scores is not None:
            p_scores = scores + o_row[:, None] * (source + 1) + 1 + o_position[None, :]
            tl.store(p_scores, b_scores, mask=m_beam[:, None] & m_position[None, :])
        b_weights, b_shrink, b_max, b_sum = softmax_step(b_scores, b_max, b_sum)
        b_out = b_out * b_shrink[:, None]
        b_out += product(b_weights.to(b_value.dtype), b_value, INTERPRETED)

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    if scales is not None:
        b_out *= value_scale
    p_out = out + o_row[:, None] * HEAD_DIM + o_size[None, :]
    if SPLIT:
        rows = utterances.to(tl.int64) * beams * heads
        # the merge does not read what nobody wrote
        m_part = m_rows & (b_max != float("-inf"))[:, None]
        o_part = i_split * rows + o_row
        tl.store(partial + o_part[:, None] * HEAD_DIM + o_size[None, :], b_out, mask=m_part)
        tl.store(log_sums + o_part, b_max + tl.log2(b_sum), mask=m_beam)
        if arrived_last(arrivals + tl.program_id(0), splits):
            b_all = merged(partial, log_sums, o_row, m_beam, rows, splits, HEAD_DIM, SIZE, ROWS)
            tl.store(p_out, b_all.to(out.dtype.element_ty), mask=m_rows)
    else:
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_rows)
        if totals is not None:
            tl.store(totals + o_row, b_max + tl.log2(b_sum), mask=m_beam)


@triton.jit
def decode_cross_weights_kernel(
    scores, totals, lengths, weights, rows_of_utterance, source, s_length, BLOCK: tl.constexpr
):
    """Turns the scores of one row into its weights, zero past the length; BLOCK positions a program."""
    i_row = tl.program_id(0).to(tl.int64)
    o_position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + i_row // rows_of_utterance * s_length)
    # position 0 is the null key's
    m_read = (o_position <= length) & (o_position <= source)
    p_row = i_row * (source + 1) + o_position
    b_scores = tl.load(scores + p_row, mask=m_read, other=float("-inf"))
    b_weights = tl.exp2(b_scores - tl.load(totals + i_row))
    b_weights = tl.where(m_read, b_weights, 0.0).to(weights.dtype.element_ty)
    tl.store(weights + p_row, b_weights, mask=o_position <= source)


def decode_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    lengths: Tensor,
    return_weights: bool,
    residual: Tensor | None,
    arrivals: Tensor | None,
    split: int,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns `[utterances, beams, heads, head_dim]`, and `[utterances, beams, heads, source + 1]` or `[0]`."""
    utterances, beams, heads, size = query.shape
    source = key.shape[2]
    rows = utterances * beams * heads
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    weights = out.new_empty((*query.shape[:3], source + 1) if return_weights else 0)
    if out.numel() == 0:
        return out, weights
    query, key, value, null_key, null_value = map(rows_apart, (query, key, value, null_key, null_value))
    scale_strides = 0, 0
    if scales is not None:
        scales = rows_apart(scales)
        scale_strides = scales.stride(0), scales.stride(1)
        key, value = key.view(torch.uint8), value.view(torch.uint8)
    names = (_FEW, _MANY) if scales is None else (_FEW_FP8, _MANY_FP8)
    few, many = (tile(name, query.device, size, query.dtype) for name in names)
    residual = None if residual is None else rows_apart(residual)
    dim = 1 if residual is None else residual.shape[1]
    blocks = few if beams <= few["ROWS"] else many
    tiles = triton.cdiv(beams, blocks["ROWS"])
    programs = utterances * heads * tiles
    # nobody asks for weights in a step, where there are too few programs
    splits = max(1, triton.cdiv(source, split)) if split and not return_weights else 1
    partial = log_sums = totals = scores = None
    if splits > 1:
        partial = torch.empty(splits, rows, size, dtype=torch.float32, device=query.device)
        log_sums = torch.empty(splits, rows, dtype=torch.float32, device=query.device)
        if arrivals is None or len(arrivals) < programs:
            arrivals = torch.zeros(programs, dtype=torch.int32, device=query.device)
    else:
        arrivals = None
    if return_weights:
        totals = torch.empty(rows, dtype=torch.float32, device=query.device)
        scores = torch.empty(weights.shape, dtype=torch.float32, device=query.device)
    decode_cross_attention_kernel[(programs, splits)](
        query,
        key,
        value,
        null_key,
        null_value,
        lengths,
        residual,
        scales,
        out,
        partial,
        log_sums,
        arrivals,
        totals,
        scores,
        size**-0.5 * math.log2(math.e),
        dim**0.5,
        beams,
        heads,
        source,
        dim,
        tiles,
        split,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        null_key.stride(0),
        null_value.stride(0),
        lengths.stride(0),
        0 if residual is None else residual.stride(0),
        *scale_strides,
        HEAD_DIM=size,
        SIZE=padded(size),
        WIDTH=padded(dim, 128),
        SPLIT=splits > 1,
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    if return_weights:
        blocks = tile("decode_cross_weights", query.device, source, query.dtype)
        grid = (rows, triton.cdiv(source + 1, blocks["BLOCK"]))
        decode_cross_weights_kernel[grid](
            scores, totals, lengths, weights, beams * heads, source, lengths.stride(0), **blocks
        )
    return out, weights


_FEW = "decode_cross_attention"
_MANY = "decode_cross_attention_many"
_FEW_FP8 = "decode_cross_attention_fp8"
_MANY_FP8 = "decode_cross_attention_fp8_many"
_STRIDES = (
    "s_query_utterance s_query_beam s_query_head s_key_utterance s_key_head s_key_position "
    "s_value_utterance s_value_head s_value_position s_null_key_head s_null_value_head s_residual"
).split()
_VARIANTS: dict[str, dict[str, bool | None]] = {
    "weights": {"SPLIT": False, **dict.fromkeys(("partial", "log_sums", "arrivals", "residual"))},
    "whole": {"SPLIT": False, **dict.fromkeys(("partial", "log_sums", "arrivals", "totals", "scores"))},
    "split": {"SPLIT": True, "totals": None, "scores": None},
}
_EXACT = {"scales": None, "CONVERTS": 0}
AUDIT = [
    *(
        Declaration(
            kernel=decode_cross_attention_kernel,
            tile=name,
            signature={
                **dict.fromkeys(("query", "null_key", "null_value", "residual"), "*T:16"),
                **dict.fromkeys(("key", "value"), "*u8:16" if name in (_FEW_FP8, _MANY_FP8) else "*T:16"),
                "lengths": "*i64:16",
                "scales": "*fp32",
                "out": "*T:16",
                **dict.fromkeys(("partial", "log_sums", "totals", "scores"), "*fp32:16"),
                "arrivals": "*i32:16",
                **dict.fromkeys(("scale", "root"), "fp32"),
                "split": "i32:16",
                **dict.fromkeys(("beams", "heads", "source", "dim", "tiles", "s_length"), "i32"),
                **dict.fromkeys(("s_scale_kind", "s_scale_utterance"), "i32"),
                **dict.fromkeys(_STRIDES, "i32:16"),
            },
            constants=lambda size: {"HEAD_DIM": size, "SIZE": padded(size), "WIDTH": 1024, "INTERPRETED": False},
            variants={
                variant: constants | ({} if name in (_FEW_FP8, _MANY_FP8) else _EXACT)
                for variant, constants in _VARIANTS.items()
            },
            matrix=name in (_MANY, _MANY_FP8),
        )
        for name in (_FEW, _MANY, _FEW_FP8, _MANY_FP8)
    ),
    Declaration(
        kernel=decode_cross_weights_kernel,
        tile="decode_cross_weights",
        signature={
            **dict.fromkeys(("scores", "totals"), "*fp32:16"),
            "lengths": "*i64:16",
            "weights": "*T:16",
            **dict.fromkeys(("rows_of_utterance", "source", "s_length"), "i32"),
        },
    ),
]
