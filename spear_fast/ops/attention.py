"""Attention over whole sequences, padded or packed, for training and encoding, with its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spear_fast.ops import attention_peers as peers
from spear_fast.ops import attention_sdpa as sdpa
from spear_fast.ops import backends
from spear_fast.ops.arguments import takes
from spear_fast.ops.attention_arguments import (
    AttentionArgs,
    AttentionBackwardArgs,
    backward_options_of,
    options_of,
)
from spear_fast.ops.attention_checks import check_attention
from spear_fast.ops.checks import check_shapes, refuse
from spear_fast.ops.providers import Provider, ProviderQuery, register
from spear_fast.ops.reference import attention as reference
from spear_fast.ops.registry import define, differentiate


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    cu_query: Tensor | None = None,
    cu_key: Tensor | None = None,
    max_query: int | None = None,
    max_key: int | None = None,
    null_key: Tensor | None = None,
    null_value: Tensor | None = None,
    freqs: Tensor | None = None,
    causal: bool = False,
    modulo_heads: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Returns `softmax(query · key / sqrt(head_dim)) · value`, like query; with `return_lse` also the log-sum-exp.

    Rows are padded, `[batch, length, ...]`, or, with `cu_query` and `cu_key`, packed one after the other, `[total,
    ...]`. A query with no key to read gives zeros.

    query: `[batch, length, heads, head_dim]` or `[total, heads, head_dim]`, floating point.
    key, value: `[batch, key_length, kv_heads, head_dim]` or `[total_keys, kv_heads, head_dim]`. Query head h reads
        head `h // (heads // kv_heads)`, or with `modulo_heads` head `h % kv_heads`.
    key_mask: `[batch, key_length]`, bool; False where a key is not read (it may hold any finite numbers).
    cu_query, cu_key: `[sequences + 1]`, int32; cumulative lengths, from 0.
    max_query, max_key: the longest lengths; computed where left out, which waits for a GPU and breaks a graph.
    null_key, null_value: `[kv_heads, head_dim]`; a position before the keys that is always read, never rotated.
    freqs: `[head_dim / 2]`, float32; rotates query and key, the pair (2i, 2i + 1) by `position * freqs[i]`, positions
        counted from 0 in each row. Gradients are those of the unrotated query and key; freqs gets none.
    causal: position i reads the keys 0..i, and the null key; query and key are of the same lengths.
    dropout: probability with which a weight is dropped; the others are divided by `1 - dropout`.
    seed: `[]`, int64; the same seed drops the same weights, whoever computes them. Drawn from torch's generator where
        it is left out.
    return_lse: also return the natural logarithm of the sum of the exponentials of the scaled scores, `[batch, heads,
        length]` or `[heads, total]`, float32 (float64 for float64), -inf where no key is read; it has no gradient.

    Raises ValueError where the arguments do not fit each other, or offsets do not rise from 0 to the total.
    Source: attention of the reference (reference line 221), with its null key (reference line 249).
    Keeps query, key, value, the result and its log-sum-exp for the gradients, and nothing of size length × length.
    Source of dropout's draws: Philox-4x32-10 with the seed as key and (key, query, row * heads + head, 0) as counter;
    a weight is kept where the upper 24 bits of the first word are at least `dropout * 2**24`.
    """
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    if cu_query is not None and max_query is None:
        max_query = _longest(cu_query)
    if cu_key is not None and max_key is None:
        max_key = _longest(cu_key)
    if dropout > 0 and seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=query.device)
    packing = key_mask, cu_query, cu_key, max_query or 0, max_key or 0
    options = null_key, null_value, freqs, causal, modulo_heads, float(dropout), seed
    out, lse = _attention(query, key, value, *packing, *options)
    return (out, lse) if return_lse else out


def _longest(offsets: Tensor) -> int:
    return int(offsets.long().diff().max()) if offsets.dim() == 1 and offsets.shape[0] > 1 else 0


def _check(*arguments: Any) -> None:
    check_attention("attention", AttentionArgs(*arguments))


@takes(AttentionBackwardArgs)
def _check_backward(args: AttentionBackwardArgs) -> None:
    op, query, lse = "attention_backward", args.query, args.lse
    others = {"grad_out": args.grad_out, "out": args.out}
    names = "batch, length, heads, head_dim" if query.dim() == 4 else "total, heads, head_dim"
    check_shapes(op, {name: (tensor, names, tuple(query.shape)) for name, tensor in others.items()})
    check_attention(op, args, others)
    names, shape = _lse_shape(query)
    check_shapes(op, {"lse": (lse, names, shape)})
    precise = torch.promote_types(torch.float32, query.dtype)
    if lse.dtype != precise or lse.device != query.device:
        refuse(op, "lse", f"{precise} on {query.device}", f"{lse.dtype} on {lse.device}", "pass what attention gave")


def _lse_shape(query: Tensor) -> tuple[str, tuple[int, ...]]:
    if query.dim() == 3:
        return "heads, total", (query.shape[1], query.shape[0])
    return "batch, heads, length", (query.shape[0], query.shape[2], query.shape[1])


def _fake(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _check(query, *others)
    lse = query.new_empty(_lse_shape(query)[1], dtype=torch.promote_types(torch.float32, query.dtype))
    return query.new_empty(query.shape), lse


@takes(AttentionBackwardArgs)
def _fake_backward(args: AttentionBackwardArgs) -> tuple[Tensor, ...]:
    _check_backward(*args)
    query, null = args.query, (0,) if args.null_key is None else args.null_key.shape
    rows = query, args.key, args.value
    return *(each.new_empty(each.shape) for each in rows), query.new_empty(null), query.new_empty(null)


_OPTIONS = (
    "Tensor? key_mask, Tensor? cu_query, Tensor? cu_key, int max_query, int max_key, Tensor? null_key, "
    "Tensor? null_value, Tensor? freqs, bool causal, bool modulo_heads, float dropout, Tensor? seed)"
)
_attention = define(
    "attention",
    f"(Tensor query, Tensor key, Tensor value, {_OPTIONS} -> (Tensor out, Tensor lse)",
    check=_check,
    fake=_fake,
    options=options_of,
    native=("cpu",),
)
_attention_backward = define(
    "attention_backward",
    f"(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_OPTIONS} -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_null_key, Tensor grad_null_value)",
    check=_check_backward,
    fake=_fake_backward,
    options=backward_options_of,
    native=("cpu",),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *(each if isinstance(each, Tensor) else None for each in inputs))
    ctx.numbers = [None if isinstance(each, Tensor) else each for each in inputs]


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    both = zip(tensors, ctx.numbers, strict=True)
    args = AttentionArgs(*(number if tensor is None else tensor for tensor, number in both))
    grads = _attention_backward(*args.backward(grad_out.contiguous(), out, lse))
    named = dict(zip(("query", "key", "value", "null_key", "null_value"), grads, strict=True))
    return tuple(None if value is None else named.get(name) for name, value in args._asdict().items())


differentiate("attention", _differentiate, _save)


def _triton_why_not(query: ProviderQuery) -> str | None:
    if query.size > 128:
        return f"takes heads of up to 128 numbers, not {query.size}"
    return backends.of_dtypes(*backends.TRITON_DTYPES)(query)


for _op in ("attention", "attention_backward"):
    register(backends.cpu(_op))
    register(backends.triton(_op, "attention", _triton_why_not))
    register(Provider(_op, "sdpa", getattr(sdpa, _op), ("cpu", "cuda"), why_not=sdpa.why_not, fastest=sdpa.fastest))
    register(peers.flash_attn(_op))
    register(peers.xformers(_op))
    register(backends.reference(_op, reference))
