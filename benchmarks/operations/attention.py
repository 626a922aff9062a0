"""Cases of attention over whole sequences: a model's encoder, its decoder in training, and cross-attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operations.case import (
    MODELS,
    Baseline,
    ElsewhereError,
    Model,
    OpCase,
    Prepared,
    frequencies,
    mixed_lengths,
    noise_like,
    rotated,
    with_gradients,
)

# positions of the op's arguments: query, key and value; null key and value
ROWS, NULLS = (0, 1, 2), (8, 9)
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


@dataclass(frozen=True)
class Options:
    """What a case has of the op's options. mixed: keys of several lengths, masked, or packed where `packed`."""

    name: str
    mixed: bool = False
    packed: bool = False
    causal: bool = False
    grouped: bool = False
    null: bool = False
    rotary: bool = False
    # query positions where they are not the keys'
    queries: int | None = None


PLAIN = Options("encoder")
ALL = (
    PLAIN,
    Options("encoder packed", mixed=True, packed=True, rotary=True),
    Options("encoder masked", mixed=True, rotary=True),
    Options("decoder", causal=True, grouped=True, rotary=True),
    Options("cross", mixed=True, null=True, queries=64),
)


def cases() -> Iterator[OpCase]:
    for options in ALL:
        for training in (False, True):
            small = replace(options, queries=options.queries and 5)
            yield attention("tiny", MODELS["tiny"], 3, 9, small, training=training, sets=("tiny",))
    for options in ALL:
        for training in (False, True):
            for name, batch, length in (
                ("512x6", 8, 250), ("512x6", 32, 500), ("1024x12", 32, 500), ("512x6", 32, 1000), ("1024x12", 32, 1000)
            ):  # fmt: skip
                on_cpu = batch == 8
                sets, extra = ("cpu",) if on_cpu else ("gpu",), length == 1000
                yield attention(name, MODELS[name], batch, length, options, training=training, sets=sets, extra=extra)


def attention(
    name: str, model: Model, batch: int, length: int, options: Options,
    *, training: bool, sets: tuple[str, ...], extra: bool = False,
) -> OpCase:  # fmt: skip
    heads, size = model.heads, model.head_dim
    groups = model.kv_heads if options.grouped else heads
    queries = options.queries or length
    keys = mixed_lengths(batch, length, torch.device("cpu")) if options.mixed else torch.full((batch,), length)
    asked = keys if options.packed else torch.full((batch,), queries)
    wanting = () if not training else (*ROWS, *NULLS) if options.null else ROWS

    def inputs(dtype: torch.dtype, device: torch.device) -> tuple:
        torch.manual_seed(0)
        make = functools.partial(torch.randn, device=device, dtype=dtype)
        null = [make(groups, size) for _ in range(2)] if options.null else [None, None]
        freqs = frequencies(size, device) if options.rotary else None
        tail = (*null, freqs, options.causal, False, 0.0, None)
        if options.packed:
            total = int(keys.sum())
            tensors = make(total, heads, size), make(total, groups, size), make(total, groups, size)
            offsets = F.pad(keys.cumsum(0), (1, 0)).to(device, torch.int32)
            return (*tensors, None, offsets, offsets, length, length, *tail)
        tensors = make(batch, queries, heads, size), *(make(batch, length, groups, size) for _ in range(2))
        mask = (torch.arange(length) < keys[:, None]).to(device) if options.mixed else None
        return (*tensors, mask, None, None, 0, 0, *tail)

    pairs = float((asked * (keys + int(options.null))).sum()) / (2 if options.causal else 1)
    forward = 4 * heads * size * pairs
    query_numbers, key_numbers = int(asked.sum()) * heads * size, int(keys.sum()) * groups * size
    moved = 2 * query_numbers + 2 * key_numbers
    if training:
        # backward reads what forward did, its result and the gradient, and writes a gradient for each input
        moved += 4 * query_numbers + 4 * key_numbers
    return OpCase(
        "attention",
        f"{options.name} {name} {batch}x{length}",
        dict(batch=batch, length=length, queries=queries, heads=heads, kv_heads=groups, head_dim=size,
             query_tokens=int(asked.sum()), key_tokens=int(keys.sum())),
        inputs,
        bytes=lambda b: float(b * moved),
        flops=forward * (3.5 if training else 1),
        baselines=_baselines(options, keys, length, wanting),
        against=tuple(_baselines(options, keys, length, wanting)),
        wanted=_wanted(options, training),
        gradients=wanting,
        outputs=1,
        sets=sets,
        extra=extra,
    )  # fmt: skip


