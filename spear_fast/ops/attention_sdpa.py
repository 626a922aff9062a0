"""`attention` by torch's own kernels: its flash attention for the CPU, and the one for CUDA.

They are what `scaled_dot_product_attention` calls, called so that the log-sum-exp comes out as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.ops.attention_arguments import AttentionOptions
from spear_fast.ops.pointwise import rotary
from spear_fast.ops.providers import ProviderQuery

Maybe = Tensor | None


def why_not(query: ProviderQuery) -> str | None:
    """Returns why torch's kernels cannot compute `attention` for such a query, or None."""
    options = AttentionOptions(*query.options)
    if options.dropout:
        return "has no dropout by seed"
    if query.device.type == "cpu":
        return "takes no packed rows on the CPU" if options.packed else None
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"takes torch.float16 and torch.bfloat16 on CUDA, not {query.dtype}"
    if options.masked:
        return "takes no key mask on CUDA; pack the rows"
    if options.packed and (options.rotary or options.null):
        return f"has no {'rotation' if options.rotary else 'null key'} for packed rows"
    if options.modulo:
        return "reads key heads in consecutive groups only on CUDA"
    if query.size % 8 or query.size > 256:
        return f"takes head sizes that are multiples of 8 up to 256 on CUDA, not {query.size}"
    return None


def fastest(query: ProviderQuery) -> bool:
    """Returns whether torch's kernel is measured to be the fastest: on the CPU, where no key is masked or added."""
    options = AttentionOptions(*query.options)
    return query.device.type == "cpu" and not (options.masked or options.packed or options.null)


def _mask(query: Tensor, key_mask: Maybe, causal: bool, null: bool) -> tuple[Maybe, Maybe]:
    """Returns what is added to the scores, and which queries read none of the rows' keys, `[batch or 1, 1, length or
    1]`; None where the kernel knows by itself.

    null: whether a key that is always read stands in front.
    """
    if key_mask is None and not (causal and null):
        return None, None
    length = query.shape[1]
    readable = torch.ones(1, 1, 1, 1, dtype=torch.bool) if key_mask is None else key_mask[:, None, None]
    if causal:
        readable = readable & torch.ones(length, length, dtype=torch.bool).tril()
    empty = ~readable.any(-1)
    if null:
        readable = F.pad(readable, (1, 0), value=True)
    added = torch.zeros(readable.shape, dtype=query.dtype, device=query.device)
    return added.masked_fill(~readable, -torch.inf), empty


def _repeated(key: Tensor, heads: int, modulo_heads: bool) -> Tensor:
    groups = heads // key.shape[2]
    if groups == 1:
        return key
    return key.repeat(1, 1, groups, 1) if modulo_heads else key.repeat_interleave(groups, 2)


def _summed(gradient: Tensor, kv_heads: int, modulo_heads: bool) -> Tensor:
    groups = gradient.shape[2] // kv_heads
    if groups == 1:
        return gradient.contiguous()
    by_head = gradient.unflatten(2, (groups, kv_heads) if modulo_heads else (kv_heads, groups))
    return by_head.sum(2 if modulo_heads else 3)


def _packing(
    query: Tensor, key: Tensor, cu_query: Maybe, cu_key: Maybe, max_query: int, max_key: int
) -> tuple[Maybe, Maybe, int, int]:
    """Returns what the kernel for CUDA takes: for padded rows the lengths of all of them."""
    return (None, None, query.shape[1], key.shape[1]) if cu_query is None else (cu_query, cu_key, max_query, max_key)


def _in_front(null: Maybe, x: Tensor) -> Tensor:
    return x if null is None else torch.cat((null.expand(x.shape[0], 1, -1, -1), x), 1)


