"""Cases of the ops that attend for the newest token: bytes are read once whatever the number of beams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operations.case import MODELS, Model, OpCase, Prepared, frequencies, mixed_lengths, plain, rotated
from spear_fast.decoding.packed.memory import FP8
from spear_fast.ops.decode_cross_attention import arrivals_for, planned_split
from spear_fast.ops.reference.decode_attention import dequantised

BATCHES = ((1, 1), (32, 4), (128, 5), (512, 5))
# source positions → generated ones at which a step is measured
GENERATED = {250: 64, 500: 100, 1000: 150}
# the decode ops' share of measured bandwidth that is aimed at on GPUs
SHARE = 75.0


def cases() -> Iterator[OpCase]:
    tiny = MODELS["tiny"]
    for make in (append_kv, self_attention, cross_attention):
        yield make("tiny", tiny, 2, 3, 12, 8, sets=("tiny",))
        for source, generated in GENERATED.items():
            for name, model in list(MODELS.items())[:2]:
                for batch, beams in BATCHES:
                    on_cpu = (name, source) == ("512x6", 250) and batch <= 32
                    first = on_cpu or (batch, beams, source) in ((128, 5, 500), (512, 5, 1000))
                    sets = ("cpu", "gpu") if on_cpu else ("gpu",)
                    yield make(name, model, batch, beams, source, generated, sets=sets, extra=not first)
    sizes = (32, 4, 250, 64)
    yield self_attention("512x6", MODELS["512x6"], *sizes, tokens=4, sets=("cpu", "gpu"))
    yield cross_attention("512x6", MODELS["512x6"], *sizes, mixed=True, sets=("cpu", "gpu"))
    yield cross_attention("tiny", tiny, 2, 3, 12, 8, scaled=True, sets=("tiny",))
    for name, model in list(MODELS.items())[:2]:
        for batch, source in ((128, 500), (512, 1000)):
            yield cross_attention(name, model, batch, 5, source, GENERATED[source], scaled=True, sets=("gpu",))


def _shape(model: Model, batch: int, beams: int, source: int, generated: int, **more: int) -> dict[str, int]:
    return dict(batch=batch, beams=beams, source=source, generated=generated, heads=model.heads,
                kv_heads=model.kv_heads, head_dim=model.head_dim, **more)  # fmt: skip


def _caches(rows: int, model: Model, length: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    shape = rows, model.kv_heads, length, model.head_dim
    return [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]


def append_kv(
    name: str, model: Model, batch: int, beams: int, source: int, generated: int,
    *, sets: tuple[str, ...], extra: bool = False,
) -> OpCase:  # fmt: skip
    rows, numbers = batch * beams, model.kv_heads * model.head_dim

    def inputs(dtype: torch.dtype, device: torch.device) -> tuple:
        torch.manual_seed(0)
        new = (rows, 1, model.kv_heads, model.head_dim)
        key, value = (torch.randn(new, device=device, dtype=dtype) for _ in range(2))
        positions = torch.full((rows,), generated - 1, device=device)
        caches = _caches(rows, model, generated, dtype, device)
        return key, value, frequencies(model.head_dim, device), positions, *caches

    def index_put(
        key: Tensor, value: Tensor, freqs: Tensor, positions: Tensor, cache_key: Tensor, cache_value: Tensor
    ) -> None:
        row = torch.arange(rows, device=key.device)[:, None]
        cache_key[row, :, positions[:, None]] = rotated(key, freqs, positions[:, None])
        cache_value[row, :, positions[:, None]] = value

    def baseline(arguments) -> Prepared:
        return Prepared(lambda: index_put(*arguments), lambda result: arguments[-2:])

    return OpCase(
        "append_kv",
        f"{name} {batch}x{beams} s{source}",
        _shape(model, batch, beams, source, generated),
        inputs,
        bytes=lambda size: 4.0 * size * rows * numbers,
        flops=3.0 * rows * numbers,
        baselines={"torch, rotate and index_put": baseline},
        against=("torch, rotate and index_put",),
        writes=(4, 5),
        sets=sets,
        extra=extra,
    )


def self_attention(
    name: str, model: Model, batch: int, beams: int, source: int, generated: int,
    *, tokens: int = 1, sets: tuple[str, ...], extra: bool = False,
) -> OpCase:  # fmt: skip
    """As in a step: of a projection that was not normed, what is new written.

    Half of the history is common to the beams of an utterance, the other half each has its own.
    """
    rows, trunk = batch * beams, generated // 2
    heads, groups, size = model.heads, model.kv_heads, model.head_dim
    distinct = trunk + beams * (generated - trunk)
    read = sum(generated - tokens + 1 + t for t in range(tokens))

    def inputs(dtype: torch.dtype, device: torch.device) -> tuple:
        torch.manual_seed(0)
        query = torch.randn(batch, beams, tokens, heads, size, device=device, dtype=dtype)
        ancestors = torch.arange(beams, device=device)[:, None].expand(batch, beams, generated).clone()
        ancestors[:, :, :trunk] = torch.randint(beams, (batch, 1, trunk), device=device)
        lengths = torch.full((batch, beams), generated, device=device)
        caches = _caches(rows, model, generated, dtype, device)
        new = [torch.randn(batch, beams, tokens, groups, size, device=device, dtype=dtype) for _ in range(2)]
        residual = torch.randn(rows * tokens, model.dim, device=device, dtype=dtype)
        return query, frequencies(size, device), *caches, ancestors.to(torch.uint8), lengths, *new, residual

    def appended(arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Returns the arguments up to the lengths, the queries normed, after writing what is new into the caches."""
        query, freqs, *caches, ancestors, lengths, key, value, residual = arguments
        inverse = model.dim**0.5 / torch.linalg.vector_norm(residual, dim=-1, dtype=torch.float32)
        query, key, value = (
            (each * inverse.view(batch, beams, tokens, 1, 1)).to(each.dtype) for each in (query, key, value)
        )
        positions = torch.arange(generated - tokens, generated, device=query.device)
        key = rotated(key, freqs, positions.expand(batch, beams, tokens))
        for cache, each in zip(caches, (key, value), strict=True):
            cache[:, :, generated - tokens :] = each.flatten(0, 1).transpose(1, 2)
        return query, freqs, *caches, ancestors, lengths

    def attend(query: Tensor, freqs: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
        ahead = torch.arange(tokens, device=query.device)
        query = rotated(query, freqs, lengths[..., None] - tokens + ahead).flatten(0, 1).transpose(1, 2)
        mask = None
        if tokens > 1:
            position = torch.arange(generated, device=query.device)
            mask = position <= (generated - tokens + ahead)[:, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=heads != groups)
        return out.transpose(1, 2).unflatten(0, (batch, beams))

    def gather(*arguments: Tensor) -> Tensor:
        query, freqs, key, value, ancestors, lengths = appended(arguments)
        utterance = torch.arange(batch, device=query.device)[:, None, None]
        position = torch.arange(generated, device=query.device)
        slots = ancestors.long()

        def follow(cache: Tensor) -> Tensor:
            by_position = cache.view(batch, beams, groups, generated, size).transpose(2, 3)
            return by_position[utterance, slots, position].flatten(0, 1).transpose(1, 2)

        return attend(query, freqs, follow(key), follow(value), lengths)

    def reorder(arguments) -> Prepared:
        parents = torch.arange(rows, device=arguments[0].device)

        def run() -> Tensor:
            query, freqs, key, value, _, lengths = appended(arguments)
            # what engines without a table do each step: every row of both caches moves
            return attend(query, freqs, key.index_select(0, parents), value.index_select(0, parents), lengths)

        # rows that stay where they are do not attend to the trunk that the op reads, so nothing is compared
        return Prepared(run, lambda result: [])

    return OpCase(
        "decode_self_attention",
        f"{name} {batch}x{beams} s{source}" + (f" {tokens} tokens" if tokens > 1 else ""),
        _shape(model, batch, beams, source, generated, tokens=tokens),
        inputs,
        bytes=lambda b: float(
            b * (batch * distinct * 2 * groups * size + rows * tokens * (2 * (heads + groups) * size + model.dim))
            + rows * generated
        ),
        flops=4.0 * rows * heads * size * read,
        baselines={"torch, gather then attend": plain(gather), "torch, reorder then attend": reorder},
        against=("torch, gather then attend",),
        wanted=_wanted(batch, beams, source) if tokens == 1 else {},
        sets=sets,
        extra=extra,
    )


def cross_attention(
    name: str, model: Model, batch: int, beams: int, source: int, generated: int,
    *, mixed: bool = False, scaled: bool = False, sets: tuple[str, ...], extra: bool = False,
) -> OpCase:  # fmt: skip
    """scaled: keys and values are held in 8 bits; the baselines get them as the model computes."""
    heads, size = model.heads, model.head_dim
    lengths = mixed_lengths(batch, source, torch.device("cpu")) if mixed else torch.full((batch,), source)
    positions = int(lengths.sum()) + batch

    def inputs(dtype: torch.dtype, device: torch.device) -> tuple:
        torch.manual_seed(0)
        query = torch.randn(batch, beams, heads, size, device=device, dtype=dtype)
        key, value = (torch.randn(batch, heads, source, size, device=device, dtype=dtype) for _ in range(2))
        null_key, null_value = (torch.randn(heads, size, device=device, dtype=dtype) for _ in range(2))
        arrivals, split = arrivals_for(batch, heads, beams, device), planned_split(batch, heads)
        scales = torch.rand(2, batch, heads, device=device) + 0.5 if scaled else None
        if scaled:
            key, value = key.to(FP8), value.to(FP8)
        return query, key, value, null_key, null_value, lengths.to(device), False, None, arrivals, split, scales

    def with_null(null: Tensor, keys: Tensor) -> Tensor:
        return torch.cat((null[None, :, None].expand(batch, -1, -1, -1), keys), dim=2)

    def mask_of(lengths: Tensor) -> Tensor | None:
        if not mixed:
            return None
        return (torch.arange(source + 1, device=lengths.device) <= lengths[:, None])[:, None, None]

    def prepared(arguments, *, copied: bool, grouped: bool) -> Prepared:
        query, key, value, null_key, null_value, lengths, *_, scales = arguments
        if scales is not None:
            key, value = dequantised(key, value, scales, query.dtype)
        # keys with the null key first are made once an utterance, not each step
        key, value, mask = with_null(null_key, key), with_null(null_value, value), mask_of(lengths)
        if not grouped:
            rows = (batch, beams, heads, source + 1, size)
            key, value = (each[:, None].expand(rows).flatten(0, 1) if copied else each for each in (key, value))
            mask = None if mask is None else mask.repeat_interleave(beams, dim=0)

        def run() -> Tensor:
            if grouped:
                out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=mask)
                return out.transpose(1, 2)
            # expanding inside an utterance is a copy as soon as rows are flattened: the copy is what is timed here
            keys, values = (each if copied else each[:, None].expand(rows).flatten(0, 1) for each in (key, value))
            out = F.scaled_dot_product_attention(query.flatten(0, 1)[:, :, None], keys, values, attn_mask=mask)
            return out[:, :, 0].unflatten(0, (batch, beams))

        return Prepared(run, lambda result: [result])

    return OpCase(
        "decode_cross_attention",
        f"{name} {batch}x{beams} s{source}" + (" mixed" if mixed else "") + (" fp8" if scaled else ""),
        _shape(model, batch, beams, source, generated),
        inputs,
        bytes=lambda b: float(2 * heads * size * (positions * (FP8.itemsize if scaled else b) + b * batch * beams)),
        flops=4.0 * beams * heads * size * positions,
        baselines={
            "sdpa, keys copied for each beam before": lambda a: prepared(a, copied=True, grouped=False),
            "sdpa, keys expanded each step": lambda a: prepared(a, copied=False, grouped=False),
            "sdpa, beams as query rows": lambda a: prepared(a, copied=True, grouped=True),
        },
        against=("sdpa, keys copied for each beam before",),
        wanted={} if mixed or scaled else _wanted(batch, beams, source),
        outputs=1,
        sets=sets,
        extra=extra,
    )


def _wanted(batch: int, beams: int, source: int) -> dict[str, dict[str, float]]:
    """Returns the figures to reach, where this is the shape for which they are stated."""
    wanted: dict[str, dict[str, float]] = {}
    if (batch, beams, source) == (32, 4, 250):
        wanted["cpu"] = {"times": 2.0}
    if (batch, beams) == (128, 5):
        wanted["cuda"] = {"percent": SHARE}
    return wanted
