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
        *tensors, return_weights, residual, arrivals, split, scales = arguments
        more = {"arrivals": arrivals, "split": split, "residual": residual, "scales": scales}
        return ops.decode_cross_attention(*tensors, return_weights=return_weights, **more)
    return getattr(ops, op)(*arguments)


def attending(arguments: list[Any] | tuple[Any, ...]) -> list[Any]:
    """Returns the arguments of `decode_self_attention` where nothing is new, from those up to the lengths."""
    return [*arguments[:6], None, None, None]


def given(overload: Any, arguments: list[Any] | tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the arguments that an overload takes: C++ may take the first ones alone."""
    return tuple(arguments[: len(overload._schema.arguments)])


def made(op: str, result: Any, arguments: list[Any] | tuple[Any, ...]) -> list[Tensor]:
    """Returns what an op makes: its results, or the caches that it wrote."""
    if op == "append_kv":
        return list(arguments[-2:])
    if op == "decode_self_attention" and arguments[6] is not None:
        return [result, *arguments[2:4]]
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
    append=False,
    dim=None,
):
    """append: whether there are new keys and values. dim: of the residual that they were projected from, if any."""
    query = torch.randn(utterances, beams, tokens, heads, size, dtype=dtype)
    caches = [torch.randn(utterances * beams, groups, length, size, dtype=dtype) for _ in range(2)]
    if lengths is None:
        lengths = torch.randint(tokens if append else 0, length + 1, (utterances, beams))
    # a trunk that all hypotheses share, then histories of their own
    ancestors = torch.randint(max(beams, 1), (utterances, beams, length), dtype=torch.uint8)
    trunk = length // 3
    ancestors[:, :, :trunk] = ancestors[:, :1, :trunk]
    # what lies past the lengths is never read: not even the beam index
    ancestors[torch.arange(length) >= lengths[..., None]] = 255
    new = [torch.randn(utterances, beams, tokens, groups, size, dtype=dtype) for _ in range(2)]
    if append:
        # the new positions are written under the own beam index, over what nobody may read before
        own = torch.arange(beams, dtype=torch.uint8)[:, None].expand_as(ancestors)
        fresh = (torch.arange(length) >= lengths[..., None] - tokens) & (torch.arange(length) < lengths[..., None])
        ancestors = torch.where(fresh, own, ancestors)
        # nor does anybody read under another's index what that one writes now
        theirs = fresh.gather(1, ancestors.clamp(max=max(beams - 1, 0)).long())
        ancestors = torch.where(theirs & (ancestors < 255), own, ancestors)
        for cache in caches:
            cache.masked_fill_(fresh.view(-1, 1, length, 1), torch.nan)
    if strided:
        query, *caches = (_strided(tensor) for tensor in (query, *caches))
        new = [_strided(tensor) for tensor in new]
    arguments = query, frequencies(size), *caches, ancestors, lengths
    # the projection of rows that were not normed: as large as they are
    residual = None if dim is None else torch.randn(query[..., 0, 0].numel(), dim, dtype=dtype) * 30
    for tensor in () if dim is None else (query, *new):
        tensor.mul_(30)
    return *arguments, *(new if append else (None, None)), residual


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
    dim=None,
):
    query = torch.randn(utterances, beams, heads, size, dtype=dtype)
    # as a projection leaves them: heads inside the positions
    key, value = (torch.randn(utterances, source, heads, size, dtype=dtype).transpose(1, 2) for _ in range(2))
    null_key, null_value = (torch.randn(heads, size, dtype=dtype) for _ in range(2))
    if lengths is None:
        lengths = torch.randint(source + 1, (utterances,))
    scales = None
    if scaled:
        # of every size: each number near the largest of e4m3, or among its smallest; keys not so large that scores of
        # thousands leave nothing but the last bits of the largest to be compared
        exponents = torch.stack([torch.randint(-12, highest, (utterances, heads)) for highest in (-5, 4)])
        scales = 2.0**exponents * (1 + torch.rand(2, utterances, heads))
        key, value = (each.to(torch.float8_e4m3fn) for each in (key * 100, value * 0.01))
    if strided:
        query, null_key, null_value = map(_strided, (query, null_key, null_value))
        if scaled:
            key, value = (_strided(each.view(torch.uint8), 127).view(each.dtype) for each in (key, value))
        else:
            key, value = map(_strided, (key, value))
    if arrivals is not None:
        arrivals = torch.zeros(arrivals, dtype=torch.int32)
    # as in decode_self_attention
    residual = None if dim is None else torch.randn(utterances * beams, dim, dtype=dtype) * 30
    if dim is not None:
        query.mul_(30)
    return query, key, value, null_key, null_value, lengths, return_weights, residual, arrivals, split, scales


MAKE = {
    "append_kv": append_kv,
    "decode_self_attention": decode_self_attention,
    "decode_cross_attention": decode_cross_attention,
}
