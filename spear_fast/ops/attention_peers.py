"""`attention` by packages that may be installed: flash-attn and xformers.

flash-attn 2: https://github.com/Dao-AILab/flash-attention, its `flash_attn_interface`. xformers:
https://facebookresearch.github.io/xformers/components/ops.html.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from spear_fast.ops.arguments import takes
from spear_fast.ops.attention_arguments import AttentionArgs, AttentionBackwardArgs, AttentionOptions
from spear_fast.ops.backends import holding_numbers
from spear_fast.ops.providers import Provider, ProviderQuery

HALVES = (torch.float16, torch.bfloat16)


def _missing(module: str, package: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        if find_spec(module) is None:
            return f"{package} is not installed; pip install {package}"
        return None if torch.cuda.is_available() else "there is no CUDA device"

    return missing


def _lacks(options: AttentionOptions, names: dict[str, str]) -> str | None:
    for option, name in names.items():
        if getattr(options, option):
            return f"has no {name}"
    return None


def flash_attn_why_not(query: ProviderQuery) -> str | None:
    """Returns why flash-attn cannot compute `attention` for such a query, or None."""
    if query.dtype not in HALVES:
        return f"takes torch.float16 and torch.bfloat16, not {query.dtype}"
    if query.size % 8 or query.size > 256:
        return f"takes head sizes that are multiples of 8 up to 256, not {query.size}"
    lacking = {"null": "null key", "rotary": "rotation", "dropout": "dropout by seed", "masked": "key mask"}
    return _lacks(AttentionOptions(*query.options), lacking | {"modulo": "key heads read by turns"})


def xformers_why_not(query: ProviderQuery) -> str | None:
    """Returns why xformers cannot compute `attention` for such a query, or None."""
    if query.dtype not in (*HALVES, torch.float32):
        return f"takes torch.float32, torch.float16 and torch.bfloat16, not {query.dtype}"
    lacking = {"null": "null key", "rotary": "rotation", "dropout": "dropout by seed", "masked": "key mask"}
    lacking |= {"grouped": "log-sum-exp for grouped heads", "packed": "log-sum-exp of one shape for packed rows"}
    return _lacks(AttentionOptions(*query.options), lacking)


def _flash_attn() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


@takes(AttentionArgs)
def _flash_attn_forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    rows, options = (args.query, args.key, args.value), {"causal": args.causal, "return_attn_probs": True}
    if args.cu_query is None:
        out, lse, _ = _flash_attn().flash_attn_func(*rows, **options)
    else:
        packing = args.cu_query, args.cu_key, args.max_query, args.max_key
        out, lse, _ = _flash_attn().flash_attn_varlen_func(*rows, *packing, **options)
    # its sign for a query that reads nothing is +inf
    return out.contiguous(), lse.masked_fill(lse.isposinf(), -torch.inf)


@takes(AttentionBackwardArgs)
def _flash_attn_backward(args: AttentionBackwardArgs) -> tuple[Tensor, ...]:
    rows = args.query, args.key, args.value
    grads = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in rows]
    saved = args.grad_out, *rows, args.out, args.lse.masked_fill(args.lse.isneginf(), torch.inf)
    options = {
        "dropout_p": 0.0,
        "softmax_scale": args.query.shape[-1] ** -0.5,
        "causal": args.causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": False,
    }
    if args.cu_query is None:
        _flash_attn()._flash_attn_backward(*saved, *grads, **options)
    else:
        packing = args.cu_query, args.cu_key, args.max_query, args.max_key
        _flash_attn()._flash_attn_varlen_backward(*saved, *grads, *packing, **options)
    return *grads, args.query.new_empty(0), args.query.new_empty(0)


def _xformers() -> Any:
    return importlib.import_module("xformers.ops.fmha")


@takes(AttentionArgs)
def _xformers_forward(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    fmha = _xformers()
    bias = fmha.attn_bias.LowerTriangularMask() if args.causal else None
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(args.query, args.key, args.value, attn_bias=bias)
    # its rows may be rounded up to a whole number of vectors
    return out.contiguous(), lse[..., : args.query.shape[1]].contiguous()


@takes(AttentionBackwardArgs)
def _xformers_backward(args: AttentionBackwardArgs) -> tuple[Tensor, ...]:
    fmha = _xformers()
    bias = fmha.attn_bias.LowerTriangularMask() if args.causal else None
    # to a whole number of vectors, as the forward pass leaves them; what is added belongs to no query
    lse = torch.nn.functional.pad(args.lse, (0, -args.lse.shape[-1] % 32), value=torch.inf)
    saved = args.grad_out, args.out, lse, args.query, args.key, args.value
    grads = fmha.memory_efficient_attention_backward(*saved, attn_bias=bias)
    return *(each.contiguous() for each in grads), args.query.new_empty(0), args.query.new_empty(0)


def flash_attn(op: str) -> Provider:
    """Returns the provider `flash-attn` of `attention` or `attention_backward`."""
    function = _flash_attn_forward if op == "attention" else _flash_attn_backward
    return Provider(
        op,
        "flash-attn",
        holding_numbers(op, function),
        ("cuda",),
        _missing("flash_attn", "flash-attn"),
        flash_attn_why_not,
    )


def xformers(op: str) -> Provider:
    """Returns the provider `xformers` of `attention` or `attention_backward`."""
    function = _xformers_forward if op == "attention" else _xformers_backward
    return Provider(
        op, "xformers", holding_numbers(op, function), ("cuda",), _missing("xformers", "xformers"), xformers_why_not
    )
