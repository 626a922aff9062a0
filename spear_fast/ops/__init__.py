"""The operations that everything fast calls, each checked, with one definition and several providers.

`H` heads share `G` key/value heads: query head i reads key/value head `i // (H // G)`. Weights whose heads are grouped
otherwise are permuted when they are loaded. Scores are scaled by `head_dim ** -0.5`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spear_fast.ops.providers import Inputs, available, choose, chosen, forced
from spear_fast.ops.schema import CHECKS, LIBRARY, SCHEMAS

__all__ = ["append_kv", "available", "decode_cross_attention", "decode_self_attention", "forced"]


def _runner(op: str) -> Callable:
    """Returns the function that checks an op's arguments, picks the provider for the first one's kind and calls it."""
    check, memory = CHECKS[op], chosen(op)

    def run(first: Tensor, *others: Tensor) -> Tensor | None:
        check(first, *others)
        # a plain tuple equals the Inputs it was remembered under, and is quicker to make
        inputs = first.device, first.dtype, first.shape[-1]
        function = memory.get(inputs) or choose(op, Inputs(*inputs))
        return function(first, *others)

    return run


_run = {op: _runner(op) for op in SCHEMAS}
_run_append_kv = _run["append_kv"]
_run_decode_self_attention = _run["decode_self_attention"]
_run_decode_cross_attention = _run["decode_cross_attention"]


def append_kv(
    key: Tensor, value: Tensor, freqs: Tensor, positions: Tensor, cache_key: Tensor, cache_value: Tensor
) -> None:
    """Writes each row's new key, rotated at its position, and value into the caches, in place.

    key, value: `[rows, kv_heads, head_dim]`, floating point, the key not yet rotated.
    freqs: `[head_dim / 2]`, float32; the pair (2i, 2i + 1) is turned by `position * freqs[i]`.
    positions: `[rows]`, int64, in 0..length - 1.
    cache_key, cache_value: `[rows, kv_heads, length, head_dim]`, like key; nothing else of them changes.
    """
    if torch.compiler.is_compiling():
        return torch.ops.spear_fast.append_kv.default(key, value, freqs, positions, cache_key, cache_value)
    return _run_append_kv(key, value, freqs, positions, cache_key, cache_value)


def decode_self_attention(
    query: Tensor, freqs: Tensor, cache_key: Tensor, cache_value: Tensor, ancestors: Tensor, lengths: Tensor
) -> Tensor:
    """Returns each hypothesis' attention over its own history, `[utterances, beams, heads, head_dim]`.

    query: `[utterances, beams, heads, head_dim]`, not yet rotated: that happens here, at position `lengths - 1`.
    freqs: `[head_dim / 2]`, float32.
    cache_key, cache_value: `[utterances * beams, kv_heads, length, head_dim]`, keys rotated; see `append_kv`.
    ancestors: `[utterances, beams, length]`, uint8; the slot, 0..beams - 1 of the same utterance, in which position t
        of this hypothesis was written. Neither it nor the caches are read at or past `lengths`.
    lengths: `[utterances, beams]`, int64; positions to read, the query's own included. Zero gives zeros.
    """
    if torch.compiler.is_compiling():
        return torch.ops.spear_fast.decode_self_attention.default(
            query, freqs, cache_key, cache_value, ancestors, lengths
        )
    return _run_decode_self_attention(query, freqs, cache_key, cache_value, ancestors, lengths)


def decode_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, null_key: Tensor, null_value: Tensor, lengths: Tensor
) -> Tensor:
    """Returns each hypothesis' attention over its utterance's source, `[utterances, beams, heads, head_dim]`.

    query: `[utterances, beams, heads, head_dim]`.
    key, value: `[utterances, heads, source, head_dim]`, shared by the beams; any finite numbers past `lengths`.
    null_key, null_value: `[heads, head_dim]`; a learned position in front of the source that is always attended.
    lengths: `[utterances]`, int64, in 0..source.
    """
    if torch.compiler.is_compiling():
        return torch.ops.spear_fast.decode_cross_attention.default(query, key, value, null_key, null_value, lengths)
    return _run_decode_cross_attention(query, key, value, null_key, null_value, lengths)


# what a compiled graph calls: the same, seen from the dispatcher
for _op, _function in _run.items():
    LIBRARY.impl(_op, _function, "CompositeExplicitAutograd")
