"""`attention` by torch's own kernels: its flash attention for the CPU, and the one for CUDA.

They are what `scaled_dot_product_attention` calls, called so that the log-sum-exp comes out as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.ops.arguments import takes
from spear_fast.ops.attention_arguments import AttentionArgs, AttentionBackwardArgs, AttentionOptions
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

    null: whether a key that is always read comes first.
    """
    if key_mask is None and not (causal and null):
        return None, None
    length = query.shape[1]
    if key_mask is None:
        readable = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    else:
        readable = key_mask[:, None, None]
    if causal:
        readable = readable & torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
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


def _packing(args: AttentionArgs | AttentionBackwardArgs) -> tuple[Maybe, Maybe, int, int]:
    """Returns what the kernel for CUDA takes: for padded rows the lengths of all of them."""
    if args.cu_query is None:
        return None, None, args.query.shape[1], args.key.shape[1]
    return args.cu_query, args.cu_key, args.max_query, args.max_key


def _with_null(null: Maybe, x: Tensor) -> Tensor:
    return x if null is None else torch.cat((null.expand(x.shape[0], 1, -1, -1), x), 1)


def _apart(gradient: Tensor, null: Maybe) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the rows, and of what `_with_null` put before each of them."""
    if null is None:
        return gradient, gradient.new_empty(0)
    return gradient[:, 1:].contiguous(), gradient[:, 0].sum(0)


def _rotated(query: Tensor, key: Tensor, freqs: Maybe, inverse: bool = False) -> tuple[Tensor, Tensor]:
    return (query, key) if freqs is None else (rotary(query, freqs, None, inverse), rotary(key, freqs, None, inverse))


def _as_read(args: Any) -> Any:
    """Returns the arguments as the kernels see them: query and key rotated, the null key among the keys."""
    query, key = _rotated(args.query, args.key, args.freqs)
    key, value = _with_null(args.null_key, key), _with_null(args.null_value, args.value)
    return args._replace(query=query, key=key, value=value)


@takes(AttentionArgs)
def attention(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    args = _as_read(args)
    query, key, value, causal, null = args.query, args.key, args.value, args.causal, args.null_key is not None
    if query.numel() == 0 or key.numel() == 0:
        precise = torch.promote_types(torch.float32, query.dtype)
        lse = query.new_full(query.shape[:-1], -torch.inf, dtype=precise).transpose(-1, -2).contiguous()
        return torch.zeros_like(query, memory_format=torch.contiguous_format), lse
    if query.device.type != "cpu":
        # where there are more keys, that kernel's last query reads up to the last key: the first ones are read by all
        forward = torch.ops.aten._flash_attention_forward
        out, lse, *_ = forward(query, key, value, *_packing(args), 0.0, causal, False)
        # that kernel's sign for a query that reads nothing
        return out, lse.masked_fill(lse.isposinf(), -torch.inf)
    added, empty = _mask(query, args.key_mask, causal, null)
    key, value = (_repeated(each, query.shape[2], args.modulo_heads).transpose(1, 2) for each in (key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(1, 2), key, value, 0.0, causal and added is None, attn_mask=added
    )
    lse = lse.contiguous() if empty is None or null else lse.masked_fill(empty, -torch.inf).contiguous()
    return out.transpose(1, 2).contiguous(), lse


def _backward(args: AttentionBackwardArgs, added: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value as the kernels see them; added: to the scores, or None."""
    query, lse, causal = args.query, args.lse, args.causal
    if query.device.type != "cpu":
        lse = lse.masked_fill(lse.isneginf(), torch.inf)
        # without dropout the generator's state is not looked at
        state = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
        saved = args.grad_out, query, args.key, args.value, args.out, lse
        return torch.ops.aten._flash_attention_backward(*saved, *_packing(args), 0.0, causal, *state)
    heads, kv_heads = query.shape[2], args.key.shape[2]
    keys = [_repeated(each, heads, args.modulo_heads).transpose(1, 2) for each in (args.key, args.value)]
    grad_query, *grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        args.grad_out.transpose(1, 2),
        query.transpose(1, 2),
        *keys,
        args.out.transpose(1, 2),
        # rows that read nothing: any finite number, as all their scores are -inf
        lse if added is None else lse.masked_fill(lse.isneginf(), 0),
        *(0.0, causal and added is None),
        attn_mask=added,
    )
    grad_key, grad_value = (_summed(each.transpose(1, 2), kv_heads, args.modulo_heads) for each in grads)
    return grad_query.transpose(1, 2), grad_key, grad_value


@takes(AttentionBackwardArgs)
def attention_backward(args: AttentionBackwardArgs) -> tuple[Tensor, ...]:
    args = _as_read(args)
    query, key = args.query, args.key
    lone = None
    grads: tuple[Tensor, ...]
    if query.numel() == 0 or key.numel() == 0:
        grads = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, args.value))
    else:
        on_cpu, null = query.device.type == "cpu", args.null_key is not None
        added, empty = _mask(query, args.key_mask, args.causal, null) if on_cpu else (None, None)
        if null:
            lone = empty if key.shape[1] > 1 else query.new_ones(1, 1, 1, dtype=torch.bool)
        if lone is not None:
            # who reads the null key alone has weights without a gradient: nothing is left to the kernels' rounding
            lone = lone.transpose(1, 2)[..., None]
            aside = args.grad_out.masked_fill(~lone, 0)
            args = args._replace(grad_out=args.grad_out.masked_fill(lone, 0))
        grads = _backward(args, added)
    grad_key, grad_null_key = _apart(grads[1], args.null_key)
    grad_value, grad_null_value = _apart(grads[2], args.null_value)
    if lone is not None:
        grad_null_value = grad_null_value + _summed(aside, key.shape[2], args.modulo_heads).sum((0, 1))
    grad_query, grad_key = _rotated(grads[0], grad_key, args.freqs, inverse=True)
    return grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous(), grad_null_key, grad_null_value
