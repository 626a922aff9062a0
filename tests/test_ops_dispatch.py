"""The ops as torch sees them, the choice of providers, and what a wrong argument is answered with."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from ops_inputs import MAKE, OPS, call, function_of, given, made
from ops_matrix import device_of, moved, runnable
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spear_fast import ops
from spear_fast.ops import backends, providers

PROVIDERS = list(dict.fromkeys(row[:2] for row in runnable(*OPS)))
# options under which an op does more
OPTIONS = {
    "append_kv": {"tokens": 2},
    "decode_self_attention": {"tokens": 2, "append": True, "dim": 12},
    "decode_cross_attention": {"return_weights": True, "arrivals": 24, "split": 4, "scaled": True},
}


def overloads(op):
    """Returns the op as the dispatcher knows it: by itself, and by each provider that is registered from C++."""
    packet = getattr(torch.ops.spear_fast, op)
    return {name: getattr(packet, name) for name in packet.overloads()}


@pytest.mark.parametrize(("op", "provider"), PROVIDERS)
def test_opcheck(op, provider):
    row = providers.get(op, provider)
    with ops.forced(f"{op}={provider}"):
        for overload in {"default", provider} & set(overloads(op)):
            for shape in ({}, OPTIONS[op], {"dtype": torch.bfloat16, "strided": True}):
                # what opcheck compares by is not there for e4m3
                shape = {name: value for name, value in shape.items() if name != "scaled"}
                arguments = moved(MAKE[op](**shape), device_of(row))
                torch.library.opcheck(overloads(op)[overload], given(overloads(op)[overload], arguments))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("op", "provider"), PROVIDERS)
def test_compiles_whole(op, provider, dynamic):
    """One graph, no break, the same numbers; what is written in place is seen outside."""

    def doubled(first, *others):
        arguments = first * 2, *others
        return [each * 2 for each in made(op, call(op, arguments), arguments)]

    device = device_of(providers.get(op, provider))
    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with ops.forced(f"{op}={provider}"):
        for shape in ({}, {"size": 16, **OPTIONS[op]}):
            arguments = moved(MAKE[op](**shape), device)
            copies = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
            torch.testing.assert_close(compiled(*arguments), doubled(*copies))
            for argument, copy in zip(arguments, copies, strict=True):
                assert not isinstance(argument, Tensor) or argument.equal(copy)


@pytest.mark.slow
def test_compiles_with_inductor():
    arguments = MAKE["decode_cross_attention"]()[:6]
    compiled = torch.compile(lambda *tensors: ops.decode_cross_attention(*tensors) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), ops.decode_cross_attention(*arguments) + 1)


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_give_shape_and_dtype(op):
    for options in ({}, OPTIONS[op]):
        arguments = MAKE[op](dtype=torch.bfloat16, **options)
        real = made(op, call(op, arguments), arguments)
        with FakeTensorMode() as mode:
            inputs = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments]
            fake = made(op, call(op, inputs), inputs)
        for ours, theirs in zip(fake, real, strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


WRONG = {
    "append_kv": [
        (0, lambda t: t[0], "key must be [rows, tokens, kv_heads, head_dim], got [1, 2, 8]"),
        (0, lambda t: t.long(), "key must be floating point, got torch.int64"),
        (0, lambda t: t.expand(3, 8, 2, 8), "value must be [rows, tokens, kv_heads, head_dim] = [3, 8, 2, 8]"),
        (1, lambda t: t[:, :, :1], "value must be [rows, tokens, kv_heads, head_dim] = [3, 1, 2, 8], got [3, 1, 1, 8]"),
        (1, lambda t: t.double(), "value must be torch.float32 like key, got torch.float64"),
        (2, lambda t: t[1:], "freqs must be [head_dim / 2] = [4], got [3]"),
        (2, lambda t: t.half(), "freqs must be torch.float32, got torch.float16"),
        (3, lambda t: t.int(), "positions must be torch.int64, got torch.int32"),
        (3, lambda t: t[:2], "positions must be [rows] = [3], got [2]"),
        (3, lambda t: t + 7, "positions must lie in 0..6"),
        (3, lambda t: t - 7, "positions must lie in 0..6"),
        (4, lambda t: t[0], "cache_key must be [rows, kv_heads, length, head_dim], got [2, 7, 8]"),
        (4, lambda t: t.to("meta"), "cache_key must be on key's device cpu, got meta"),
        (
            5,
            lambda t: t[:, :, 1:],
            "cache_value must be [rows, kv_heads, length, head_dim] = [3, 2, 7, 8], got [3, 2, 6, 8]",
        ),
    ],
    "decode_self_attention": [
        (0, lambda t: t[:, 0], "query must be [utterances, beams, tokens, heads, head_dim], got [2, 1, 4, 8]"),
        (0, lambda t: t[:, :, :, :3], "kv_heads must be a divisor of the 3 heads, got 2"),
        (1, lambda t: t[1:], "freqs must be [head_dim / 2] = [4], got [3]"),
        (2, lambda t: t[:2], "cache_key must be [utterances * beams, kv_heads, length, head_dim] = [6, 2, 11, 8]"),
        (3, lambda t: t.bfloat16(), "cache_value must be torch.float32 like query, got torch.bfloat16"),
        (4, lambda t: t.long(), "ancestors must be torch.uint8, got torch.int64"),
        (4, lambda t: t[:, :, :5], "ancestors must be [utterances, beams, length] = [2, 3, 11], got [2, 3, 5]"),
        (4, lambda t: torch.full_like(t, 3), "ancestors must"),
        (5, lambda t: t[0], "lengths must be [utterances, beams] = [2, 3], got [3]"),
        (5, lambda t: t + 12, "lengths must lie in 0..11"),
        (5, lambda t: t - 12, "lengths must lie in 0..11"),
        (6, lambda t: torch.zeros(2, 3, 1, 2, 8), "key and value must be given together, got one of them"),
        (8, lambda t: torch.zeros(6), "residual must be [rows, dim] with 6 rows, got [6]"),
        (8, lambda t: torch.zeros(6, 4).double(), "residual must be torch.float32 like query, got torch.float64"),
    ],
    "decode_cross_attention": [
        (0, lambda t: t[0], "query must be [utterances, beams, heads, head_dim], got [3, 4, 8]"),
        (1, lambda t: t[0], "key must be [utterances, heads, source, head_dim], got [4, 11, 8]"),
        (2, lambda t: t[:, :, 1:], "value must be [utterances, heads, source, head_dim] = [2, 4, 11, 8]"),
        (2, lambda t: t.half(), "value must be torch.float32 like query, got torch.float16"),
        (3, lambda t: t[1:], "null_key must be [heads, head_dim] = [4, 8], got [3, 8]"),
        (5, lambda t: t.int(), "lengths must be torch.int64, got torch.int32"),
        (5, lambda t: t + 12, "lengths must lie in 0..11"),
        (5, lambda t: t - 12, "lengths must lie in 0..11"),
        (
            8,
            lambda t: torch.zeros(3),
            "arrivals must be torch.int32 [any] on cpu, contiguous, got torch.float32 [3] on cpu",
        ),
        (7, lambda t: torch.zeros(5, 4), "residual must be [rows, dim] with 6 rows, got [5, 4]"),
        (8, lambda t: torch.zeros(6).int()[::2], "arrivals must be torch.int32 [any] on cpu, contiguous"),
        (9, lambda t: -1, "split must be 0 or more, got -1"),
        (10, lambda t: torch.ones(2, 2, 4), "key must be torch.float8_e4m3fn, got torch.float32"),
    ],
}


@pytest.mark.parametrize("provider", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("op", "index", "spoil", "said"),
    [(op, *case) for op, cases in WRONG.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_argument(op, index, spoil, said, provider):
    """One sentence, the same from every provider: what, wanted, got, what to do."""
    function_of(op, provider)
    arguments = list(MAKE[op](**({} if op == "append_kv" else {"lengths": full_lengths(op)})))
    arguments[index] = spoil(arguments[index])
    with ops.forced(f"{op}={provider}"), pytest.raises(ValueError) as caught:
        call(op, arguments)
    assert_one_sentence(op, str(caught.value), said)


def assert_one_sentence(op, text, said):
    assert text.startswith(f"{op}: ")
    assert said in text
    assert "\n" not in text
    assert "; " in text


def test_more_tokens_than_the_caches_hold():
    with pytest.raises(ValueError) as caught:
        call("append_kv", MAKE["append_kv"](tokens=8, length=7, positions=torch.zeros(3, dtype=torch.long)))
    assert_one_sentence("append_kv", str(caught.value), "tokens must be at most the caches' length 7, got 8")


@pytest.mark.parametrize("provider", ["cpu", "reference"])
def test_the_last_of_the_tokens_must_fit_too(provider):
    function_of("append_kv", provider)
    arguments = MAKE["append_kv"](tokens=3, length=7, positions=torch.tensor([4, 5, 0]))
    with ops.forced(f"append_kv={provider}"), pytest.raises(ValueError) as caught:
        call("append_kv", arguments)
    assert_one_sentence("append_kv", str(caught.value), "positions must lie in 0..4")


def full_lengths(op):
    return torch.full((2, 3) if op == "decode_self_attention" else (2,), 11)


@pytest.mark.parametrize("op", OPS)
def test_odd_heads_cannot_be_rotated(op):
    if op == "decode_cross_attention":
        assert call(op, MAKE[op](size=5)).shape[-1] == 5
        return
    first, *others = MAKE[op](size=4)
    freqs = others[1] if op == "append_kv" else others[0]
    others = [t for t in others if t is not None]
    narrowed = [t if t is freqs or t.dim() < 3 or t.dtype == torch.uint8 else t[..., :3] for t in (first, *others)]
    narrowed[2 if op == "append_kv" else 1] = freqs[:1]
    with pytest.raises(ValueError, match="head_dim must be even, got 3"):
        call(op, narrowed)


def test_every_op_has_a_row_for_every_provider():
    rows = ops.available()
    assert {(row.op, row.provider) for row in rows} >= {(op, name) for op in OPS for name in ("cpu", "reference")}
    last = {row.op: row for row in rows}
    assert all((row.devices, row.missing) == ("any", None) for row in last.values())
    # that of a decoder's step, which is no function of tensors, is its layers one by one
    assert {row.provider for op, row in last.items() if op != "decode_step"} == {"reference"}


def test_the_preferred_provider_is_chosen_and_remembered():
    function_of("append_kv", "cpu")
    with ops.forced(""):
        arguments = MAKE["append_kv"]()
        ops.append_kv(*arguments)
        memory = providers.chosen("append_kv")
        assert memory == {(torch.device("cpu"), torch.float32, 8, ()): torch.ops.spear_fast.append_kv.cpu}
    with ops.forced("*=reference"):
        ops.append_kv(*arguments)
        assert [function.__module__ for function in memory.values()] == ["spear_fast.ops.reference.decode_attention"]
    assert memory == {}


def test_an_automatic_choice_falls_through_and_a_forced_one_raises():
    """float8 is taken by nobody's C++, and meta tensors by no CPU code."""
    arguments = [tensor.to("meta") for tensor in MAKE["decode_cross_attention"]()[:6]]
    assert ops.decode_cross_attention(*arguments).device.type == "meta"
    with (
        ops.forced("decode_cross_attention=cpu"),
        pytest.raises(RuntimeError, match=r"the provider asked for cannot compute it \(cpu: runs on cpu, not on meta"),
    ):
        ops.decode_cross_attention(*arguments)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("append_kv", "wants op=provider"),
        ("attend=cpu", "wants op=provider with op one of .*append_kv"),
        ("append_kv=cublas", "append_kv has no provider 'cublas'; choose from cpu, "),
        ("*=cublas", "has no provider 'cublas'"),
    ],
)
def test_wrong_setting(setting, said):
    with pytest.raises(ValueError, match=said), ops.forced(setting):
        pass