def _wanted(options: Options, training: bool) -> dict[str, dict[str, float]]:
    wanted = {"cuda": {"times": 1.0 if options == PLAIN else 1.3}}
    if training and (options == PLAIN or options.packed):
        wanted["cpu"] = {"times": 1.3 if options.packed else 1.0}
    return wanted


def _padded(packed: Tensor, keys: Tensor, length: int) -> Tensor:
    """Returns `[batch, length, heads, head_dim]` of packed rows, zeros after each."""
    rows = packed.new_zeros(len(keys), length, *packed.shape[1:])
    for row, sequence in zip(rows, packed.split(keys.tolist()), strict=True):
        row[: len(sequence)] = sequence
    return rows


def _sdpa(options: Options, mask: Tensor | None) -> Callable[..., Tensor]:
    """Returns attention `[batch, length, heads, head_dim]` by torch's own, with what it lacks around it."""

    def function(query: Tensor, key: Tensor, value: Tensor, *null: Tensor) -> Tensor:
        if options.rotary:
            freqs, position = frequencies(query.shape[-1], query.device), torch.arange(query.shape[1]).to(query.device)
            query, key = rotated(query, freqs, position), rotated(key, freqs, position)
        if null:
            key, value = (
                torch.cat((each.expand(len(query), 1, -1, -1), rows), dim=1)
                for each, rows in zip(null, (key, value), strict=True)
            )
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
            attn_mask=mask, is_causal=options.causal, enable_gqa=options.grouped,
        )  # fmt: skip
        return out.transpose(1, 2)

    return function


def _baselines(options: Options, keys: Tensor, length: int, wanting: Sequence[int]) -> dict[str, Baseline]:
    def prepare(arguments: Sequence[Any], backend: str | None) -> Prepared:
        tensors = [arguments[i] for i in ROWS]
        if backend is not None and tensors[0].device.type != "cuda":
            raise ElsewhereError
        noise: list[Tensor] = []
        if options.packed:
            noise = [_padded(noise_like(tensors[0], tensors[0].shape), keys, length)] if wanting else []
            tensors = [_padded(each, keys, length) for each in tensors]
        tensors += [arguments[i] for i in NULLS if arguments[i] is not None]
        function = _sdpa(options, _mask(options, keys, length, tensors[0].device))
        run: Callable[[], Any] = lambda: function(*tensors)  # noqa: E731
        if wanting:
            run = with_gradients(function, range(len(tensors)), tensors, noise=noise)
        valid = torch.arange(length, device=tensors[0].device) < keys.to(tensors[0].device)[:, None]

        def read(result: Any) -> list[Tensor]:
            results = [result] if isinstance(result, Tensor) else list(result)
            return [each[valid] for each in results] if options.packed else results

        return Prepared(run, read, functools.partial(_only, backend))

    found: dict[str, Baseline] = {"torch sdpa": lambda arguments: prepare(arguments, None)}
    for backend in BACKENDS:
        name = f"torch sdpa {backend.partition('_')[0].lower()}"
        found[name] = lambda arguments, backend=backend: prepare(arguments, backend)
    return found


def _mask(options: Options, keys: Tensor, length: int, device: torch.device) -> Tensor | None:
    """Returns `[batch, 1, 1, keys]` bool, the null key first, or None where every key is read."""
    if not options.mixed:
        return None
    mask = torch.arange(length) < keys[:, None]
    return (F.pad(mask, (1, 0), value=True) if options.null else mask)[:, None, None].to(device)


def _only(backend: str | None) -> Any:
    """Returns a context in which torch may use one backend alone."""
    if backend is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, backend))
