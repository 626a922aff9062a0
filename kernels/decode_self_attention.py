"""Attention of the newest tokens over their own histories, the ancestor table followed in place.

A program takes one key/value head of one utterance, one split of the positions, and as query rows the beams × heads of
the group × tokens. Where the rows fit one tile, it reads each cached key and value that any beam needs exactly once,
beam by beam: beams that share most of their history cost little more memory traffic than one. Where they do not, a
program takes the rows of one beam and gathers that beam's history.

Splits have a fixed size, so that an utterance's result has the same bits whatever else is in the batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import INTERPRETED, merge_splits, padded, product, rows_apart, softmax_step
from .declaration import Declaration
from .rotation import cos_sin, rotate
from .tiles import tile


@triton.jit
def decode_self_attention_kernel(
    query,
    freqs,
    cache_key,
    cache_value,
    ancestors,
    lengths,
    out,
    log_sums,
    scale,
    beams,
    tokens,
    groups,
    repeats,
    buffer,
    tiles,
    s_query_utterance,
    s_query_beam,
    s_query_token,
    s_query_head,
    s_key_row,
    s_key_head,
    s_key_position,
    s_value_row,
    s_value_head,
    s_value_position,
    s_ancestor_utterance,
    s_ancestor_beam,
    s_ancestor_position,
    s_length_utterance,
    s_length_beam,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    FOLLOW: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """log_sums: `[splits, rows]`, base 2; `out` is then each split's, `[splits, rows, HEAD_DIM]` in float32. Or None.

    FOLLOW: "shared", each beam's keys are read once for all beams; "gathered", the tile is of one beam, whose ancestors
    are gathered; "alone", there is one beam.
    """
    i_tile = tl.program_id(0) % tiles
    i_group = (tl.program_id(0) // tiles) % groups
    i_utterance = (tl.program_id(0) // (tiles * groups)).to(tl.int64)
    i_split = tl.program_id(1)

    # query rows: beam, then head of the group, then token
    per_beam = repeats * tokens
    if FOLLOW == "gathered":
        tiles_per_beam = tiles // beams
        i_beam = i_tile // tiles_per_beam
        o_within = (i_tile % tiles_per_beam) * ROWS + tl.arange(0, ROWS)
        m_row = o_within < per_beam
        o_beam = i_beam + 0 * o_within
    else:
        i_beam = 0
        o_row = i_tile * ROWS + tl.arange(0, ROWS)
        m_row = o_row < beams * per_beam
        o_beam = o_row // per_beam
        o_within = o_row % per_beam
    o_head = i_group * repeats + o_within // tokens
    o_token = o_within % tokens
    o_size = tl.arange(0, SIZE)
    o_pair = tl.arange(0, SIZE // 2)
    m_size = o_size < HEAD_DIM

    p_length = lengths + i_utterance * s_length_utterance + o_beam * s_length_beam
    b_length = tl.minimum(tl.load(p_length, mask=m_row, other=0), buffer).to(tl.int32)
    # a token reads up to itself
    b_limit = tl.where(m_row, b_length - tokens + o_token + 1, 0)
    begin = i_split * SPLIT_SIZE
    end = tl.minimum(tl.max(b_limit, 0), begin + SPLIT_SIZE)

    p_query = query + i_utterance * s_query_utterance
    p_query += (o_beam * s_query_beam + o_token * s_query_token + o_head * s_query_head)[:, None] + o_size[None, :]
    b_query = tl.load(p_query, mask=m_row[:, None] & m_size[None, :], other=0.0)
    b_freqs = tl.load(freqs + o_pair, mask=o_pair < HEAD_DIM // 2, other=0.0).to(tl.float32)
    b_cos, b_sin = cos_sin(tl.maximum(b_limit - 1, 0).to(tl.float32)[:, None] * b_freqs[None, :])
    b_query = rotate(b_query.to(tl.float32), b_cos, b_sin).to(query.dtype.element_ty)

    p_ancestors = ancestors + i_utterance * s_ancestor_utterance
    p_key = cache_key + i_utterance * beams * s_key_row + i_group * s_key_head + o_size[None, :]
    p_value = cache_value + i_utterance * beams * s_value_row + i_group * s_value_head + o_size[None, :]
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, SIZE], tl.float32)
    sources = beams if FOLLOW == "shared" else 1
    for start in range(begin, end, BLOCK):
        o_position = start + tl.arange(0, BLOCK)
        m_read = o_position[None, :] < tl.minimum(b_limit, end)[:, None]
        m_position = o_position < end
        if FOLLOW == "shared":
            o_ancestor = o_beam[:, None] * s_ancestor_beam + o_position[None, :] * s_ancestor_position
            b_source = tl.load(p_ancestors + o_ancestor, mask=m_read, other=0).to(tl.int32)
            b_source = tl.where(m_read, b_source, -1)
        if FOLLOW == "gathered":
            o_ancestor = i_beam * s_ancestor_beam + o_position * s_ancestor_position
            o_source = tl.load(p_ancestors + o_ancestor, mask=m_position, other=0).to(tl.int64)
            o_source = tl.minimum(o_source, beams - 1)
        for i_source in range(sources):
            if FOLLOW == "shared":
                m_read = b_source == i_source
                # what no beam descends from is not fetched
                m_position = tl.max(m_read.to(tl.int32), 0) > 0
                o_source = tl.full([BLOCK], 0, tl.int64) + i_source
            if FOLLOW == "alone":
                o_source = tl.full([BLOCK], 0, tl.int64)
            m_block = m_position[:, None] & m_size[None, :]
            o_key = o_source * s_key_row + o_position * s_key_position
            o_value = o_source * s_value_row + o_position * s_value_position
            b_key = tl.load(p_key + o_key[:, None], mask=m_block, other=0.0)
            b_value = tl.load(p_value + o_value[:, None], mask=m_block, other=0.0)
            b_scores = product(b_query, tl.trans(b_key), INTERPRETED) * scale
            if FOLLOW == "shared":
                # a weight of zero does not remove NaN or infinity: where a value has them, the score gets NaN, and so
                # does the hypothesis that reads it, but not its siblings
                b_taint = tl.sum(b_value.to(tl.float32) * 0.0, 1)
                b_value = tl.where((b_taint == 0.0)[:, None], b_value, 0.0)
                b_scores += b_taint[None, :]
            b_scores = tl.where(m_read, b_scores, float("-inf"))
            b_weights, b_shrink, b_max, b_sum = softmax_step(b_scores, b_max, b_sum)
            b_out = b_out * b_shrink[:, None]
            b_out += product(b_weights.to(b_value.dtype), b_value, INTERPRETED)

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    heads = groups * repeats
    o_out = ((i_utterance * beams + o_beam) * tokens + o_token) * heads + o_head
    m_write = m_row
    if log_sums is not None:
        o_out += i_split * (tl.num_programs(0) // (tiles * groups)).to(tl.int64) * beams * tokens * heads
        tl.store(log_sums + o_out, b_max + tl.log2(b_sum), mask=m_row)
        # the merge does not read what nobody wrote
        m_write = m_row & (b_max != float("-inf"))
    p_out = out + o_out[:, None] * HEAD_DIM + o_size[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_write[:, None] & m_size[None, :])


def decode_self_attention(
    query: Tensor, freqs: Tensor, cache_key: Tensor, cache_value: Tensor, ancestors: Tensor, lengths: Tensor
) -> Tensor:
    """Returns `[utterances, beams, tokens, heads, head_dim]`; see the op."""
    utterances, beams, tokens, heads, size = query.shape
    groups, buffer = cache_key.shape[1], cache_key.shape[2]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0 or buffer == 0:
        return out.zero_()
    query, cache_key, cache_value = rows_apart(query), rows_apart(cache_key), rows_apart(cache_value)
    few, many = (tile(name, query.device, size, query.dtype) for name in (_FEW, _MANY))
    per_beam = heads // groups * tokens
    follow = "alone" if beams == 1 else "shared" if beams * per_beam <= many["ROWS"] else "gathered"
    rows = per_beam if follow == "gathered" else beams * per_beam
    blocks = few if rows <= few["ROWS"] else many
    tiles = triton.cdiv(rows, blocks["ROWS"]) * (beams if follow == "gathered" else 1)
    splits = triton.cdiv(buffer, blocks["SPLIT_SIZE"])
    count = out.numel() // size
    partial, log_sums = out, None
    if splits > 1:
        partial = torch.empty(splits, count, size, dtype=torch.float32, device=query.device)
        log_sums = torch.empty(splits, count, dtype=torch.float32, device=query.device)
    decode_self_attention_kernel[(utterances * groups * tiles, splits)](
        query,
        freqs.contiguous(),
        cache_key,
        cache_value,
        ancestors,
        lengths,
        partial,
        log_sums,
        size**-0.5 * math.log2(math.e),
        beams,
        tokens,
        groups,
        heads // groups,
        buffer,
        tiles,
        *query.stride()[:4],
        *cache_key.stride()[:3],
        *cache_value.stride()[:3],
        *ancestors.stride(),
        *lengths.stride(),
        HEAD_DIM=size,
        SIZE=padded(size),
        FOLLOW=follow,
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    if log_sums is not None:
        merge_splits(partial, log_sums, out)
    return out


_FEW = "decode_self_attention"
_MANY = "decode_self_attention_many"
_STRIDES = (
    "s_query_utterance s_query_beam s_query_token s_query_head s_key_row s_key_head s_key_position "
    "s_value_row s_value_head s_value_position"
).split()
_SIZES = (
    "beams tokens groups repeats buffer tiles s_ancestor_utterance s_ancestor_beam s_length_utterance s_length_beam"
).split()
AUDIT = [
    Declaration(
        kernel=decode_self_attention_kernel,
        tile=name,
        signature={
            **dict.fromkeys(("query", "cache_key", "cache_value", "out"), "*T:16"),
            **dict.fromkeys(("freqs", "log_sums"), "*fp32:16"),
            "ancestors": "*u8:16",
            "lengths": "*i64:16",
            "scale": "fp32",
            **dict.fromkeys(_SIZES, "i32"),
            **dict.fromkeys(_STRIDES, "i32:16"),
        },
        constants=lambda size: {
            "HEAD_DIM": size,
            "SIZE": padded(size),
            "INTERPRETED": False,
            "s_ancestor_position": 1,
        },
        variants={
            "shared": {"FOLLOW": "shared", "log_sums": None},
            **{follow: {"FOLLOW": follow} for follow in ("alone", "gathered")},
        },
        matrix=name == _MANY,
    )
    for name in (_FEW, _MANY)
]
