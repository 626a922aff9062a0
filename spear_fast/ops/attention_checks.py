"""What must hold for the arguments of `attention` and `attention_backward`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from spear_fast.ops.attention_arguments import AttentionArgs, AttentionBackwardArgs
from spear_fast.ops.checks import check_common, check_shapes, refuse, shape_of


def _check_packing(
    op: str, query: Tensor, key: Tensor, cu_query: Tensor, cu_key: Tensor, max_query: int, max_key: int
) -> None:
    if cu_query.dim() != 1 or cu_query.shape[0] == 0:
        refuse(op, "cu_query", "[sequences + 1]", shape_of(cu_query), "pass cumulative lengths, from 0")
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


def _refuse_lone(op: str, args: AttentionArgs | AttentionBackwardArgs, *pairs: tuple[str, str]) -> None:
    for pair in pairs:
        there = [name for name in pair if getattr(args, name) is not None]
        if len(there) == 1:
            missing = pair[1 - pair.index(there[0])]
            refuse(op, missing, f"given with {there[0]}", "None", f"pass both or leave out {there[0]}")


def check_attention(
    op: str, args: AttentionArgs | AttentionBackwardArgs, others: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Raises ValueError unless the arguments fit each other; providers look at the numbers of cu_query and cu_key.

    others: further tensors that must be of query's device and dtype.
    """
    query, key, value = args.query, args.key, args.value
    key_mask, cu_query, cu_key, freqs, seed = args.key_mask, args.cu_query, args.cu_key, args.freqs, args.seed
    if (cu_query is None) != (cu_key is None) or (args.null_key is None) != (args.null_value is None):
        _refuse_lone(op, args, ("cu_query", "cu_key"), ("null_key", "null_value"))
    _check_layout(op, query, key, value, cu_query is not None)
    size, kv_heads = query.shape[-1], key.shape[-2]
    integers: dict[str, tuple[Tensor, torch.dtype]] = {}
    if cu_query is not None and cu_key is not None:
        _check_packing(op, query, key, cu_query, cu_key, args.max_query, args.max_key)
        integers |= {"cu_query": (cu_query, torch.int32), "cu_key": (cu_key, torch.int32)}
        if key_mask is not None:
            refuse(op, "key_mask", "None with packed rows", shape_of(key_mask), "leave masked keys out of the packing")
    if key_mask is not None:
        if key_mask.shape != key.shape[:2]:
            check_shapes(op, {"key_mask": (key_mask, "batch, key_length", tuple(key.shape[:2]))})
        integers["key_mask"] = key_mask, torch.bool
    tensors = {"query": query, "key": key, "value": value, **others}
    if args.null_key is not None and args.null_value is not None:
        for name, null in (("null_key", args.null_key), ("null_value", args.null_value)):
            if null.shape != (kv_heads, size):
                check_shapes(op, {name: (null, "kv_heads, head_dim", (kv_heads, size))})
            tensors[name] = null
    if freqs is not None:
        if size % 2:
            refuse(op, "head_dim", "even to be rotated", str(size), "leave out freqs")
        if freqs.shape != (size // 2,):
            check_shapes(op, {"freqs": (freqs, "head_dim / 2", (size // 2,))})
    if args.causal and query.shape[-3] != key.shape[-3]:
        wanted = f"as long as query ({query.shape[-3]}) where causal"
        refuse(op, "key", wanted, str(int(key.shape[-3])), "causal position i reads the keys 0..i")
    if not 0 <= args.dropout < 1:
        refuse(op, "dropout", "in 0..1 and below 1", str(args.dropout), "it is the probability of a dropped weight")
    if args.dropout > 0 and seed is None:
        refuse(op, "seed", "an int64 tensor where there is dropout", "None", "draw one with torch.randint")
    if seed is not None:
        if seed.dim() != 0:
            check_shapes(op, {"seed": (seed, "", ())})
        integers["seed"] = seed, torch.int64
    check_common(op, "query", tensors, freqs, integers)
