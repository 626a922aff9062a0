"""`attention` by torch's own kernels: its flash attention for the CPU, and the one for CUDA.

They are what `scaled_dot_product_attention` calls, called so that the log-sum-exp comes out as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spear_fast.ops.attention_options import Options
from spear_fast.ops.pointwise import rotary
from spear_fast.ops.providers import Inputs

Maybe = Tensor | None


def why_not(inputs: Inputs) -> str | None:
    """Returns why torch's kernels cannot compute `attention` for such inputs, or None."""
    options = Options(*inputs.options)
    if options.dropout:
        return "has no dropout by seed"
    if options.null:
        return "has no null key"
    if inputs.device.type == "cpu":
        return "takes no packed rows on the CPU" if options.packed else None
    if inputs.dtype not in (torch.float16, torch.bfloat16):
        return f"takes torch.float16 and torch.bfloat16 on CUDA, not {inputs.dtype}"
    if options.masked:
        return "takes no key mask on CUDA; pack the rows"
    if options.packed and options.rotary:
        return "has no rotation for packed rows"
    if options.modulo:
        return "reads key heads in consecutive groups only on CUDA"
    if inputs.size % 8 or inputs.size > 256:
        return f"takes head sizes that are multiples of 8 up to 256 on CUDA, not {inputs.size}"
    return None


def fastest(inputs: Inputs) -> bool:
    """Returns whether torch's kernel is measured to be the fastest: on the CPU, where no key is masked."""
    options = Options(*inputs.options)
    return inputs.device.type == "cpu" and not options.masked and not options.packed


def _mask(query: Tensor, key_mask: Maybe, causal: bool) -> tuple[Maybe, Maybe]:
    """Returns what is added to the scores, and which queries read nothing; None where the kernel knows by itself."""
    if key_mask is None:
        return None, None
    readable = key_mask[:, None, None]
    if causal:
        readable = readable & torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).tril()
    added = torch.zeros(readable.shape, dtype=query.dtype, device=query.device)
    return added.masked_fill(~readable, -torch.inf), ~readable.any(-1)


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


def _rotated(query: Tensor, key: Tensor, freqs: Maybe, inverse: bool = False) -> tuple[Tensor, Tensor]:
    return (query, key) if freqs is None else (rotary(query, freqs, None, inverse), rotary(key, freqs, None, inverse))


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
    if query.numel() == 0 or key.numel() == 0:
        precise = torch.promote_types(torch.float32, query.dtype)
        lse = query.new_full(query.shape[:-1], -torch.inf, dtype=precise).transpose(-1, -2).contiguous()
        return torch.zeros_like(query, memory_format=torch.contiguous_format), lse
    if query.device.type != "cpu":
        if cu_query is None:
            max_query, max_key = query.shape[1], key.shape[1]
        packing = cu_query, cu_key, max_query, max_key
        out, lse, *_ = torch.ops.aten._flash_attention_forward(query, key, value, *packing, 0.0, causal, False)
        # that kernel's sign for a query that reads nothing
        return out, lse.masked_fill(lse.isposinf(), -torch.inf)
    added, empty = _mask(query, key_mask, causal)
    key, value = (_repeated(each, query.shape[2], modulo_heads).transpose(1, 2) for each in (key, value))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(1, 2), key, value, 0.0, causal and added is None, attn_mask=added
    )
    lse = lse.contiguous() if empty is None else lse.masked_fill(empty, -torch.inf).contiguous()
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
    nothing = query.new_empty(0), query.new_empty(0)
    query, key = _rotated(query, key, freqs)
    if query.numel() == 0 or key.numel() == 0:
        return *(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)), *nothing
    if query.device.type != "cpu":
        if cu_query is None:
            max_query, max_key = query.shape[1], key.shape[1]
        packing = cu_query, cu_key, max_query, max_key
        lse = lse.masked_fill(lse.isneginf(), torch.inf)
        # without dropout the generator's state is not looked at
        state = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
        saved = grad_out, query, key, value, out, lse
        grads = torch.ops.aten._flash_attention_backward(*saved, *packing, 0.0, causal, *state)
        return *_rotated(grads[0], grads[1], freqs, inverse=True), grads[2], *nothing
    added, _ = _mask(query, key_mask, causal)
    heads, kv_heads = query.shape[2], key.shape[2]
    key, value = (_repeated(each, heads, modulo_heads).transpose(1, 2) for each in (key, value))
    grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(each.transpose(1, 2) for each in (grad_out, query)),
        key,
        value,
        out.transpose(1, 2),
        # rows that read nothing: any finite number, as all their scores are -inf
        lse.masked_fill(lse.isneginf(), 0),
        *(0.0, causal and added is None),
        attn_mask=added,
    )
    grad_key, grad_value = (_summed(each.transpose(1, 2), kv_heads, modulo_heads) for each in (grad_key, grad_value))
    grad_query, grad_key = _rotated(grad_query.transpose(1, 2), grad_key, freqs, inverse=True)
    return grad_query.contiguous(), grad_key.contiguous(), grad_value, *nothing
