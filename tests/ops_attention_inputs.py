"""Inputs for `attention`: random, of any size, with every option, as the op's positional arguments."""

from __future__ import annotations

from typing import Any

import torch
from ops_inputs import frequencies
from torch import Tensor

from spear_fast import ops
from spear_fast.ops.attention_arguments import AttentionArgs

# positions of the arguments that get gradients
QUERY, KEY, VALUE, NULL_KEY, NULL_VALUE = map(
    AttentionArgs._fields.index, ("query", "key", "value", "null_key", "null_value")
)


def strided(tensor: Tensor) -> Tensor:
    """Returns the same numbers at twice the distance in every dimension but the last, NaN between them."""
    wide = torch.full([2 * size for size in tensor.shape[:-1]] + [tensor.shape[-1]], torch.nan, dtype=tensor.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape[:-1])]
    view.copy_(tensor)
    return view


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make(
    batch: int = 2,
    length: int = 7,
    key_length: int | None = None,
    heads: int = 4,
    kv_heads: int | None = None,
    size: int = 8,
    *,
    lengths: list[int] | None = None,
    key_lengths: list[int] | None = None,
    mask: str | None = None,
    null: bool = False,
    rotary: bool = False,
    causal: bool = False,
    modulo: bool = False,
    dropout: float = 0.0,
    spread: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Any]:
    """Returns the arguments of `attention`, by position.

    lengths, key_lengths: packed sequences of these lengths, instead of `batch` rows.
    mask: "random", with a row that reads no key where there is more than one, or "none" for rows that read nothing.
    spread: strided query, key and value.
    """
    kv_heads = kv_heads or heads
    key_length = length if key_length is None else key_length
    if lengths is None:
        rows, key_rows = (batch, length), (batch, key_length)
        packing: list[Any] = [None, None, 0, 0]
    else:
        key_lengths = lengths if key_lengths is None else key_lengths
        rows, key_rows = (sum(lengths),), (sum(key_lengths),)
        packing = [offsets(lengths), offsets(key_lengths), max(lengths, default=0), max(key_lengths, default=0)]
    query = torch.randn(*rows, heads, size, dtype=dtype)
    key, value = (torch.randn(*key_rows, kv_heads, size, dtype=dtype) for _ in range(2))
    if spread:
        query, key, value = map(strided, (query, key, value))
    key_mask = None
    if mask is not None:
        key_mask = torch.rand(batch, key_length) < (0.6 if mask == "random" else 0)
        if batch > 1:
            key_mask[0] = False
    null_key, null_value = (torch.randn(kv_heads, size, dtype=dtype) if null else None for _ in range(2))
    freqs = frequencies(size) if rotary else None
    seed = torch.randint(2**63 - 1, ()) if dropout else None
    return [query, key, value, key_mask, *packing, null_key, null_value, freqs, causal, modulo, dropout, seed]


def wanting(arguments: list[Any]) -> list[int]:
    """Returns the positions of the arguments that get gradients."""
    return [i for i in (QUERY, KEY, VALUE, NULL_KEY, NULL_VALUE) if arguments[i] is not None]


def by_position(*arguments: Any) -> Tensor:
    """Calls the public function with the op's positional arguments."""
    named = AttentionArgs(*arguments)._asdict()
    if named["cu_query"] is None:
        del named["max_query"], named["max_key"]
    return ops.attention(named.pop("query"), named.pop("key"), named.pop("value"), **named)


CASES = {
    "plain": {},
    "one of everything": {"batch": 1, "length": 1, "heads": 1, "size": 1},
    "one key": {"length": 5, "key_length": 1, "heads": 3, "size": 5},
    "primes": {"batch": 3, "length": 13, "key_length": 37, "heads": 5, "size": 7},
    "a block and one": {"batch": 1, "length": 65, "key_length": 129, "heads": 2, "size": 64},
    "a block less one": {"batch": 1, "length": 63, "key_length": 31, "heads": 1, "size": 80},
    "no rows": {"batch": 0},
    "no queries": {"length": 0, "key_length": 5},
    "no keys": {"length": 5, "key_length": 0},
    "no keys but null": {"length": 2, "key_length": 0, "heads": 2, "size": 4, "null": True},
    "strided": {"spread": True, "kv_heads": 2, "rotary": True},
    "masked": {"mask": "random", "length": 17, "key_length": 35},
    "all masked": {"mask": "none"},
    "all masked but null": {"mask": "none", "null": True},
    "causal": {"length": 35, "causal": True, "batch": 1},
    "causal masked": {"length": 19, "causal": True, "mask": "random"},
    "grouped": {"heads": 6, "kv_heads": 2},
    "grouped modulo": {"heads": 6, "kv_heads": 2, "modulo": True},
    "one kv head": {"heads": 3, "kv_heads": 1, "causal": True},
    "null": {"null": True, "key_length": 33},
    "rotary": {"rotary": True, "length": 21, "key_length": 34, "size": 10},
    "dropout": {"dropout": 0.3, "length": 11, "key_length": 18},
    "all": {
        "length": 18,
        "heads": 4,
        "kv_heads": 2,
        "size": 16,
        "mask": "random",
        "null": True,
        "rotary": True,
        "causal": True,
        "modulo": True,
        "dropout": 0.2,
        "spread": True,
    },
    "packed": {"lengths": [3, 0, 17, 1], "key_lengths": [5, 2, 33, 0]},
    "packed causal rotary": {"lengths": [9, 1, 0, 20], "causal": True, "rotary": True, "kv_heads": 2},
    "packed all": {
        "lengths": [5, 1, 18],
        "kv_heads": 2,
        "null": True,
        "rotary": True,
        "causal": True,
        "modulo": True,
        "dropout": 0.2,
        "spread": True,
    },
    "packed nothing": {"lengths": [0, 0], "null": True},
    "packed no sequences": {"lengths": []},
}
