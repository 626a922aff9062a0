"""Inputs for the decoding ops: random, of any size, with the corners that break kernels; one entry an op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spear_fast import ops
from spear_fast.ops import providers

OPS = ("append_kv", "decode_self_attention", "decode_cross_attention")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def function_of(op: str, provider: str):
    """Returns a provider's function, or skips with the provider's own reason."""
    row = providers.get(op, provider)
    if row.missing():
        pytest.skip(f"{op} by {provider}: {row.missing()}")
    return row.function


def call(op: str, arguments: list[Any] | tuple[Any, ...]) -> Any:
    """Calls the public function with what a provider takes by position."""
    if op == "decode_cross_attention":
        *tensors, return_weights, arrivals, split, scales = arguments
        more = {"arrivals": arrivals, "split": split, "scales": scales}
        return ops.decode_cross_attention(*tensors, return_weights=return_weights, **more)
    return getattr(ops, op)(*arguments)


def given(overload: Any, arguments: list[Any] | tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the arguments that an overload takes: C++ may take the first ones alone."""
    return tuple(arguments[: len(overload._schema.arguments)])


def made(op: str, result: Any, arguments: list[Any] | tuple[Any, ...]) -> list[Tensor]:
    """Returns what an op makes: its results, or the caches that it wrote."""
    if op == "append_kv":
        return list(arguments[-2:])
    return [result] if isinstance(result, Tensor) else list(result)


def frequencies(size: int) -> Tensor:
    return 10000.0 ** (-torch.arange(0, size, 2) / size)


def _strided(tensor: Tensor, between: float = torch.nan) -> Tensor:
    """Returns the same numbers at twice the distance in every dimension but the last."""
    wide = torch.full([2 * size for size in tensor.shape[:-1]] + [tensor.shape[-1]], between, dtype=tensor.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape[:-1])]
    view.copy_(tensor)
    return view


def append_kv(rows=3, tokens=1, groups=2, length=7, size=8, *, dtype=torch.float32, strided=False, positions=None):
    key, value = (torch.randn(rows, tokens, groups, size, dtype=dtype) for _ in range(2))
    caches = [torch.randn(rows, groups, length, size, dtype=dtype) for _ in range(2)]
    if positions is None:
        positions = torch.randint(length - tokens + 1, (rows,))
    if strided:
        key, value, *caches = (_strided(tensor) for tensor in (key, value, *caches))
    return key, value, frequencies(size), positions, *caches


def decode_self_attention(
    utterances=2,
    beams=3,
    tokens=1,
    heads=4,
    groups=2,
    length=11,
    size=8,
    *,
    dtype=torch.float32,
    strided=False,
    lengths=None,
):
    query = torch.randn(utterances, beams, tokens, heads, size, dtype=dtype)
    caches = [torch.randn(utterances * beams, groups, length, size, dtype=dtype) for _ in range(2)]
    if lengths is None:
        lengths = torch.randint(length + 1, (utterances, beams))
    # a trunk that all hypotheses share, then histories of their own
    ancestors = torch.randint(max(beams, 1), (utterances, beams, length), dtype=torch.uint8)
    trunk = length // 3
    ancestors[:, :, :trunk] = ancestors[:, :1, :trunk]
    # what lies past the lengths is never read: not even the beam index
    ancestors[torch.arange(length) >= lengths[..., None]] = 255
    if strided:
        query, *caches = (_strided(tensor) for tensor in (query, *caches))
    return query, frequencies(size), *caches, ancestors, lengths


def decode_cross_attention(
    utterances=2,
    beams=3,
    heads=4,
    source=11,
    size=8,
    *,
    dtype=torch.float32,
    strided=False,
    lengths=None,
    return_weights=False,
    arrivals=None,
    split=0,
    scaled=False,
):
    query = torch.randn(utterances, beams, heads, size, dtype=dtype)
    # as a projection leaves them: heads inside the positions
    key, value = (torch.randn(utterances, source, heads, size, dtype=dtype).transpose(1, 2) for _ in range(2))
    null_key, null_value = (torch.randn(heads, size, dtype=dtype) for _ in range(2))
    if lengths is None:
        lengths = torch.randint(source + 1, (utterances,))
    scales = None
    if scaled:
        # of every size: each number near the largest of e4m3, or among its smallest
        scales = 2.0 ** torch.randint(-12, 4, (2, utterances, heads)) * (1 + torch.rand(2, utterances, heads))
        key, value = (each.to(torch.float8_e4m3fn) for each in (key * 100, value * 0.01))
    if strided:
        query, null_key, null_value = map(_strided, (query, null_key, null_value))
        if scaled:
            key, value = (_strided(each.view(torch.uint8), 127).view(each.dtype) for each in (key, value))
        else:
            key, value = map(_strided, (key, value))
    if arrivals is not None:
        arrivals = torch.zeros(arrivals, dtype=torch.int32)
    return query, key, value, null_key, null_value, lengths, return_weights, arrivals, split, scales


MAKE = {
    "append_kv": append_kv,
    "decode_self_attention": decode_self_attention,
    "decode_cross_attention": decode_cross_attention,
}
