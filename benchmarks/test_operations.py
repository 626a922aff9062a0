"""The cases of the ops under pytest-benchmark, on the CPU: `make benchtests ARGS="-k rms_norm"`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.checked import Gate, call_of, computed
from benchmarks.machine import CPU
from benchmarks.operations import chosen_cases
from benchmarks.operations.case import cloned
from spear_fast.ops import providers

CANDIDATES = [
    pytest.param(case, name, id=f"{case.title} {case.mode}-{name}")
    for case in chosen_cases("cpu")
    if case.op in providers.ops()
    for name in providers.names(case.op)
    if "cuda" not in name and name not in ("triton", "flash-attn", "xformers")
]


@pytest.mark.parametrize(("case", "name"), CANDIDATES)
def test_operation(case, name, benchmark):
    arguments = case.inputs(torch.float32, CPU)
    provider = providers.get(case.op, name)
    reason = provider.refusal(
        providers.ProviderQuery(CPU, torch.float32, arguments[0].shape[-1], case.options(arguments))
    )
    if reason is not None:
        pytest.skip(reason)
    Gate.of(case, arguments).error(computed(case, name, arguments))
    benchmark.group = f"{case.title} {case.mode}"
    benchmark.extra_info.update(bytes=case.bytes(4), flops=case.flops, **case.shape)
    # where a step consumes its state, every call gets one of its own
    rounds = dict(rounds=20, setup=lambda: ((call_of(case, name, cloned(arguments)),), {}))
    with providers.forced(f"{case.op}={name}"):
        benchmark.pedantic(lambda call: call(), **rounds)
