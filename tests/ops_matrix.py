"""The test matrix of the ops: who can compute an op here, and whether it computes what the definition says.

A provider runs on the CPU or, where there is one, on a GPU. Triton's run on the CPU in a process of their own with
TRITON_INTERPRET=1 (`make tests` starts it: the same tests with `-k triton`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tolerance import GRADIENTS, assert_within, to_float64
from torch import Tensor

from spear_fast.ops import providers

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def device_of(provider: providers.Provider) -> torch.device:
    """Returns where a provider is tested: on a GPU where it runs on one and there is one."""
    if torch.cuda.is_available() and (not provider.devices or "cuda" in provider.devices):
        return torch.device("cuda")
    return torch.device("cpu")


def runnable(*ops: str, dtypes: Sequence[torch.dtype] = DTYPES) -> list[tuple[str, str, torch.dtype]]:
    """Returns (op, provider, dtype) for all that can run on this machine."""
    found = []
    for op in ops:
        for name in providers.names(op):
            provider = providers.get(op, name)
            for dtype in dtypes:
                if provider.refusal(providers.ProviderQuery(device_of(provider), dtype, 64)) is None:
                    found.append((op, name, dtype))
    return found


def moved(arguments: Sequence[Any], device: torch.device) -> list[Any]:
    """Returns the arguments on a device, with their strides and what lies between: both are part of the case."""

    def move(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return [move(argument) if isinstance(argument, Tensor) else argument for argument in arguments]


def tensors_of(result: Any) -> list[Tensor]:
    """Returns the tensors of an op's result."""
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else list(result)


def assert_right(
    op: str,
    provider: str,
    definition: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    results: Callable[[Any, Sequence[Any]], Sequence[Tensor]] = lambda result, arguments: tensors_of(result),
    factor: float = 2.0,
) -> None:
    """Compares a provider with the definition in float64, by the error that the definition makes in the same dtype.

    results: what to compare, of the op's result and of its arguments after the call (for what it writes in place).
    """
    row = providers.get(op, provider)

    def compute(function: Callable[..., Any], inputs: list[Any]) -> Sequence[Tensor]:
        return results(function(*inputs), inputs)

    def copies() -> list[Any]:
        return [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]

    truths = compute(definition, [to_float64(argument) for argument in copies()])
    baselines = compute(definition, copies())
    # not cloned: strides are part of the case
    found = compute(row.function, moved(arguments, device_of(row)))
    for i, (result, truth, baseline) in enumerate(zip(found, truths, baselines, strict=True)):
        assert_within(result.cpu(), truth, baseline, factor=factor, what=f"{op} by {provider}, result {i}")


def assert_gradients(
    op: str,
    provider: str,
    public: Callable[..., Any],
    definition: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    wanting: Sequence[int],
) -> None:
    """Compares every gradient of `public`, with this provider forced, with autograd through the definition in float64.

    public: the op as users call it. definition: the same signature, in plain torch that autograd can follow.
    wanting: indices of the arguments that get gradients.
    """
    device = device_of(providers.get(op, provider))

    def gradients(function: Callable[..., Any], inputs: list[Any], seed: int = 0) -> list[Tensor]:
        for index in wanting:
            inputs[index] = inputs[index].detach().requires_grad_()
        outputs = [each for each in tensors_of(function(*inputs)) if each.requires_grad]
        generator = torch.Generator().manual_seed(seed)
        noise = [torch.randn(each.shape, generator=generator, dtype=torch.float32) for each in outputs]
        torch.autograd.backward(outputs, [n.to(each) for n, each in zip(noise, outputs, strict=True)])
        # an argument that plays no part has the gradient zero
        return [torch.zeros_like(inputs[i]) if inputs[i].grad is None else inputs[i].grad for i in wanting]

    copies = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
    truths = gradients(definition, [to_float64(argument) for argument in copies])
    baselines = gradients(definition, list(copies))
    with providers.forced(f"{op}={provider}"):
        found = gradients(public, moved(arguments, device))
    for index, result, truth, baseline in zip(wanting, found, truths, baselines, strict=True):
        what = f"{op} by {provider}, gradient of argument {index}"
        assert_within(result.cpu(), truth, baseline, factor=GRADIENTS, what=what)
