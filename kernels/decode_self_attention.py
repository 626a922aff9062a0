"""Attention of the newest tokens over their own histories, the ancestor table followed in place; it writes what is new.

A program takes one key/value head of one beam, one split of the positions, and as query rows the heads of the group ×
tokens: it gathers the beam's history. What beams share lies in the GPU's second-level cache when the next of them reads
it. The new keys and values come from the arguments, so that no program waits for another to write them.

Splits have a fixed size, so that an utterance's result has the same bits whatever else is in the batch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import INTERPRETED, inverse_rms, merge_splits, padded, product, rows_apart, softmax_step
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
    key,
    value,
    residual,
    out,
    log_sums,
    scale,
    root,
    beams,
    tokens,
    groups,
    repeats,
    buffer,
    dim,
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
    s_new_utterance,
    s_new_beam,
    s_new_token,
    s_new_head,
    s_residual,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """key, value: new ones, of the same strides, which the first split attends and writes; or both None.

    residual: `[utterances * beams * tokens, dim]`, see `inverse_rms`; or None. root: the square root of dim.
    log_sums: `[splits, rows]`, base 2; `out` is then each split's, `[splits, rows, HEAD_DIM]` in float32. Or None.
    tiles: of ROWS query rows, for the heads and tokens of one beam.
    """
    i_tile = tl.program_id(0) % tiles
    i_beam = (tl.program_id(0) // tiles) % beams
    i_group = (tl.program_id(0) // (tiles * beams)) % groups
    i_utterance = (tl.program_id(0) // (tiles * beams * groups)).to(tl.int64)
    i_split = tl.program_id(1)

    # query rows: head of the group, then token
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_row < repeats * tokens
    o_head = i_group * repeats + o_row // tokens
    o_token = o_row % tokens
    o_size = tl.arange(0, SIZE)
    o_pair = tl.arange(0, SIZE // 2)
    m_size = o_size < HEAD_DIM

    # the first of the new positions; a token reads up to itself
    length = tl.load(lengths + i_utterance * s_length_utterance + i_beam * s_length_beam)
    first = length - tokens
    b_limit = tl.where(m_row, tl.minimum(length, buffer) - tokens + o_token + 1, 0).to(tl.int32)
    # what all of them read: the first token's, or what was there before the new ones
    common = tl.minimum(length, buffer) - tokens + 1
    b_read = tl.minimum(b_limit, common.to(tl.int32))
    if key is not None:
        b_read = tl.minimum(b_limit, tl.minimum(first, buffer).to(tl.int32))
    begin = i_split * SPLIT_SIZE
    end = tl.minimum(tl.max(b_read, 0), begin + SPLIT_SIZE)

    b_freqs = tl.load(freqs + o_pair, mask=o_pair < HEAD_DIM // 2, other=0.0).to(tl.float32)
    p_query = query + i_utterance * s_query_utterance + i_beam * s_query_beam
    p_query += (o_token * s_query_token + o_head * s_query_head)[:, None] + o_size[None, :]
    b_query = tl.load(p_query, mask=m_row[:, None] & m_size[None, :], other=0.0).to(tl.float32)
    p_residual = residual
    if residual is not None:
        p_residual += (i_utterance * beams + i_beam) * tokens * s_residual
        b_inverse = tl.zeros([ROWS], tl.float32)
        for i_token in range(tokens):
            inverse = inverse_rms(p_residual + i_token * s_residual, dim, root, WIDTH)
            b_inverse = tl.where(o_token == i_token, inverse, b_inverse)
        b_query = b_query * b_inverse[:, None]
    b_cos, b_sin = cos_sin(tl.maximum(b_limit - 1, 0).to(tl.float32)[:, None] * b_freqs[None, :])
    b_query = rotate(b_query, b_cos, b_sin).to(query.dtype.element_ty)

    p_cache_key = cache_key + i_utterance * beams * s_key_row + i_group * s_key_head + o_size[None, :]
    p_cache_value = cache_value + i_utterance * beams * s_value_row + i_group * s_value_head + o_size[None, :]
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, SIZE], tl.float32)
    # what is compiled depends on the one, what runs on the other
    if key is not None:  # noqa: SIM102
        if i_split == 0:
            o_new = i_utterance * s_new_utterance + i_beam * s_new_beam + i_group * s_new_head
            for i_token in range(tokens):
                position = first + i_token
                p_new = (o_new + i_token * s_new_token) + o_size[None, :]
                b_new_key = tl.load(key + p_new, mask=m_size[None, :], other=0.0).to(tl.float32)
                b_new_value = tl.load(value + p_new, mask=m_size[None, :], other=0.0).to(tl.float32)
                if residual is not None:
                    new_inverse = inverse_rms(p_residual + i_token * s_residual, dim, root, WIDTH)
                    b_new_key = b_new_key * new_inverse
                    b_new_value = b_new_value * new_inverse
                b_new_cos, b_new_sin = cos_sin(tl.maximum(position, 0).to(tl.float32) * b_freqs[None, :])
                # as the cache will hold them
                b_new_key = rotate(b_new_key, b_new_cos, b_new_sin).to(cache_key.dtype.element_ty)
                b_new_value = b_new_value.to(cache_value.dtype.element_ty)
                # nothing is ever written outside of the buffer, whatever the lengths are
                o_written = position + tl.zeros([SIZE], tl.int64)
                m_new = m_size & (o_written >= 0) & (o_written < tl.where(i_tile == 0, buffer, 0))
                o_new_key = i_beam * s_key_row + position * s_key_position
                o_new_value = i_beam * s_value_row + position * s_value_position
                tl.store(p_cache_key + o_new_key, b_new_key, mask=m_new[None, :])
                tl.store(p_cache_value + o_new_value, b_new_value, mask=m_new[None, :])
                b_score = tl.sum(b_query.to(tl.float32) * b_new_key.to(tl.float32), 1) * scale
                b_score = tl.where(m_row & (o_token >= i_token) & (position >= 0), b_score, float("-inf"))
                b_weight, b_factor, b_max, b_sum = softmax_step(b_score[:, None], b_max, b_sum)
                # a weight of zero does not remove NaN or infinity: a token after this one may have them
                b_taken = tl.where(b_weight > 0.0, b_weight * b_new_value.to(tl.float32), 0.0)
                b_out = b_out * b_factor[:, None] + b_taken

    p_ancestors = ancestors + i_utterance * s_ancestor_utterance + i_beam * s_ancestor_beam
    for start in range(begin, end, BLOCK):
        o_position = start + tl.arange(0, BLOCK)
        m_position = o_position < end
        o_source = tl.load(p_ancestors + o_position * s_ancestor_position, mask=m_position, other=0).to(tl.int64)
        o_source = tl.minimum(o_source, beams - 1)
        m_block = m_position[:, None] & m_size[None, :]
        o_key = o_source * s_key_row + o_position * s_key_position
        o_value = o_source * s_value_row + o_position * s_value_position
        b_key = tl.load(p_cache_key + o_key[:, None], mask=m_block, other=0.0)
        b_value = tl.load(p_cache_value + o_value[:, None], mask=m_block, other=0.0)
        b_scores = product(b_query, tl.trans(b_key), INTERPRETED) * scale
        m_read = o_position[None, :] < tl.minimum(b_read, end)[:, None]
        b_scores = tl.where(m_read, b_scores, float("-inf"))
        b_weights, b_shrink, b_max, b_sum = softmax_step(b_scores, b_max, b_sum)
        b_out = b_out * b_shrink[:, None]
        b_out += product(b_weights.to(b_value.dtype), b_value, INTERPRETED)

    if key is None:
        # positions that later tokens alone read, one by one: what is NaN there must not reach the earlier ones
        for i_token in range(1, tokens):
            o_late = common + i_token - 1 + tl.zeros([1], tl.int64)
            m_here = (o_late >= begin) & (o_late < begin + SPLIT_SIZE) & (o_late >= 0)
            o_source = tl.load(p_ancestors + o_late * s_ancestor_position, mask=m_here, other=0).to(tl.int64)
            o_source = tl.minimum(o_source, beams - 1)
            m_late = m_size[None, :] & m_here[:, None]
            p_late_key = p_cache_key + (o_source * s_key_row + o_late * s_key_position)[:, None]
            p_late_value = p_cache_value + (o_source * s_value_row + o_late * s_value_position)[:, None]
            b_late_key = tl.load(p_late_key, mask=m_late, other=0.0).to(tl.float32)
            b_late_value = tl.load(p_late_value, mask=m_late, other=0.0).to(tl.float32)
            b_score = tl.sum(b_query.to(tl.float32) * b_late_key, 1) * scale
            b_score = tl.where(m_row & (o_token >= i_token) & m_here, b_score, float("-inf"))
            b_weight, b_factor, b_max, b_sum = softmax_step(b_score[:, None], b_max, b_sum)
            b_taken = tl.where(b_weight > 0.0, b_weight * b_late_value, 0.0)
            b_out = b_out * b_factor[:, None] + b_taken

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    heads = groups * repeats
    o_out = ((i_utterance * beams + i_beam) * tokens + o_token) * heads + o_head
    m_write = m_row
    if log_sums is not None:
        utterances = tl.num_programs(0) // (tiles * beams * groups)
        o_out += i_split * utterances.to(tl.int64) * beams * tokens * heads
        tl.store(log_sums + o_out, b_max + tl.log2(b_sum), mask=m_row)
        # the merge does not read what nobody wrote
        m_write = m_row & (b_max != float("-inf"))
    p_out = out + o_out[:, None] * HEAD_DIM + o_size[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_write[:, None] & m_size[None, :])


def decode_self_attention(
    query: Tensor,
    freqs: Tensor,
    cache_key: Tensor,
    cache_value: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Returns `[utterances, beams, tokens, heads, head_dim]`; see the op."""
    utterances, beams, tokens, heads, size = query.shape
    groups, buffer = cache_key.shape[1], cache_key.shape[2]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0 or buffer == 0:
        return out.zero_()
    query = rows_apart(query)
    if key is not None and value is not None:
        key, value = rows_apart(key), rows_apart(value)
        # slices of one projection have the same strides
        value = value if value.stride() == key.stride() else value.contiguous()
        key = key if value.stride() == key.stride() else key.contiguous()
    residual = None if residual is None else rows_apart(residual)
    dim = 1 if residual is None else residual.shape[1]
    blocks = tile("decode_self_attention", query.device, size, query.dtype)
    tiles = triton.cdiv(heads // groups * tokens, blocks["ROWS"])
    splits = triton.cdiv(buffer, blocks["SPLIT_SIZE"])
    count = out.numel() // size
    partial, log_sums = out, None
    if splits > 1:
        partial = torch.empty(splits, count, size, dtype=torch.float32, device=query.device)
        log_sums = torch.empty(splits, count, dtype=torch.float32, device=query.device)
    decode_self_attention_kernel[(utterances * groups * beams * tiles, splits)](
        query,
        freqs.contiguous(),
        cache_key,
        cache_value,
        ancestors,
        lengths,
        key,
        value,
        residual,
        partial,
        log_sums,
        size**-0.5 * math.log2(math.e),
        dim**0.5,
        beams,
        tokens,
        groups,
        heads // groups,
        buffer,
        dim,
        tiles,
        *query.stride()[:4],
        *cache_key.stride()[:3],
        *cache_value.stride()[:3],
        *ancestors.stride(),
        *lengths.stride(),
        *((0, 0, 0, 0) if key is None else key.stride()[:4]),
        0 if residual is None else residual.stride(0),
        HEAD_DIM=size,
        SIZE=padded(size),
        WIDTH=padded(dim),
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    if log_sums is not None:
        merge_splits(partial, log_sums, out)
    return out


_STRIDES = (
    "s_query_utterance s_query_beam s_query_token s_query_head s_key_row s_key_head s_key_position "
    "s_value_row s_value_head s_value_position s_new_utterance s_new_beam s_new_token s_new_head s_residual"
).split()
_SIZES = (
    "beams tokens groups repeats buffer dim tiles s_ancestor_utterance s_ancestor_beam s_length_utterance s_length_beam"
).split()
AUDIT = [
    Declaration(
        kernel=decode_self_attention_kernel,
        tile="decode_self_attention",
        signature={
            **dict.fromkeys(("query", "cache_key", "cache_value", "key", "value", "residual", "out"), "*T:16"),
            **dict.fromkeys(("freqs", "log_sums"), "*fp32:16"),
            "ancestors": "*u8:16",
            "lengths": "*i64:16",
            **dict.fromkeys(("scale", "root"), "fp32"),
            **dict.fromkeys(_SIZES, "i32"),
            **dict.fromkeys(_STRIDES, "i32:16"),
        },
        constants=lambda size: {
            "HEAD_DIM": size,
            "SIZE": padded(size),
            "WIDTH": 1024,
            "INTERPRETED": False,
            "s_ancestor_position": 1,
        },
        variants={
            "attend": {"log_sums": None, "key": None, "value": None, "residual": None},
            "normed": {"log_sums": None, "residual": None},
            "splits": {},
            "": {"log_sums": None},
        },
    )
]
