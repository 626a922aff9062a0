"""Attention over whole sequences, and its gradients, in plain torch.

Packed sequences are padded first: one definition serves both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        """Returns `[sequences, longest, ...]`, zeros behind each sequence, for `[total, ...]`."""
        padded = packed.new_zeros(self.sequences, self.longest, *packed.shape[1:])
        return padded.index_put((self.rows, self.positions), packed)

    def valid(self) -> Tensor:
        return self.pad(torch.ones_like(self.rows, dtype=torch.bool))

    def pack(self, padded: Tensor) -> Tensor:
        return padded[self.rows, self.positions]


def _packings(
    op: str, query: Tensor, key: Tensor, cu_query: Tensor, cu_key: Tensor, max_query: int, max_key: int, causal: bool
) -> tuple[Packing, Packing]:
    check_offsets(op, "cu_query", cu_query, query.shape[0], "max_query", max_query)
    check_offsets(op, "cu_key", cu_key, key.shape[0], "max_key", max_key)
    if causal and cu_query.device.type == "cpu" and not torch.equal(cu_query, cu_key):
        raise ValueError(f"{op}: cu_key must equal cu_query, got other lengths; causal positions read their own past")
    return Packing.of(cu_query, query.shape[0], max_query), Packing.of(cu_key, key.shape[0], max_key)


def _heads_read(heads: int, kv_heads: int, modulo_heads: bool, device: torch.device) -> Tensor:
    head = torch.arange(heads, device=device)
    return head % kv_heads if modulo_heads else head // (heads // kv_heads)


def _rotate(x: Tensor, freqs: Tensor | None, sign: int = 1) -> Tensor:
    if freqs is None:
        return x
    return rotate(x, freqs, sign * torch.arange(x.shape[1], device=x.device))


def _in_front(null: Tensor | None, x: Tensor) -> Tensor:
    """Returns `[batch, length, heads, head_dim]` with `[heads, head_dim]` in front of each row, where there is one."""
    return x if null is None else torch.cat((null.expand(x.shape[0], 1, -1, -1), x), 1)


def _readable(batch: int, length: int, keys: int, key_mask: Tensor | None, null: bool, causal: bool, like: Tensor):
    """Returns which keys a query reads, `[batch or 1, 1, length, keys]`, bool; the null key is in front of `keys`."""
    readable = torch.ones(1, 1, length, keys, dtype=torch.bool, device=like.device)
    if causal:
        readable = readable.tril()
    if key_mask is not None:
        readable = readable & key_mask[:, None, None]
    return torch.nn.functional.pad(readable, (1, 0), value=True) if null else readable


def _softmax(scores: Tensor, readable: Tensor) -> Tensor:
    """Returns the weights of the readable keys; zeros for a query that reads none."""
    return scores.masked_fill(~readable, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~readable, 0)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def attention(
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
) -> tuple[Tensor, Tensor]:
    if cu_query is not None and cu_key is not None:
        by_query, by_key = _packings("attention", query, key, cu_query, cu_key, max_query, max_key, causal)
        padded = by_query.pad(query), by_key.pad(key), by_key.pad(value), by_key.valid(), None, None, 0, 0
        out, lse = attention(*padded, null_key, null_value, freqs, causal, modulo_heads, dropout, seed)
        return by_query.pack(out), by_query.pack(lse.transpose(1, 2)).T.contiguous()

    batch, length, heads, size = query.shape
    read = _heads_read(heads, key.shape[2], modulo_heads, query.device)
    keys = _in_front(null_key, _rotate(key, freqs))[:, :, read].transpose(1, 2)
    values = _in_front(null_value, value)[:, :, read].transpose(1, 2)
    scores = (_rotate(query, freqs) * size**-0.5).transpose(1, 2) @ keys.mT
    readable = _readable(batch, length, key.shape[1], key_mask, null_key is not None, causal, query)
    scores = scores.to(_precise(query.dtype))
    lse = scores.detach().masked_fill(~readable, -torch.inf).logsumexp(-1)
    weights = _softmax(scores, readable)
    if dropout > 0 and seed is not None:
        weights = weights * dropout_mask(seed, weights.shape, dropout) / (1 - dropout)
    out = weights.to(query.dtype) @ values
    return out.transpose(1, 2).contiguous(), lse


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
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
) -> tuple[Tensor, ...]:
    if cu_query is not None and cu_key is not None:
        by_query, by_key = _packings("attention_backward", query, key, cu_query, cu_key, max_query, max_key, causal)
        grad_query, grad_key, grad_value, *grad_null = attention_backward(
            by_query.pad(grad_out),
            by_query.pad(query),
            by_key.pad(key),
            by_key.pad(value),
            by_query.pad(out),
            by_query.pad(lse.T).transpose(1, 2),
            by_key.valid(),
            *(None, None, 0, 0),
            null_key,
            null_value,
            freqs,
            causal,
            modulo_heads,
            dropout,
            seed,
        )
        return by_query.pack(grad_query), by_key.pack(grad_key), by_key.pack(grad_value), grad_null[0], grad_null[1]

    # everything anew and in the precision of the statistics: where large numbers cancel, the rounding of what was saved
    # would be all that is left
    dtype, precise = query.dtype, _precise(query.dtype)
    query, key, value, grad_out = (each.to(precise) for each in (query, key, value, grad_out))
    batch, length, heads, size = query.shape
    read = _heads_read(heads, key.shape[2], modulo_heads, query.device)
    keys = _in_front(null_key, _rotate(key, freqs))[:, :, read].transpose(1, 2)
    values = _in_front(null_value, value)[:, :, read].transpose(1, 2)
    scaled = (_rotate(query, freqs) * size**-0.5).transpose(1, 2)
    grad = grad_out.transpose(1, 2)
    readable = _readable(batch, length, key.shape[1], key_mask, null_key is not None, causal, query)
    weights = _softmax(scaled @ keys.mT, readable)
    share = torch.ones_like(weights)
    if dropout > 0 and seed is not None:
        share = dropout_mask(seed, weights.shape, dropout).to(precise) / (1 - dropout)
    grad_weights = grad @ values.mT * share
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))

    def by_kv_head(gradient: Tensor) -> Tensor:
        """Returns `[batch, keys, kv_heads, head_dim]`: the sum over the query heads that read each of them."""
        summed = gradient.new_zeros(batch, key.shape[2], *gradient.shape[2:])
        return summed.index_add(1, read, gradient).transpose(1, 2)

    grad_query = _rotate((grad_scores @ keys * size**-0.5).transpose(1, 2), freqs, -1)
    grad_keys, grad_values = by_kv_head(grad_scores.mT @ scaled), by_kv_head((weights * share).mT @ grad)
    grad_null_key, grad_null_value = query.new_empty(0), query.new_empty(0)
    if null_key is not None:
        grad_null_key, grad_null_value = grad_keys[:, 0].sum(0), grad_values[:, 0].sum(0)
        grad_keys, grad_values = grad_keys[:, 1:], grad_values[:, 1:]
    grads = grad_query, _rotate(grad_keys, freqs, -1), grad_values, grad_null_key, grad_null_value
    return tuple(each.to(dtype).contiguous() for each in grads)
