"""Attention over whole sequences, and its gradients, in plain torch.

Packed sequences are padded first: one definition serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spear_fast.ops.arguments import takes
from spear_fast.ops.attention_arguments import AttentionArgs, AttentionBackwardArgs
from spear_fast.ops.reference.decode_attention import rotate
from spear_fast.ops.reference.philox import dropout_mask
from spear_fast.ops.reference.ranges import check_offsets


@dataclass(frozen=True)
class Packing:
    """Where the tokens of packed sequences lie when padded: `rows` and `positions` are `[total]`, int64."""

    rows: Tensor
    positions: Tensor
    sequences: int
    longest: int

    @classmethod
    def of(cls, offsets: Tensor, total: int, longest: int) -> Packing:
        offsets, token = offsets.long(), torch.arange(total, device=offsets.device)
        rows = torch.searchsorted(offsets[1:].contiguous(), token, right=True)
        return cls(rows, token - offsets[rows], offsets.numel() - 1, longest)

    def pad(self, packed: Tensor) -> Tensor:
        """Returns `[sequences, longest, ...]`, zeros after each sequence, for `[total, ...]`."""
        padded = packed.new_zeros(self.sequences, self.longest, *packed.shape[1:])
        return padded.index_put((self.rows, self.positions), packed)

    def valid(self) -> Tensor:
        return self.pad(torch.ones_like(self.rows, dtype=torch.bool))

    def pack(self, padded: Tensor) -> Tensor:
        return padded[self.rows, self.positions]


def _packings(op: str, args: AttentionArgs | AttentionBackwardArgs) -> tuple[Packing, Packing] | None:
    """Returns how the queries and the keys are packed, or None where they are padded."""
    query, key, cu_query, cu_key = args.query, args.key, args.cu_query, args.cu_key
    if cu_query is None or cu_key is None:
        return None
    check_offsets(op, "cu_query", cu_query, query.shape[0], "max_query", args.max_query)
    check_offsets(op, "cu_key", cu_key, key.shape[0], "max_key", args.max_key)
    if args.causal and cu_query.device.type == "cpu" and not torch.equal(cu_query, cu_key):
        raise ValueError(f"{op}: cu_key must equal cu_query, got other lengths; causal positions read their own past")
    by_query = Packing.of(cu_query, query.shape[0], args.max_query)
    return by_query, Packing.of(cu_key, key.shape[0], args.max_key)


def _padded(args: Any, by_query: Packing, by_key: Packing) -> Any:
    """Returns the arguments for padded rows, whose keys past the end of each are masked."""
    return args._replace(
        query=by_query.pad(args.query),
        key=by_key.pad(args.key),
        value=by_key.pad(args.value),
        key_mask=by_key.valid(),
        cu_query=None,
        cu_key=None,
    )


def _heads_read(heads: int, kv_heads: int, modulo_heads: bool, device: torch.device) -> Tensor:
    head = torch.arange(heads, device=device)
    return head % kv_heads if modulo_heads else head // (heads // kv_heads)


def _rotate(x: Tensor, freqs: Tensor | None, sign: int = 1) -> Tensor:
    if freqs is None:
        return x
    return rotate(x, freqs, sign * torch.arange(x.shape[1], device=x.device))


def _with_null(null: Tensor | None, x: Tensor) -> Tensor:
    """Returns `[batch, length, heads, head_dim]` with `[heads, head_dim]` before each row, where there is one."""
    return x if null is None else torch.cat((null.expand(x.shape[0], 1, -1, -1), x), 1)


def _readable(args: AttentionArgs | AttentionBackwardArgs) -> Tensor:
    """Returns which keys a query reads, `[batch or 1, 1, length, keys]`, bool; the null key is the first of them."""
    length, keys = args.query.shape[1], args.key.shape[1]
    readable = torch.ones(1, 1, length, keys, dtype=torch.bool, device=args.query.device)
    if args.causal:
        readable = readable.tril()
    if args.key_mask is not None:
        readable = readable & args.key_mask[:, None, None]
    return readable if args.null_key is None else torch.nn.functional.pad(readable, (1, 0), value=True)


def _softmax(scores: Tensor, readable: Tensor) -> Tensor:
    """Returns the weights of the readable keys; zeros for a query that reads none."""
    return scores.masked_fill(~readable, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~readable, 0)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def _by_head(args: AttentionArgs | AttentionBackwardArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns scaled queries, keys and values, `[batch, heads, positions, head_dim]`, and the key head of each head."""
    read = _heads_read(args.query.shape[2], args.key.shape[2], args.modulo_heads, args.query.device)
    queries = (_rotate(args.query, args.freqs) * args.query.shape[-1] ** -0.5).transpose(1, 2)
    keys = _with_null(args.null_key, _rotate(args.key, args.freqs))[:, :, read].transpose(1, 2)
    values = _with_null(args.null_value, args.value)[:, :, read].transpose(1, 2)
    return queries, keys, values, read


