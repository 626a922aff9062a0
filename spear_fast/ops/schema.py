"""What the ops are called, take and return, and what must hold for their arguments; the providers fill them in.

The dispatcher knows each op as `spear_fast::op`, which picks a provider when called, and as one overload for each
provider that is registered from C++, such as `spear_fast::op.cpu`. Real calls, fake tensors and
torch.compile share the checks below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

SCHEMAS = {
    "append_kv": (
        "(Tensor key, Tensor value, Tensor freqs, Tensor positions, Tensor(a!) cache_key, Tensor(b!) cache_value) -> ()"
    ),
    "decode_self_attention": (
        "(Tensor query, Tensor freqs, Tensor cache_key, Tensor cache_value, Tensor ancestors, Tensor lengths) -> Tensor"
    ),
    "decode_cross_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor null_key, Tensor null_value, Tensor lengths) -> Tensor"
    ),
}
# providers whose functions are registered from C++, each as an overload of the op
NATIVE = ("cpu",)

LIBRARY = torch.library.Library("spear_fast", "DEF")


def _shape(tensor: Tensor) -> str:
    return str([int(size) for size in tensor.shape])


def _refuse(op: str, name: str, wanted: str, got: str, advice: str) -> NoReturn:
    raise ValueError(f"{op}: {name} must be {wanted}, got {got}; {advice}")


def _check_common(op: str, like: str, tensors: dict[str, Tensor], freqs: Tensor | None, integers: dict) -> None:
    """Raises unless all tensors are on one device, and of the dtypes they should be of; only called when one is not."""
    first = tensors[like]
    if not first.dtype.is_floating_point:
        _refuse(op, like, "floating point", str(first.dtype), "convert it, and what goes with it, with .to()")
    everything = {
        **tensors,
        **({} if freqs is None else {"freqs": freqs}),
        **{name: t for name, (t, _) in integers.items()},
    }
    for name, tensor in everything.items():
        if tensor.device != first.device:
            _refuse(op, name, f"on {like}'s device {first.device}", str(tensor.device), "move it with .to()")
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            _refuse(op, name, f"{first.dtype} like {like}", str(tensor.dtype), "convert it with .to()")
    for name, (tensor, dtype) in integers.items():
        if tensor.dtype != dtype:
            _refuse(op, name, str(dtype), str(tensor.dtype), "convert it with .to()")
    if freqs is not None and freqs.dtype != torch.float32 and freqs.dtype != first.dtype:
        _refuse(op, "freqs", "torch.float32", str(freqs.dtype), "take the angles' precision from the checkpoint")


def _check_shapes(op: str, expected: dict[str, tuple[Tensor, str, tuple[int, ...]]]) -> None:
    for name, (tensor, names, shape) in expected.items():
        if tensor.shape != shape:
            _refuse(op, name, f"[{names}] = {list(shape)}", _shape(tensor), "see the op's docstring for the sizes")


def check_append_kv(
    key: Tensor, value: Tensor, freqs: Tensor, positions: Tensor, cache_key: Tensor, cache_value: Tensor
) -> None:
    """Raises ValueError unless the arguments of `append_kv` fit each other; providers check the ranges of integers."""
    op, dtype, device = "append_kv", key.dtype, key.device
    if key.dim() != 3:
        _refuse(op, "key", "[rows, kv_heads, head_dim]", _shape(key), "pass the one new key of each row")
    if cache_key.dim() != 4:
        _refuse(op, "cache_key", "[rows, kv_heads, length, head_dim]", _shape(cache_key), "pass the whole buffer")
    rows, groups, size = key.shape
    shape = (rows, groups, cache_key.shape[2], size)
    if (
        value.shape != key.shape
        or cache_key.shape != shape
        or cache_value.shape != shape
        or freqs.shape != (size // 2,)
        or positions.shape != (rows,)
    ):
        _check_shapes(
            op,
            {
                "value": (value, "rows, kv_heads, head_dim", key.shape),
                "cache_key": (cache_key, "rows, kv_heads, length, head_dim", shape),
                "cache_value": (cache_value, "rows, kv_heads, length, head_dim", shape),
                "freqs": (freqs, "head_dim / 2", (size // 2,)),
                "positions": (positions, "rows", (rows,)),
            },
        )
    if size % 2:
        _refuse(op, "head_dim", "even", str(size), "rotation turns pairs of numbers")
    if not (
        value.dtype == cache_key.dtype == cache_value.dtype == dtype
        and value.device == freqs.device == positions.device == cache_key.device == cache_value.device == device
        and positions.dtype == torch.int64
        and freqs.dtype == torch.float32
        and dtype.is_floating_point
    ):
        tensors = {"key": key, "value": value, "cache_key": cache_key, "cache_value": cache_value}
        _check_common(op, "key", tensors, freqs, {"positions": (positions, torch.int64)})


def check_decode_self_attention(
    query: Tensor, freqs: Tensor, cache_key: Tensor, cache_value: Tensor, ancestors: Tensor, lengths: Tensor
) -> None:
    """Raises ValueError unless the arguments of `decode_self_attention` fit each other."""
    op, dtype, device = "decode_self_attention", query.dtype, query.device
    if query.dim() != 4:
        _refuse(op, "query", "[utterances, beams, heads, head_dim]", _shape(query), "pass one query a hypothesis")
    if cache_key.dim() != 4:
        _refuse(op, "cache_key", "[rows, kv_heads, length, head_dim]", _shape(cache_key), "pass the whole buffer")
    utterances, beams, heads, size = query.shape
    groups, buffer = cache_key.shape[1], cache_key.shape[2]
    shape = (utterances * beams, groups, buffer, size)
    if (
        cache_key.shape != shape
        or cache_value.shape != shape
        or freqs.shape != (size // 2,)
        or ancestors.shape != (utterances, beams, buffer)
        or lengths.shape != (utterances, beams)
    ):
        _check_shapes(
            op,
            {
                "cache_key": (cache_key, "utterances * beams, kv_heads, length, head_dim", shape),
                "cache_value": (cache_value, "utterances * beams, kv_heads, length, head_dim", shape),
                "freqs": (freqs, "head_dim / 2", (size // 2,)),
                "ancestors": (ancestors, "utterances, beams, length", (utterances, beams, buffer)),
                "lengths": (lengths, "utterances, beams", (utterances, beams)),
            },
        )
    if size % 2:
        _refuse(op, "head_dim", "even", str(size), "rotation turns pairs of numbers")
    if groups == 0 or heads % groups:
        _refuse(
            op, "kv_heads", f"a divisor of the {heads} heads", str(groups), "each key head serves as many query heads"
        )
    if beams > 256:
        _refuse(op, "beams", "at most 256", str(beams), "an ancestor is one byte; use fewer beams")
    if not (
        cache_key.dtype == cache_value.dtype == dtype
        and freqs.device == cache_key.device == cache_value.device == ancestors.device == lengths.device == device
        and ancestors.dtype == torch.uint8
        and lengths.dtype == torch.int64
        and freqs.dtype == torch.float32
        and dtype.is_floating_point
    ):
        tensors = {"query": query, "cache_key": cache_key, "cache_value": cache_value}
        integers = {"ancestors": (ancestors, torch.uint8), "lengths": (lengths, torch.int64)}
        _check_common(op, "query", tensors, freqs, integers)


def check_decode_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, null_key: Tensor, null_value: Tensor, lengths: Tensor
) -> None:
    """Raises ValueError unless the arguments of `decode_cross_attention` fit each other."""
    op, dtype, device = "decode_cross_attention", query.dtype, query.device
    if query.dim() != 4:
        _refuse(op, "query", "[utterances, beams, heads, head_dim]", _shape(query), "pass one query a hypothesis")
    if key.dim() != 4:
        _refuse(op, "key", "[utterances, heads, source, head_dim]", _shape(key), "do not copy it for each beam")
    utterances, _, heads, size = query.shape
    shape = (utterances, heads, key.shape[2], size)
    if (
        key.shape != shape
        or value.shape != shape
        or null_key.shape != (heads, size)
        or null_value.shape != (heads, size)
        or lengths.shape != (utterances,)
    ):
        _check_shapes(
            op,
            {
                "key": (key, "utterances, heads, source, head_dim", shape),
                "value": (value, "utterances, heads, source, head_dim", shape),
                "null_key": (null_key, "heads, head_dim", (heads, size)),
                "null_value": (null_value, "heads, head_dim", (heads, size)),
                "lengths": (lengths, "utterances", (utterances,)),
            },
        )
    if not (
        key.dtype == value.dtype == null_key.dtype == null_value.dtype == dtype
        and key.device == value.device == null_key.device == null_value.device == lengths.device == device
        and lengths.dtype == torch.int64
        and dtype.is_floating_point
    ):
        tensors = {"query": query, "key": key, "value": value, "null_key": null_key, "null_value": null_value}
        _check_common(op, "query", tensors, None, {"lengths": (lengths, torch.int64)})


CHECKS: dict[str, Callable[..., None]] = {
    "append_kv": check_append_kv,
    "decode_self_attention": check_decode_self_attention,
    "decode_cross_attention": check_decode_cross_attention,
}


def _fake_append_kv(*arguments: Tensor) -> None:
    check_append_kv(*arguments)


def _fake_decode_self_attention(query: Tensor, *arguments: Tensor) -> Tensor:
    check_decode_self_attention(query, *arguments)
    return query.new_empty(query.shape)


def _fake_decode_cross_attention(query: Tensor, *arguments: Tensor) -> Tensor:
    check_decode_cross_attention(query, *arguments)
    return query.new_empty(query.shape)


_FAKES: dict[str, Callable[..., Tensor | None]] = {
    "append_kv": _fake_append_kv,
    "decode_self_attention": _fake_decode_self_attention,
    "decode_cross_attention": _fake_decode_cross_attention,
}

for _op, _schema in SCHEMAS.items():
    for _name in (_op, *(f"{_op}.{_provider}" for _provider in NATIVE)):
        LIBRARY.define(_name + _schema)
        torch.library.register_fake(f"spear_fast::{_name}", _FAKES[_op], lib=LIBRARY)