def _apart(gradient: Tensor, null: Maybe) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the rows, and of what `_in_front` put in front of each of them."""
    if null is None:
        return gradient, gradient.new_empty(0)
    return gradient[:, 1:].contiguous(), gradient[:, 0].sum(0)


def _rotated(query: Tensor, key: Tensor, freqs: Maybe, inverse: bool = False) -> tuple[Tensor, Tensor]:
    return (query, key) if freqs is None else (rotary(query, freqs, None, inverse), rotary(key, freqs, None, inverse))


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    packing: tuple[Maybe, Maybe, int, int],
    added: Maybe,
    causal: bool,
    modulo_heads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value as the kernels see them: rotated, the null key among the keys."""
    if query.device.type != "cpu":
        lse = lse.masked_fill(lse.isneginf(), torch.inf)
        # without dropout the generator's state is not looked at
        state = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
        saved = grad_out, query, key, value, out, lse
        return torch.ops.aten._flash_attention_backward(*saved, *packing, 0.0, causal, *state)
    heads, kv_heads = query.shape[2], key.shape[2]
    key, value = (_repeated(each, heads, modulo_heads).transpose(1, 2) for each in (key, value))
    grad_query, *grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(each.transpose(1, 2) for each in (grad_out, query)),
        key,
        value,
        out.transpose(1, 2),
        # rows that read nothing: any finite number, as all their scores are -inf
        lse if added is None else lse.masked_fill(lse.isneginf(), 0),
        *(0.0, causal and added is None),
        attn_mask=added,
    )
    grad_key, grad_value = (_summed(each.transpose(1, 2), kv_heads, modulo_heads) for each in grads)
    return grad_query.transpose(1, 2), grad_key, grad_value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Maybe,
    cu_query: Maybe,
    cu_key: Maybe,
    max_query: int,
    max_key: int,
    null_key: Maybe,
    null_value: Maybe,
    freqs: Maybe,
    causal: bool,
    modulo_heads: bool,
    dropout: float,
    seed: Maybe,
) -> tuple[Tensor, Tensor]:
    query, key = _rotated(query, key, freqs)
    key, value = _in_front(null_key, key), _in_front(null_value, value)
    if query.numel() == 0 or key.numel() == 0:
        precise = torch.promote_types(torch.float32, query.dtype)
        lse = query.new_full(query.shape[:-1], -torch.inf, dtype=precise).transpose(-1, -2).contiguous()
        return torch.zeros_like(query, memory_format=torch.contiguous_format), lse
    if query.device.type != "cpu":
        packing = _packing(query, key, cu_query, cu_key, max_query, max_key)
        # where there are more keys, that kernel's last query reads up to the last key: those in front are read by all
        out, lse, *_ = torch.ops.aten._flash_attention_forward(query, key, value, *packing, 0.0, causal, False)
        # that kernel's sign for a query that reads nothing
        return out, lse.masked_fill(lse.isposinf(), -torch.inf)
    added, empty = _mask(query, key_mask, causal, null_key is not None)
    key, value = (_repeated(each, query.shape[2], modulo_heads).transpose(1, 2) for each in (key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(1, 2), key, value, 0.0, causal and added is None, attn_mask=added
    )
    lse = lse.contiguous() if empty is None or null_key is not None else lse.masked_fill(empty, -torch.inf).contiguous()
    return out.transpose(1, 2).contiguous(), lse


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Maybe,
    cu_query: Maybe,
    cu_key: Maybe,
    max_query: int,
    max_key: int,
    null_key: Maybe,
    null_value: Maybe,
    freqs: Maybe,
    causal: bool,
    modulo_heads: bool,
    dropout: float,
    seed: Maybe,
) -> tuple[Tensor, ...]:
    query, key = _rotated(query, key, freqs)
    key, value = _in_front(null_key, key), _in_front(null_value, value)
    lone = None
    grads: tuple[Tensor, ...]
    if query.numel() == 0 or key.numel() == 0:
        grads = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    else:
        packing = _packing(query, key, cu_query, cu_key, max_query, max_key)
        on_cpu = query.device.type == "cpu"
        added, empty = _mask(query, key_mask, causal, null_key is not None) if on_cpu else (None, None)
        if null_key is not None:
            lone = empty if key.shape[1] > 1 else query.new_ones(1, 1, 1, dtype=torch.bool)
        if lone is not None:
            # who reads the null key alone has weights without a gradient: nothing is left to the kernels' rounding
            lone = lone.transpose(1, 2)[..., None]
            aside, grad_out = grad_out.masked_fill(~lone, 0), grad_out.masked_fill(lone, 0)
        grads = _backward(grad_out, query, key, value, out, lse, packing, added, causal, modulo_heads)
    grad_key, grad_null_key = _apart(grads[1], null_key)
    grad_value, grad_null_value = _apart(grads[2], null_value)
    if lone is not None:
        grad_null_value = grad_null_value + _summed(aside, key.shape[2], modulo_heads).sum((0, 1))
    grad_query, grad_key = _rotated(grads[0], grad_key, freqs, inverse=True)
    return grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous(), grad_null_key, grad_null_value