@takes(AttentionArgs)
def attention(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    packings = _packings("attention", args)
    if packings is not None:
        out, lse = attention(*_padded(args, *packings))
        return packings[0].pack(out), packings[0].pack(lse.transpose(1, 2)).T.contiguous()

    queries, keys, values, _ = _by_head(args)
    readable = _readable(args)
    scores = (queries @ keys.mT).to(_precise(queries.dtype))
    lse = scores.detach().masked_fill(~readable, -torch.inf).logsumexp(-1)
    weights = _softmax(scores, readable)
    if args.dropout > 0 and args.seed is not None:
        weights = weights * dropout_mask(args.seed, weights.shape, args.dropout) / (1 - args.dropout)
    out = weights.to(queries.dtype) @ values
    return out.transpose(1, 2).contiguous(), lse


@takes(AttentionBackwardArgs)
def attention_backward(args: AttentionBackwardArgs) -> tuple[Tensor, ...]:
    packings = _packings("attention_backward", args)
    if packings is not None:
        by_query, by_key = packings
        out, lse = by_query.pad(args.out), by_query.pad(args.lse.T).transpose(1, 2)
        padded = _padded(args, *packings)._replace(grad_out=by_query.pad(args.grad_out), out=out, lse=lse)
        grad_query, grad_key, grad_value, *grad_null = attention_backward(*padded)
        return by_query.pack(grad_query), by_key.pack(grad_key), by_key.pack(grad_value), *grad_null

    # everything anew and in the precision of the statistics: where large numbers cancel, the rounding of what was saved
    # would be all that is left
    dtype, precise, null = args.query.dtype, _precise(args.query.dtype), args.null_key is not None
    tensors = {name: getattr(args, name).to(precise) for name in ("query", "key", "value", "grad_out")}
    args = args._replace(**tensors)
    queries, keys, values, read = _by_head(args)
    size, kv_heads = args.query.shape[-1], args.key.shape[2]
    grad = args.grad_out.transpose(1, 2)
    weights = _softmax(queries @ keys.mT, _readable(args))
    share = torch.ones_like(weights)
    if args.dropout > 0 and args.seed is not None:
        share = dropout_mask(args.seed, weights.shape, args.dropout).to(precise) / (1 - args.dropout)
    grad_weights = grad @ values.mT * share
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))

    def by_kv_head(gradient: Tensor) -> Tensor:
        """Returns `[batch, keys, kv_heads, head_dim]`: the sum over the query heads that read each of them."""
        summed = gradient.new_zeros(gradient.shape[0], kv_heads, *gradient.shape[2:])
        return summed.index_add(1, read, gradient).transpose(1, 2)

    grad_query = _rotate((grad_scores @ keys * size**-0.5).transpose(1, 2), args.freqs, -1)
    grad_keys, grad_values = by_kv_head(grad_scores.mT @ queries), by_kv_head((weights * share).mT @ grad)
    grad_null_key, grad_null_value = grad.new_empty(0), grad.new_empty(0)
    if null:
        grad_null_key, grad_null_value = grad_keys[:, 0].sum(0), grad_values[:, 0].sum(0)
        grad_keys, grad_values = grad_keys[:, 1:], grad_values[:, 1:]
    grads = grad_query, _rotate(grad_keys, args.freqs, -1), grad_values, grad_null_key, grad_null_value
    return tuple(each.to(dtype).contiguous() for each in grads)
