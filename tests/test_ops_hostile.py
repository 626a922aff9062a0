"""Tensors of odd dtypes, layouts and views are refused in one sentence, or computed as what they stand for."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from ops_examples import EXAMPLES
from ops_matrix import tensors_of
from torch import Tensor

from spear_fast import ops
from spear_fast.ops import attention_peers, backends, providers

OPS = sorted(EXAMPLES)
INTEGERS = [torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.bool, torch.complex64]
NARROW = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]


def call(op, arguments):
    return getattr(torch.ops.spear_fast, op)(*arguments)


def answer(op, arguments):
    """Returns what an op says of its arguments: one sentence."""
    with pytest.raises(ValueError) as caught:
        call(op, arguments)
    text = str(caught.value)
    assert text.startswith(f"{op}: "), text
    assert "\n" not in text
    assert "; " in text
    return text


def tensors(op):
    """Returns the positions of an op's tensors."""
    return [i for i, each in enumerate(EXAMPLES[op]()) if isinstance(each, Tensor)]


@pytest.mark.parametrize("dtype", [*INTEGERS, *NARROW], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_dtypes(op, dtype):
    """All numbers that should be floating point, and each tensor by itself."""
    floats = lambda each: isinstance(each, Tensor) and each.is_floating_point()  # noqa: E731
    arguments = [each.to(dtype) if floats(each) else each for each in EXAMPLES[op]()]
    wanted = "floating point of 16 bits or more" if dtype in NARROW else "floating point"
    assert f"must be {wanted}, got {dtype}; " in answer(op, arguments)
    for i in tensors(op):
        arguments = list(EXAMPLES[op]())
        if arguments[i].dtype != dtype:
            arguments[i] = arguments[i].to(dtype)
            assert str(dtype) in answer(op, arguments)


@pytest.mark.parametrize("provider", ["", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_sparse_tensors(op, provider):
    """Also by plain torch, which takes some of them and computes something else."""
    for i in tensors(op):
        arguments = list(EXAMPLES[op]())
        if arguments[i].dim():
            arguments[i] = arguments[i].to_sparse()
            with ops.forced(f"{op}={provider}" if provider else ""):
                answer(op, arguments)


def test_layouts_are_named():
    x, gamma = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"^rms_norm: x must be dense, got torch.sparse_coo; call .to_dense\(\)"):
        ops.rms_norm(x.to_sparse(), gamma)
    with pytest.raises(ValueError, match=r"^rms_norm: x must be dense, got a nested tensor; .*to_padded_tensor"):
        ops.rms_norm(torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)]), gamma)


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_compute_nothing_and_give_shapes(op):
    arguments = EXAMPLES[op]()
    away = [each.to("meta") if isinstance(each, Tensor) else each for each in arguments]
    found, wanted = tensors_of(call(op, away)), tensors_of(call(op, arguments))
    assert [(each.shape, each.dtype) for each in found] == [(each.shape, each.dtype) for each in wanted]
    assert all(each.device.type == "meta" for each in found)
    if len(tensors(op)) > 1:
        assert "meta" in answer(op, [arguments[0].to("meta"), *arguments[1:]])


def negated(tensor):
    """Returns a view of other memory that stands for the same numbers, negated when they are read."""
    view = torch._neg_view(-tensor)
    assert view.is_neg()
    assert torch.equal(view, tensor)
    return view


@pytest.mark.parametrize("op", OPS)
def test_negated_views(op):
    """What is read may be one; what is written may not: torch's own way to write back would crash."""
    schema = getattr(torch.ops.spear_fast, op).default._schema
    writes = any(argument.alias_info is not None for argument in schema.arguments)
    for i in tensors(op):
        arguments = EXAMPLES[op]()
        if not arguments[i].is_floating_point():
            continue
        views = [negated(each) if place == i else each for place, each in enumerate(arguments)]
        if writes:
            assert "every argument must be a tensor whose memory holds its numbers" in answer(op, views)
            continue
        for found, wanted in zip(tensors_of(call(op, views)), tensors_of(call(op, arguments)), strict=True):
            torch.testing.assert_close(found, wanted, equal_nan=True)


def test_negated_views_are_refused_where_memory_is_read_as_it_lies(monkeypatch):
    """By Triton, by CuPy and by packages: a pointer says nothing of the bit."""
    asked = []
    module = SimpleNamespace(geglu=lambda *arguments: asked.append(arguments), beam_step=asked.append)
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(attention_peers, "_flash_attn", lambda: pytest.fail("was asked"))
    view, x = negated(torch.ones(2, 4)), torch.ones(2, 4)
    arguments = (x, view, x, *[None] * 3, 0, 0, *[None] * 3, False, False, 0.0, None)
    for op, function in (
        ("geglu", backends.triton("geglu", "geglu").function),
        ("beam_step", backends.cuda("beam_step").function),
        ("attention", attention_peers.flash_attn("attention").function),
    ):
        with pytest.raises(ValueError, match=f"^{op}: every argument must be .*, got a negated or conjugated view; "):
            function(*(arguments if op == "attention" else (view, None, 4)))
    assert asked == []
    backends.triton("geglu", "geglu").function(x, None, 4)
    assert len(asked) == 1


def test_offsets_whose_difference_wraps(monkeypatch):
    """-2**31 - (2**31 - 1) is 1 in 32 bits; on a GPU, where nobody else looks, debug mode does."""
    query, key = torch.zeros(5, 2, 8), torch.zeros(5, 2, 8)
    wrapping = torch.tensor([0, 2**31 - 1, -(2**31), -1, 5], dtype=torch.int32)
    right = torch.tensor([0, 5, 5, 5, 5], dtype=torch.int32)
    monkeypatch.setattr("spear_fast.ops.reference.ranges.DEBUG", True)
    providers.register(providers.Provider("attention", "careless", lambda *arguments: pytest.fail("was asked")))
    try:
        with providers.forced("attention=careless"):
            for packing in ((wrapping, right), (right, wrapping)):
                arguments = (query, key, key, None, *packing, 2**40, 2**40, *[None] * 3, False, False, 0.0, None)
                assert "must rise from 0 to 5, got [0, 2147483647, -2147483648, -1, 5]" in answer(
                    "attention", arguments
                )
    finally:
        providers._providers["attention"].pop()
        providers.chosen("attention").clear()


USE = "import torch; from spear_fast import ops; print(ops.rms_norm(torch.ones(1, 4), torch.ones(4)).shape)"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("rms_norm=cublas", "ValueError: SPEAR_FAST_PROVIDER: rms_norm has no provider 'cublas'; choose from cpu, "),
        ("*=cublas", "ValueError: SPEAR_FAST_PROVIDER: * has no provider 'cublas'; choose from "),
        ("rms_norms=cpu", "ValueError: SPEAR_FAST_PROVIDER wants op=provider with op one of "),
        ("rms_norm=triton", "the provider asked for cannot compute it (triton: "),
    ],
)
def test_wrong_settings_say_where_they_come_from(setting, said):
    environment = {**os.environ, "SPEAR_FAST_PROVIDER": setting, "TRITON_INTERPRET": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert said in last
    assert "SPEAR_FAST_PROVIDER" in last


@pytest.mark.parametrize("setting", ["decode_step=layered", "*=layered"])
def test_an_op_of_a_layer_above_may_be_named_before_it_is_defined(setting):
    environment = {**os.environ, "SPEAR_FAST_PROVIDER": setting}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "torch.Size([1, 4])", done.stderr
