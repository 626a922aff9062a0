"""New keys, rotated, and values into the caches, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .blocks import padded, rows_apart
from .declaration import Declaration
from .rotation import cos_sin, rotate
from .tiles import tile


@triton.jit
def append_kv_kernel(
    key,
    value,
    freqs,
    positions,
    cache_key,
    cache_value,
    tokens,
    heads,
    length,
    s_key_row,
    s_key_token,
    s_key_head,
    s_value_row,
    s_value_token,
    s_value_head,
    s_position,
    s_cache_key_row,
    s_cache_key_head,
    s_cache_key_position,
    s_cache_key_size,
    s_cache_value_row,
    s_cache_value_head,
    s_cache_value_position,
    s_cache_value_size,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """A program writes one token of one row: HEADS at a time of its key/value heads."""
    i_row = (tl.program_id(0) // tokens).to(tl.int64)
    i_token = tl.program_id(0) % tokens
    o_head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    o_size = tl.arange(0, SIZE)
    o_pair = tl.arange(0, SIZE // 2)
    i_position = tl.load(positions + i_row * s_position) + i_token
    # nothing is ever written outside of the buffer, whatever the positions are
    o_position = i_position + tl.zeros([HEADS], tl.int64)
    m_head = (o_head < heads) & (o_position >= 0) & (o_position < length)
    m_block = m_head[:, None] & (o_size < HEAD_DIM)[None, :]

    p_key = key + i_row * s_key_row + i_token * s_key_token + o_head[:, None] * s_key_head + o_size[None, :]
    p_value = value + i_row * s_value_row + i_token * s_value_token + o_head[:, None] * s_value_head + o_size[None, :]
    b_key = tl.load(p_key, mask=m_block, other=0.0).to(tl.float32)
    b_value = tl.load(p_value, mask=m_block, other=0.0)
    b_freqs = tl.load(freqs + o_pair, mask=o_pair < HEAD_DIM // 2, other=0.0).to(tl.float32)
    b_cos, b_sin = cos_sin(i_position.to(tl.float32) * b_freqs)
    b_key = rotate(b_key, b_cos[None, :], b_sin[None, :])

    p_cache_key = cache_key + i_row * s_cache_key_row + i_position * s_cache_key_position
    p_cache_key += o_head[:, None] * s_cache_key_head + o_size[None, :] * s_cache_key_size
    p_cache_value = cache_value + i_row * s_cache_value_row + i_position * s_cache_value_position
    p_cache_value += o_head[:, None] * s_cache_value_head + o_size[None, :] * s_cache_value_size
    tl.store(p_cache_key, b_key.to(cache_key.dtype.element_ty), mask=m_block)
    tl.store(p_cache_value, b_value, mask=m_block)


def append_kv(
    key: Tensor, value: Tensor, freqs: Tensor, positions: Tensor, cache_key: Tensor, cache_value: Tensor
) -> None:
    """Writes `[rows, tokens, kv_heads, head_dim]` into `[rows, kv_heads, length, head_dim]`; see the op."""
    if key.numel() == 0:
        return
    rows, tokens, heads, size = key.shape
    key, value = rows_apart(key), rows_apart(value)
    blocks = tile("append_kv", key.device, size, key.dtype)
    append_kv_kernel[(rows * tokens, triton.cdiv(heads, blocks["HEADS"]))](
        key,
        value,
        freqs.contiguous(),
        positions,
        cache_key,
        cache_value,
        tokens,
        heads,
        cache_key.shape[2],
        *key.stride()[:3],
        *value.stride()[:3],
        positions.stride(0),
        *cache_key.stride(),
        *cache_value.stride(),
        HEAD_DIM=size,
        SIZE=padded(size, 2),
        **blocks,
    )


_STRIDES = (
    "s_key_row s_key_token s_key_head s_value_row s_value_token s_value_head s_cache_key_row s_cache_key_head "
    "s_cache_key_position s_cache_value_row s_cache_value_head s_cache_value_position"
).split()
AUDIT = [
    Declaration(
        kernel=append_kv_kernel,
        tile="append_kv",
        signature={
            **dict.fromkeys(("key", "value", "cache_key", "cache_value"), "*T:16"),
            "freqs": "*fp32:16",
            "positions": "*i64:16",
            **dict.fromkeys(("tokens", "heads", "length"), "i32"),
            **dict.fromkeys(_STRIDES, "i32:16"),
        },
        constants=lambda size: {
            "HEAD_DIM": size,
            "SIZE": padded(size, 2),
            **dict.fromkeys(("s_position", "s_cache_key_size", "s_cache_value_size"), 1),
        },
    )
]
