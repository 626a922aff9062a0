"""Attention of the newest tokens over what came before them, on caches that are never moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spear_fast.ops import backends
from spear_fast.ops.checks import FLOATS, check_common, check_residual, check_shapes, refuse, shape_of
from spear_fast.ops.providers import register
from spear_fast.ops.reference import decode_attention as reference
from spear_fast.ops.registry import define


def append_kv(
    key: Tensor, value: Tensor, freqs: Tensor, positions: Tensor, cache_key: Tensor, cache_value: Tensor
) -> None:
    """Writes each row's new keys, rotated at their positions, and values into the caches, in place.

    key, value: `[rows, tokens, kv_heads, head_dim]`, floating point, the keys not yet rotated.
    freqs: `[head_dim / 2]`, float32; the pair (2i, 2i + 1) is rotated by `position * freqs[i]`.
    positions: `[rows]`, int64, in 0..length - tokens; token t goes to `positions[row] + t`.
    cache_key, cache_value: `[rows, kv_heads, length, head_dim]`, like key; nothing else of them changes.

    Raises ValueError where the arguments do not fit each other, or a position lies outside of the caches.
    Source: the cache of the reference's attention (reference line 239), which holds keys before their rotation.
    """
    return _append_kv(key, value, freqs, positions, cache_key, cache_value)


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
    """Returns each hypothesis' attention over its own history, `[utterances, beams, tokens, heads, head_dim]`.

    Token t of T is at position `lengths - T + t` and reads the positions up to its own. With a key and a value these
    are first written there, the key rotated: `append_kv` in the same launch.

    query: `[utterances, beams, tokens, heads, head_dim]`, not yet rotated: that happens here.
    freqs: `[head_dim / 2]`, float32.
    cache_key, cache_value: `[utterances * beams, kv_heads, length, head_dim]`, keys rotated; see `append_kv`.
    ancestors: `[utterances, beams, length]`, uint8; the beam index, 0..beams - 1, under which position t
        of this hypothesis was written. Neither it nor the caches are read at or past `lengths`.
    lengths: `[utterances, beams]`, int64; positions that are written, those of all tokens included. A token that finds
        itself before the first position gives zeros. With a key at least T; then the ancestors at the tokens' own
        positions are the hypothesis' own beam index, and no other hypothesis reads what is written there.
    key, value: `[utterances, beams, tokens, kv_heads, head_dim]`, like query, the key not yet rotated; or None, both.
    residual: `[utterances * beams * tokens, dim]`, like query; or None. Query, key and value were projected from its
        rows without the norm before: here they are multiplied by `sqrt(dim) / max(||row||, 1e-12)`, in float32.

    Raises ValueError where the arguments do not fit each other, or lengths or ancestors lie outside of the caches.
    Source: attention of the reference over its cache (reference line 221).
    """
    return _decode_self_attention(query, freqs, cache_key, cache_value, ancestors, lengths, key, value, residual)


def _check_append_kv(
    key: Tensor, value: Tensor, freqs: Tensor, positions: Tensor, cache_key: Tensor, cache_value: Tensor
) -> None:
    """Raises ValueError unless the arguments of `append_kv` fit each other; providers check the ranges of integers."""
    op, dtype, device = "append_kv", key.dtype, key.device
    if key.dim() != 4:
        refuse(op, "key", "[rows, tokens, kv_heads, head_dim]", shape_of(key), "pass the new keys of each row")
    if cache_key.dim() != 4:
        refuse(op, "cache_key", "[rows, kv_heads, length, head_dim]", shape_of(cache_key), "pass the whole buffer")
    rows, tokens, groups, size = key.shape
    shape = (rows, groups, cache_key.shape[2], size)
    if (
        value.shape != key.shape
        or cache_key.shape != shape
        or cache_value.shape != shape
        or freqs.shape != (size // 2,)
        or positions.shape != (rows,)
    ):
        check_shapes(
            op,
            {
                "value": (value, "rows, tokens, kv_heads, head_dim", key.shape),
                "cache_key": (cache_key, "rows, kv_heads, length, head_dim", shape),
                "cache_value": (cache_value, "rows, kv_heads, length, head_dim", shape),
                "freqs": (freqs, "head_dim / 2", (size // 2,)),
                "positions": (positions, "rows", (rows,)),
            },
        )
    if tokens > cache_key.shape[2]:
        refuse(op, "tokens", f"at most the caches' length {cache_key.shape[2]}", str(tokens), "make the caches longer")
    if size % 2:
        refuse(op, "head_dim", "even", str(size), "rotation takes pairs of numbers")
    if not (
        value.dtype == cache_key.dtype == cache_value.dtype == dtype
        and value.device == freqs.device == positions.device == cache_key.device == cache_value.device == device
        and positions.dtype == torch.int64
        and freqs.dtype == torch.float32
        and dtype in FLOATS
    ):
        tensors = {"key": key, "value": value, "cache_key": cache_key, "cache_value": cache_value}
        check_common(op, "key", tensors, freqs, {"positions": (positions, torch.int64)})


def _check_decode_self_attention(
    query: Tensor,
    freqs: Tensor,
    cache_key: Tensor,
    cache_value: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Raises ValueError unless the arguments of `decode_self_attention` fit each other."""
    op, dtype, device = "decode_self_attention", query.dtype, query.device
    if query.dim() != 5:
        wanted = "[utterances, beams, tokens, heads, head_dim]"
        refuse(op, "query", wanted, shape_of(query), "pass the queries of each hypothesis' new tokens")
    if cache_key.dim() != 4:
        refuse(op, "cache_key", "[rows, kv_heads, length, head_dim]", shape_of(cache_key), "pass the whole buffer")
    utterances, beams, _, heads, size = query.shape
    groups, buffer = cache_key.shape[1], cache_key.shape[2]
    shape = (utterances * beams, groups, buffer, size)
    if (
        cache_key.shape != shape
        or cache_value.shape != shape
        or freqs.shape != (size // 2,)
        or ancestors.shape != (utterances, beams, buffer)
        or lengths.shape != (utterances, beams)
    ):
        check_shapes(
            op,
            {
                "cache_key": (cache_key, "utterances * beams, kv_heads, length, head_dim", shape),
                "cache_value": (cache_value, "utterances * beams, kv_heads, length, head_dim", shape),
                "freqs": (freqs, "head_dim / 2", (size // 2,)),
                "ancestors": (ancestors, "utterances, beams, length", (utterances, beams, buffer)),
                "lengths": (lengths, "utterances, beams", (utterances, beams)),
            },
        )
    if size % 2:
        refuse(op, "head_dim", "even", str(size), "rotation takes pairs of numbers")
    if groups == 0 or heads % groups:
        refuse(
            op, "kv_heads", f"a divisor of the {heads} heads", str(groups), "each key head serves as many query heads"
        )
    if beams > 256:
        refuse(op, "beams", "at most 256", str(beams), "an ancestor is one byte; use fewer beams")
    if not (
        cache_key.dtype == cache_value.dtype == dtype
        and freqs.device == cache_key.device == cache_value.device == ancestors.device == lengths.device == device
        and ancestors.dtype == torch.uint8
        and lengths.dtype == torch.int64
        and freqs.dtype == torch.float32
        and dtype in FLOATS
    ):
        tensors = {"query": query, "cache_key": cache_key, "cache_value": cache_value}
        integers = {"ancestors": (ancestors, torch.uint8), "lengths": (lengths, torch.int64)}
        check_common(op, "query", tensors, freqs, integers)
    if key is not None or value is not None:
        _check_new(query, groups, buffer, key, value)
    check_residual(op, query, "query", 3, residual)


def _check_new(query: Tensor, groups: int, buffer: int, key: Tensor | None, value: Tensor | None) -> None:
    """Raises ValueError unless the new keys and values fit the queries."""
    op, names = "decode_self_attention", "utterances, beams, tokens, kv_heads, head_dim"
    if key is None or value is None:
        refuse(op, "key and value", "given together", "one of them", "pass both, or neither")
    shape = (*query.shape[:3], groups, query.shape[4])
    if key.shape != shape or value.shape != shape:
        check_shapes(op, {"key": (key, names, shape), "value": (value, names, shape)})
    if query.shape[2] > buffer:
        refuse(op, "tokens", f"at most the caches' length {buffer}", str(query.shape[2]), "make the caches longer")
    if not (key.dtype == value.dtype == query.dtype and key.device == value.device == query.device):
        check_common(op, "query", {"query": query, "key": key, "value": value}, None, {})


def _fake_append_kv(*arguments: Tensor) -> None:
    _check_append_kv(*arguments)


def _fake_decode_self_attention(query: Tensor, *arguments: Any) -> Tensor:
    _check_decode_self_attention(query, *arguments)
    return query.new_empty(query.shape)


_append_kv = define(
    "append_kv",
    "(Tensor key, Tensor value, Tensor freqs, Tensor positions, Tensor(a!) cache_key, Tensor(b!) cache_value) -> ()",
    check=_check_append_kv,
    fake=_fake_append_kv,
    native=("cpu",),
)
_decode_self_attention = define(
    "decode_self_attention",
    "(Tensor query, Tensor freqs, Tensor(a!) cache_key, Tensor(b!) cache_value, Tensor ancestors, Tensor lengths, "
    "Tensor? key, Tensor? value, Tensor? residual) -> Tensor",
    check=_check_decode_self_attention,
    fake=_fake_decode_self_attention,
    native=("cpu",),
)
for _op in ("append_kv", "decode_self_attention"):
    register(backends.cpu(_op))
    register(backends.triton(_op, _op))
    register(backends.reference(_op, reference))
