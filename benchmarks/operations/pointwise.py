"""Cases of norm, gated activation, rotation and loss: all of them read and write memory and do little else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operations.case import MODELS, Baseline, Model, OpCase, Prepared, frequencies, plain, rotated
from benchmarks.operations.case import with_gradients as flowing

# name → rows: a step of 32 utterances with 4 beams, of 512 with 5, and a batch of sources in training
STEPS = {"32x4": 128, "512x5": 2560}
SOURCES = {"8x250": 2000, "32x1000": 32000}


def cases() -> Iterator[OpCase]:
    yield from _at("tiny", "tiny", 6, sets=("tiny",))
    for name in ("512x6", "1024x12"):
        for batch, rows in (STEPS | SOURCES).items():
            on_cpu = name == "512x6" and batch in ("32x4", "8x250")
            sets = ("cpu", "gpu") if on_cpu else ("gpu",)
            # on a GPU the largest shapes come first: the small ones are launches
            yield from _at(name, batch, rows, sets=sets, extra=not on_cpu and rows < 32000)


def _at(name: str, batch: str, rows: int, *, sets: tuple[str, ...], extra: bool = False) -> Iterator[OpCase]:
    model, common = MODELS[name], dict(sets=sets, extra=extra)
    title = name if batch == name else f"{name} {batch}"
    yield rms_norm(title, model, rows, residual=False, **common)
    yield geglu(title, model, rows, **common)
    if batch in STEPS:
        yield rms_norm(title, model, rows, residual=True, **common)
        return
    yield rms_norm(title, model, rows, residual=True, training=True, **common)
    yield geglu(title, model, rows, training=True, **common)
    yield rotary(title, model, rows, **common)
    yield cross_entropy(title, model, rows, **common)
    yield cross_entropy(title, model, rows, training=True, **common)


def both_ways(function: Callable[..., Any], wanting: Sequence[int], outputs: int) -> Baseline:
    """Returns the baseline that runs `function` forward and backward."""

    def prepared(arguments: Sequence[Any]) -> Prepared:
        return Prepared(flowing(function, wanting, arguments, outputs), list)

    return prepared


def _baselines(functions: dict[str, Callable[..., Any]], wanting: Sequence[int], outputs: int) -> dict[str, Baseline]:
    return {
        name: both_ways(function, wanting, outputs) if wanting else plain(function)
        for name, function in functions.items()
    }


def rms_norm(
    name: str, model: Model, rows: int,
    *, residual: bool, training: bool = False, sets: tuple[str, ...], extra: bool = False,
) -> OpCase:  # fmt: skip
    dim = model.dim
    outputs = 2 if residual else 1
    wanting = () if not training else (0, 1, 2) if residual else (0, 1)

    def inputs(dtype: torch.dtype, device: torch.device) -> tuple:
        torch.manual_seed(0)
        x, added = (torch.randn(rows, dim, device=device, dtype=dtype) for _ in range(2))
        gamma = 1 + torch.randn(dim, device=device, dtype=dtype) / 10
        return x, gamma, added if residual else None

    def composed(x: Tensor, gamma: Tensor, added: Tensor | None) -> tuple[Tensor, ...]:
        total = x if added is None else x + added
        normed = F.normalize(total, dim=-1) * dim**0.5 * gamma
        return (normed,) if added is None else (normed, total)

    def builtin(x: Tensor, gamma: Tensor, added: Tensor | None) -> tuple[Tensor, ...]:
        total = x if added is None else x + added
        normed = F.rms_norm(total, (dim,), gamma)
        return (normed,) if added is None else (normed, total)

    # forward: x and what is added, the result and the sum; backward: both gradients, the sum, the gradient
    moved = rows * dim * ((4 if residual else 2) + (0 if not training else 4 if residual else 3))
    return OpCase(
        "rms_norm",
        f"{name} residual" if residual else name,
        dict(rows=rows, dim=dim),
        inputs,
        bytes=lambda size: float(size * (moved + dim)),
        flops=float(rows * dim * (4 + (8 if training else 0))),
        baselines=_baselines({"torch": composed, "torch rms_norm": builtin}, wanting, outputs),
        against=("torch",),
        wanted={"cpu": {"times": 1.5}},
        gradients=wanting,
        outputs=outputs,
        sets=sets,
        extra=extra,
    )


def geglu(
    name: str, model: Model, rows: int, *, training: bool = False, sets: tuple[str, ...], extra: bool = False
) -> OpCase:
    inner = model.inner
    # the next matmul's size, a multiple of 8 numbers
    width = -(-inner // 8) * 8
    wanting = (0, 1) if training else ()

    def inputs(dtype: torch.dtype, device: torch.device) -> tuple:
        torch.manual_seed(0)
        x, bias = torch.randn(rows, 2 * inner, device=device, dtype=dtype), torch.randn(2 * inner).to(device, dtype)
        return x, bias, width, None

    def composed(x: Tensor, bias: Tensor, width: int, *_: None) -> Tensor:
        values, gates = (x + bias).chunk(2, dim=-1)
        return F.pad(values * F.gelu(gates), (0, width - inner))

    moved = rows * (2 * inner + width) + (rows * (width + 4 * inner) if training else 0)
    return OpCase(
        "geglu",
        name,
        dict(rows=rows, inner=inner, width=width),
        inputs,
        bytes=lambda size: float(size * (moved + 2 * inner)),
        flops=float(rows * inner * (14 + (24 if training else 0))),
        baselines=_baselines({"torch": composed}, wanting, 1),
        against=("torch",),
        wanted={"cpu": {"times": 1.5}},
        gradients=wanting,
        outputs=1,
        sets=sets,
        extra=extra,
    )


def rotary(name: str, model: Model, rows: int, *, sets: tuple[str, ...], extra: bool = False) -> OpCase:
    heads, size = model.heads, model.head_dim
    length = rows if rows < 250 else 250
    shape = rows // length, length, heads, size

    def inputs(dtype: torch.dtype, device: torch.device) -> tuple:
        torch.manual_seed(0)
        return torch.randn(shape, device=device, dtype=dtype), frequencies(size, device), None, False

    def composed(x: Tensor, freqs: Tensor, positions: None, inverse: bool) -> Tensor:
        return rotated(x, freqs, torch.arange(length, device=x.device))

    return OpCase(
        "rotary",
        name,
        dict(zip(("batch", "length", "heads", "head_dim"), shape, strict=True)),
        inputs,
        bytes=lambda b: 2.0 * b * rows * heads * size,
        flops=3.0 * rows * heads * size,
        baselines={"torch": plain(composed)},
        against=("torch",),
        sets=sets,
        extra=extra,
    )


def cross_entropy(
    name: str, model: Model, rows: int, *, training: bool = False, sets: tuple[str, ...], extra: bool = False
) -> OpCase:
    dim, vocabulary = model.dim, model.vocabulary
    wanting = (0, 1) if training else ()

    def inputs(dtype: torch.dtype, device: torch.device) -> tuple:
        torch.manual_seed(0)
        hidden = torch.randn(rows, dim, device=device, dtype=dtype)
        weight = torch.randn(vocabulary, dim, device=device, dtype=dtype) / dim**0.5
        labels = torch.randint(vocabulary, (rows,), device=device)
        labels[::7] = -100
        return hidden, weight, labels, -100

    def composed(hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=ignore, reduction="none")

    def exact(hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, labels, ignore_index=ignore, reduction="none")

    return OpCase(
        "cross_entropy",
        name,
        dict(rows=rows, dim=dim, vocabulary=vocabulary),
        inputs,
        bytes=lambda size: float(size * (rows * dim + vocabulary * dim) * (3 if training else 1) + 16 * rows),
        flops=(8.0 if training else 2.0) * rows * dim * vocabulary,
        baselines=_baselines({"torch": composed if not training else exact}, wanting, 1),
        against=("torch",),
        gradients=wanting,
        outputs=1,
        sets=sets,
        extra=extra,
    )