def test_a_provider_is_added_and_preferred():
    calls = []

    def recording(*arguments):
        calls.append(len(arguments))
        return providers.get("append_kv", "reference").function(*arguments)

    providers.register(providers.Provider("append_kv", "recording", recording), before="cpu")
    try:
        ops.append_kv(*MAKE["append_kv"]())
        assert calls == [6]
        with pytest.raises(ValueError, match="already has a provider"):
            providers.register(providers.Provider("append_kv", "recording", recording))
    finally:
        providers._providers["append_kv"].pop(0)
        providers.chosen("append_kv").clear()


class Elsewhere:
    """Stands for a tensor on a device that is not there."""

    def __init__(self, device):
        self.device = torch.device(device)


def test_triton_launches_where_the_tensors_are(monkeypatch):
    """Its launches go to the current device, which is another one here."""
    current = [0]

    @contextlib.contextmanager
    def switched(device):
        current.append(device.index)
        yield
        current.pop()

    module = SimpleNamespace(geglu=lambda first, *others: (current[-1], others))
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", switched)
    function = backends.triton("geglu", "geglu").function
    assert function(Elsewhere("cuda:1"), 2, 3) == (1, (2, 3))
    assert function(Elsewhere("cuda:0"), 2) == (0, (2,))
    assert function(Elsewhere("cpu")) == (0, ())
    assert current == [0]


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_the_environment_forces_a_provider():
    code = (
        "import torch; from spear_fast import ops\n"
        "ops.decode_cross_attention(*[torch.zeros(1, 1, 1, 2)] * 3, *[torch.zeros(1, 2)] * 2, torch.ones(1).long())\n"
        "from spear_fast.ops.providers import chosen\n"
        "print(*[function.__module__ for function in chosen('decode_cross_attention').values()])"
    )
    assert "reference" in run(code, SPEAR_FAST_PROVIDER="decode_cross_attention=reference").stdout
    wrong = run(code, SPEAR_FAST_PROVIDER="decode_cross_attention=cublas")
    assert "decode_cross_attention has no provider 'cublas'; choose from cpu, " in wrong.stderr


@pytest.mark.parametrize("op", OPS)
def test_direct_callers_stay_inside_the_buffers(op):
    """The native overload has no Python before it: it must refuse, not read past the end."""
    function_of(op, "cpu")
    for index in range(6):
        arguments = list(MAKE[op]())
        arguments[index] = arguments[index][..., :1]
        with pytest.raises(RuntimeError, match="do not fit each other"):
            overloads(op)["cpu"](*given(overloads(op)["cpu"], arguments))
    for index, tensor in enumerate(MAKE[op]()):
        # frequencies alone may be of another precision
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() > 1:
            arguments = list(MAKE[op]())
            arguments[index] = tensor.double()
            with pytest.raises(RuntimeError):
                overloads(op)["cpu"](*given(overloads(op)["cpu"], arguments))
