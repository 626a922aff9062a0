"""What is measured of an op: its inputs at one shape, the work that the shape needs, and what others do instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spear_fast.ops import providers

FORWARD = "forward"
BOTH = "forward+backward"
SETS = ("tiny", "cpu", "gpu")


@dataclass(frozen=True)
class Model:
    """Sizes of SPEAR-TTS's models: `heads` of the encoder and of queries, `kv_heads` of the decoder's own history."""

    dim: int
    layers: int
    heads: int
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 512

    @property
    def inner(self) -> int:
        return int(self.dim * 4 * 2 / 3)


MODELS = {"512x6": Model(512, 6, 8), "1024x12": Model(1024, 12, 16), "tiny": Model(32, 2, 4, 2, 8, 40)}


@dataclass(frozen=True)
class Prepared:
    """A baseline over one copy of the inputs.

    run: what is timed. read: what to compare of its result, in the order of the op's results. within: its context.
    """

    run: Callable[[], Any]
    read: Callable[[Any], Sequence[Tensor]]
    within: Callable[[], AbstractContextManager] = contextlib.nullcontext


class ElsewhereError(Exception):
    """A baseline that has nothing to do on this kind of device."""


Baseline = Callable[[Sequence[Any]], Prepared]


@dataclass(frozen=True)
class OpCase:
    """One op at one shape.

    inputs: dtype, device → the op's arguments, by position; the same whenever it is called.
    bytes: bytes of a number → bytes that must be read and written at least, each once. flops: that must be computed.
    baselines: name → what takes the arguments and does the same without this package.
    against: the baselines of which the fastest is the one to compare with.
    wanted: type of device → the figure to reach: "times" the baseline, "percent" of the roofline, or "seconds".
    gradients: arguments that get gradients; none: the op's provider is called as it is.
    outputs: results that are compared, and that gradients start from.
    writes: arguments that the op writes instead. consumed: those that every call needs as they were.
    dtype: what it is always measured in, where the machine's usual one makes no sense.
    sets: where it belongs; see SETS. extra: measured after all others, when there is time.
    """

    op: str
    name: str
    shape: Mapping[str, Any]
    inputs: Callable[[torch.dtype, torch.device], tuple]
    bytes: Callable[[int], float]
    flops: float
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    against: tuple[str, ...] = ()
    wanted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    gradients: tuple[int, ...] = ()
    outputs: int | None = None
    writes: tuple[int, ...] = ()
    consumed: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    sets: tuple[str, ...] = ("gpu",)
    extra: bool = False

    @property
    def mode(self) -> str:
        return BOTH if self.gradients else FORWARD

    @property
    def title(self) -> str:
        return f"{self.op} {self.name}"

    def options(self, arguments: Sequence[Any]) -> tuple:
        """Returns what the op's definition says that its providers depend on, as its own choice remembers it."""
        memory = providers.chosen(self.op)
        with providers.forced(f"{self.op}=reference"):
            getattr(torch.ops.spear_fast, self.op).default(*cloned(arguments))
            return next(iter(memory))[3]

    def results(self, result: Any, arguments: Sequence[Any]) -> list[Tensor]:
        """Returns what is compared, of the op's result or of what it wrote."""
        if self.writes:
            return [arguments[i] for i in self.writes]
        return tensors_of(result)[: self.outputs]


def tensors_of(result: Any) -> list[Tensor]:
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else list(result)


def cloned(arguments: Sequence[Any]) -> list[Any]:
    return [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]


def plain(function: Callable[..., Any]) -> Baseline:
    """Returns the baseline that calls `function` with the op's own arguments."""
    return lambda arguments: Prepared(lambda: function(*arguments), tensors_of)


def with_gradients(
    function: Callable[..., Any],
    wanting: Sequence[int],
    arguments: Sequence[Any],
    outputs: int | None = 1,
    noise: Sequence[Tensor] = (),
) -> Callable[[], list[Tensor]]:
    """Returns what runs `function` forward and backward: its results, then a gradient for each argument in `wanting`.

    noise: what flows back into the results; random where it is left out, the same for the same shapes.
    """
    given = list(arguments)
    for index in wanting:
        given[index] = given[index].detach().requires_grad_()
    leaves = [given[index] for index in wanting]
    flowing = list(noise)

    def run() -> list[Tensor]:
        results = tensors_of(function(*given))[:outputs]
        if not flowing:
            flowing.extend(noise_like(each, each.shape) for each in results)
        gradients = torch.autograd.grad(results, leaves, flowing)
        return [*(each.detach() for each in results), *gradients]

    return run


def noise_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns random numbers of a shape, the same ones in whatever dtype and wherever."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(5)).to(tensor)


def frequencies(size: int, device: torch.device) -> Tensor:
    """Returns the rotary frequencies of a head, `[size / 2]`, float32."""
    return 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)


def rotated(x: Tensor, freqs: Tensor, positions: Tensor) -> Tensor:
    """Returns `x` `[..., heads, head_dim]` turned in plain torch as the reference package does: no fusing.

    positions: `[...]` up to the heads.
    """
    angle = (positions[..., None].float() * freqs).repeat_interleave(2, dim=-1).unsqueeze(-2)
    even, odd = x[..., ::2], x[..., 1::2]
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x * angle.cos().to(x.dtype)) + (turned * angle.sin().to(x.dtype))


def mixed_lengths(count: int, longest: int, device: torch.device) -> Tensor:
    """Returns `[count]` int64: lengths from a fifth of the longest to the longest, evenly spread, in mixed order."""
    spread = torch.linspace(longest / 5, longest, count).round().long().clamp(min=1)
    return spread[torch.randperm(count, generator=torch.Generator().manual_seed(2))].to(device)
