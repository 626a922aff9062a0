"""What must hold for the arguments of `attention` and `attention_backward`."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_fast.ops.checks import check_common, check_shapes, refuse, shape_of


def _check_packing(
    op: str, query: Tensor, key: Tensor, cu_query: Tensor, cu_key: Tensor, max_query: int, max_key: int
) -> None:
    if cu_query.dim() != 1 or cu_query.shape[0] == 0:
        refuse(op, "cu_query", "[sequences + 1]", shape_of(cu_query), "pass cumulative lengths, 0 in front")
    if cu_key.shape != cu_query.shape:
        check_shapes(op, {"cu_key": (cu_key, "sequences + 1", tuple(cu_query.shape))})
    for name, longest in (("max_query", max_query), ("max_key", max_key)):
        if longest < 0:
            refuse(op, name, "the longest length", str(longest), "leave it out to have it computed")
    if cu_query.shape[0] == 1 and (query.shape[0] or key.shape[0]):
        refuse(op, "cu_query", "[sequences + 1]", shape_of(cu_query), "name the end of each sequence")


def _check_layout(op: str, query: Tensor, key: Tensor, value: Tensor, packed: bool) -> None:
    dims = 3 if packed else 4
    rows, row, key_row = ("", "total", "total_keys") if packed else ("batch, ", "length", "key_length")
    advice = "leave out cu_query and cu_key for padded rows" if packed else "pass cu_query and cu_key with packed rows"
    if query.dim() != dims:
        refuse(op, "query", f"[{rows}{row}, heads, head_dim]", shape_of(query), advice)
    if key.dim() != dims or key.shape[-1] != query.shape[-1] or (not packed and key.shape[0] != query.shape[0]):
        wanted = f"[{rows}{key_row}, kv_heads, head_dim]"
        refuse(op, "key", f"{wanted} like query {shape_of(query)}", shape_of(key), "heads are next to last")
    if value.shape != key.shape:
        check_shapes(op, {"value": (value, f"{rows}{key_row}, kv_heads, head_dim", tuple(key.shape))})
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads < 1 or heads % kv_heads:
        refuse(op, "kv_heads", f"a divisor of the {heads} heads", str(kv_heads), "do not repeat the keys")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            refuse(op, name, "dense in its last dimension", f"stride {tensor.stride(-1)}", "call .contiguous()")


def check_attention(
    op: str,
    others: dict[str, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_query: Tensor | None,
    cu_key: Tensor | None,
    max_query: int,
    max_key: int,
    null_key: Tensor | None,
    null_value: Tensor | None,
    freqs: Tensor | None,
    causal: bool,
    modulo_heads: bool,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """Raises ValueError unless the arguments fit each other; providers look at the numbers of cu_query and cu_key.

    others: further tensors that must be of query's device and dtype.
    """
    for one, other, names in ((cu_query, cu_key, "cu_query,cu_key"), (null_key, null_value, "null_key,null_value")):
        if (one is None) != (other is None):
            missing, there = names.split(",")[:: 1 if one is None else -1]
            refuse(op, missing, f"given with {there}", "None", f"pass both or leave out {there}")
    packed = cu_query is not None
    _check_layout(op, query, key, value, packed)
    size, kv_heads = query.shape[-1], key.shape[-2]
    integers: dict[str, tuple[Tensor, torch.dtype]] = {}
    if cu_query is not None and cu_key is not None:
        _check_packing(op, query, key, cu_query, cu_key, max_query, max_key)
        integers |= {"cu_query": (cu_query, torch.int32), "cu_key": (cu_key, torch.int32)}
        if key_mask is not None:
            refuse(op, "key_mask", "None with packed rows", shape_of(key_mask), "leave masked keys out of the packing")
    if key_mask is not None:
        if key_mask.shape != key.shape[:2]:
            check_shapes(op, {"key_mask": (key_mask, "batch, key_length", tuple(key.shape[:2]))})
        integers["key_mask"] = key_mask, torch.bool
    tensors = {"query": query, "key": key, "value": value, **others}
    if null_key is not None and null_value is not None:
        for name, null in (("null_key", null_key), ("null_value", null_value)):
            if null.shape != (kv_heads, size):
                check_shapes(op, {name: (null, "kv_heads, head_dim", (kv_heads, size))})
            tensors[name] = null
    if freqs is not None:
        if size % 2:
            refuse(op, "head_dim", "even to be rotated", str(size), "leave out freqs")
        if freqs.shape != (size // 2,):
            check_shapes(op, {"freqs": (freqs, "head_dim / 2", (size // 2,))})
    if causal and query.shape[-3] != key.shape[-3]:
        wanted = f"as long as query ({query.shape[-3]}) where causal"
        refuse(op, "key", wanted, str(int(key.shape[-3])), "causal position i reads the keys 0..i")
    if not 0 <= dropout < 1:
        refuse(op, "dropout", "in 0..1 and below 1", str(dropout), "it is the probability of a dropped weight")
    if dropout > 0 and seed is None:
        refuse(op, "seed", "an int64 tensor where there is dropout", "None", "draw one with torch.randint")
    if seed is not None:
        if seed.dim() != 0:
            check_shapes(op, {"seed": (seed, "", ())})
        integers["seed"] = seed, torch.int64
    check_common(op, "query", tensors, freqs, integers)
