"""What the extension's classes and ops refuse before they read or write memory that is not theirs.

Without the checks most of these end the process, or read what lies beside a buffer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spear_fast import ops
from spear_fast.ops import extension

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

HEADS, KV_HEADS, SIZE, INNER, DIM, VOCABULARY = 2, 1, 4, 6, 8, 5
BEAMS, CAPACITY, SOURCE = 2, 6, 3


def packed(outputs: int, features: int, bias: bool = False, kind: str = "float32") -> Any:
    return torch.classes.spear_fast.PackedLinear(
        torch.randn(outputs, features), torch.randn(outputs) if bias else None, kind
    )


def linears() -> dict[str, Any]:
    return {
        "query_key_value": packed((HEADS + 2 * KV_HEADS) * SIZE, DIM),
        "self_output": packed(DIM, HEADS * SIZE),
        "cross_query": packed(HEADS * SIZE, DIM),
        "cross_output": packed(DIM, HEADS * SIZE),
        "up_gate": packed(2 * INNER, DIM),
        "down": packed(DIM, INNER),
        "logits": packed(VOCABULARY, DIM),
    }


def constants() -> dict[str, Tensor]:
    return {
        "null_key": torch.randn(HEADS, SIZE),
        "null_value": torch.randn(HEADS, SIZE),
        "null_output": torch.randn(DIM),
        "bias": torch.randn(2 * INNER),
        "freqs": torch.rand(SIZE // 2),
    }


def layers(**changed: Any) -> Any:
    """Returns the decoder layers of a small model, some of their parts replaced."""
    parts = {**linears(), **constants(), "embedding": torch.randn(VOCABULARY + 1, DIM), "heads": HEADS, **changed}
    return torch.classes.spear_fast.DecoderLayers(
        [parts[name] for name in linears()],
        [parts[name] for name in constants()],
        parts["embedding"],
        parts["heads"],
        parts.get("kv_heads", KV_HEADS),
    )


def arguments(halves: int = 1, **changed: Any) -> list[Any]:
    """Returns what `step` takes for one utterance, in its order, some of it replaced."""
    rows = halves * BEAMS
    fitting = {
        "inputs": torch.zeros(1, BEAMS, dtype=torch.long),
        "keys": [torch.zeros(rows, KV_HEADS, CAPACITY, SIZE)],
        "values": [torch.zeros(rows, KV_HEADS, CAPACITY, SIZE)],
        "memory_keys": [torch.zeros(1, HEADS, SOURCE, SIZE)],
        "memory_values": [torch.zeros(1, HEADS, SOURCE, SIZE)],
        "memory_lengths": torch.tensor([SOURCE]),
        "ancestors": torch.zeros(halves, BEAMS, CAPACITY, dtype=torch.uint8),
        "lengths": torch.zeros(halves, BEAMS, dtype=torch.long),
    }
    assert set(changed) <= set(fitting)
    return list({**fitting, **changed}.values())


@pytest.mark.parametrize("halves", [1, 2], ids=["alone", "guided"])
def test_what_fits_is_computed(halves):
    logits = layers().step(*arguments(halves))
    assert logits.shape == (halves * BEAMS, VOCABULARY)
    assert logits.isfinite().all()


def test_layers_are_wanted():
    one = torch.classes.spear_fast.DecoderLayers
    with pytest.raises(ValueError, match="wanted at least one layer"):
        one([packed(VOCABULARY, DIM)], [], torch.randn(VOCABULARY + 1, DIM), HEADS, KV_HEADS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("null_output", lambda: torch.randn(0)),
        ("null_output", lambda: torch.randn(1)),
        ("null_output", lambda: torch.randn(DIM, dtype=torch.float64)),
        ("null_output", lambda: torch._neg_view(torch.randn(DIM))),
        ("null_key", lambda: torch.randn(HEADS * SIZE)),
        ("null_key", lambda: torch.tensor(1.0)),
        ("null_key", lambda: torch.randn(HEADS, 0)),
        ("null_value", lambda: torch.randn(HEADS, SIZE - 1)),
        ("null_value", lambda: torch.empty(HEADS, SIZE, device="meta")),
        ("bias", lambda: torch.randn(3)),
        ("bias", lambda: torch.randn(4 * INNER)),
        ("freqs", lambda: torch.rand(1)),
        ("freqs", lambda: torch.rand(SIZE // 2).to_sparse()),
        ("embedding", lambda: torch.randn(DIM)),
        ("embedding", lambda: torch.randn(VOCABULARY, DIM).half()),
        ("heads", lambda: 0),
        ("heads", lambda: -2),
        ("kv_heads", lambda: 0),
        ("kv_heads", lambda: 2**62),
        ("query_key_value", lambda: packed(HEADS * SIZE, DIM)),
        ("self_output", lambda: packed(DIM, 1)),
        ("cross_query", lambda: packed(1, DIM)),
        ("cross_output", lambda: packed(DIM + 1, HEADS * SIZE)),
        ("up_gate", lambda: packed(2, DIM)),
        ("down", lambda: packed(DIM, INNER - 1)),
        ("down", lambda: packed(DIM - 1, INNER)),
        ("logits", lambda: packed(VOCABULARY, DIM + 1)),
    ],
)
def test_layers_that_do_not_fit_are_refused(name, value):
    with pytest.raises(ValueError, match=r"^DecoderLayers: "):
        layers(**{name: value()})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inputs", lambda: torch.tensor([[0, -1]])),
        ("inputs", lambda: torch.tensor([[0, 2**40]])),
        ("inputs", lambda: torch.zeros(1, BEAMS, dtype=torch.int32)),
        ("inputs", lambda: torch.zeros(2, BEAMS, dtype=torch.long)),
        ("keys", lambda: []),
        ("keys", lambda: [torch.zeros(BEAMS, KV_HEADS, CAPACITY, SIZE, device="meta")]),
        ("keys", lambda: [torch.zeros(BEAMS, KV_HEADS, CAPACITY, SIZE).half()]),
        ("keys", lambda: [torch.zeros(BEAMS, KV_HEADS, CAPACITY - 1, SIZE)]),
        ("keys", lambda: [torch._neg_view(torch.zeros(BEAMS, KV_HEADS, CAPACITY, SIZE))]),
        ("keys", lambda: [torch._efficientzerotensor((BEAMS, KV_HEADS, CAPACITY, SIZE))]),
        ("lengths", lambda: torch._efficientzerotensor((1, BEAMS), dtype=torch.long)),
        ("values", lambda: [torch.zeros(BEAMS - 1, KV_HEADS, CAPACITY, SIZE)]),
        ("values", lambda: [torch.zeros(BEAMS, KV_HEADS, CAPACITY, 2 * SIZE)[..., ::2]]),
        ("memory_keys", lambda: [torch.zeros(1, HEADS, SOURCE)]),
        ("memory_keys", lambda: [torch.zeros(1, HEADS + 1, SOURCE, SIZE)]),
        ("memory_values", lambda: [torch.zeros(1, HEADS, SOURCE - 1, SIZE)]),
        ("memory_values", lambda: [torch.zeros(1, HEADS, SOURCE, SIZE, dtype=torch.float64)]),
        ("memory_lengths", lambda: torch.tensor([SOURCE + 1])),
        ("memory_lengths", lambda: torch.tensor([-1])),
        ("memory_lengths", lambda: torch.zeros(0, dtype=torch.long)),
        ("ancestors", lambda: torch.full((1, BEAMS, CAPACITY), 255, dtype=torch.uint8)),
        ("ancestors", lambda: torch.zeros(1, BEAMS, CAPACITY + 1, dtype=torch.uint8)),
        ("ancestors", lambda: torch.zeros(BEAMS, CAPACITY, dtype=torch.uint8)),
        ("lengths", lambda: torch.full((1, BEAMS), CAPACITY)),
        ("lengths", lambda: torch.tensor([[-1, 0]])),
        ("lengths", lambda: torch.full((1, BEAMS), 2**63 - 1)),
        ("lengths", lambda: torch.zeros(1, BEAMS, dtype=torch.int32)),
        ("lengths", lambda: torch.zeros(3, BEAMS, dtype=torch.long)),
    ],
)
def test_steps_that_do_not_fit_are_refused(name, value):
    with pytest.raises(ValueError):
        layers().step(*arguments(**{name: value()}))


def test_a_refused_step_writes_nothing():
    """What is wrong with the last layer is found before the first one's caches are written."""
    cache = torch.zeros(BEAMS, KV_HEADS, CAPACITY, SIZE)
    parts = [*linears().values()]
    two = torch.classes.spear_fast.DecoderLayers(
        [*parts[:-1], *parts], [*constants().values()] * 2, torch.randn(VOCABULARY + 1, DIM), HEADS, KV_HEADS
    )
    given = arguments(keys=[cache, cache[..., :1]], values=[cache, cache])
    given[3:5] = given[3] * 2, given[4] * 2
    with pytest.raises(ValueError, match="keys must be float32"):
        two.step(*given)
    assert not cache.any()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_packed_linear_refuses_what_it_cannot_read(kind):
    linear = packed(3, DIM, bias=True, kind=kind)
    for x in (
        torch.randn(2, DIM + 1),
        torch.randn(DIM),
        torch.randn(2, DIM).double(),
        torch.empty(2, DIM, device="meta"),
        torch._neg_view(torch.randn(2, DIM)),
        torch.randn(2, DIM).to_sparse(),
        torch._efficientzerotensor((2, DIM)),
    ):
        with pytest.raises(ValueError, match=r"^PackedLinear: x must be float32 \[rows, 8\]"):
            linear.forward(x)
    for to in (
        torch.zeros(2, 4),
        torch.zeros(1, 3),
        torch.zeros(2, 6)[:, ::2],
        torch._neg_view(torch.zeros(2, 3)),
        torch.zeros(2, 3, device="meta"),
    ):
        with pytest.raises(ValueError, match=r"^PackedLinear: what the product is added to"):
            linear.added(torch.randn(2, DIM), to)
    with pytest.raises(ValueError, match=r"bias must be float32 \[3\] on the CPU, strided, got float32 \[2\]"):
        torch.classes.spear_fast.PackedLinear(torch.randn(3, DIM), torch.randn(2), kind)


def test_a_product_is_not_added_to_its_own_factor():
    x = torch.randn(3, DIM)
    with pytest.raises(RuntimeError, match="single memory location"):
        packed(DIM, DIM).added(x, x)


@pytest.mark.parametrize("count", [0, -1, 100_000, 2**31, 2**32 + 1])
def test_set_num_threads_bounds_its_count(count):
    with pytest.raises(ValueError, match=r"set_num_threads: count must lie in 1\.\.\d+, got"):
        torch.ops.spear_fast.set_num_threads(count)


# each difference wraps to a length that would pass, in 32 bits
WRAPPING = [0, 2**31 - 1, -(2**31), -1, 5]


@pytest.mark.parametrize("wrapping", ["cu_query", "cu_key"])
@pytest.mark.parametrize("provider", ["cpu", "reference"])
def test_offsets_that_wrap_are_refused(wrapping, provider):
    query = torch.randn(5, 2, 8)
    good, bad = torch.tensor([0, 5, 5, 5, 5], dtype=torch.int32), torch.tensor(WRAPPING, dtype=torch.int32)
    offsets = {"cu_query": good, "cu_key": good, wrapping: bad}
    with ops.forced(f"attention={provider}"), pytest.raises(ValueError, match=f"{wrapping} must rise from 0 to 5"):
        ops.attention(query, query, query, **offsets, max_query=2**40, max_key=2**40)


def test_offsets_that_wrap_are_refused_going_back():
    query, lse = torch.randn(5, 2, 8), torch.zeros(2, 5)
    offsets = torch.tensor(WRAPPING, dtype=torch.int32)
    for function in (torch.ops.spear_fast.attention_backward.default, torch.ops.spear_fast.attention_backward.cpu):
        with pytest.raises(ValueError, match="cu_query must rise from 0 to 5"):
            function(*[query] * 5, lse, None, offsets, offsets, 2**40, 2**40, None, None, None, False, False, 0.0, None)


@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("overload", ["default", "cpu"])
def test_views_with_a_bit_are_refused_where_an_op_writes(overload, which):
    """A second call, or the end of the process, would crash."""
    key, cache = torch.randn(1, 1, 2, 8), torch.zeros(1, 2, 9, 8)
    fitting = [key, key, torch.rand(4), torch.zeros(1, dtype=torch.int64), cache, cache.clone()]
    fitting[which] = torch._neg_view(fitting[which])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"append_kv: .* got a negated or conjugated view; call .resolve_neg"):
            getattr(torch.ops.spear_fast.append_kv, overload)(*fitting)


def test_every_op_that_writes_refuses_views_with_a_bit():
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("spear_fast::")]
    assert sum(schema.is_mutable for schema in schemas) >= 3
    for schema in schemas:
        name = f"{schema.name}.{schema.overload_name}".rstrip(".")
        for bit in ("Negative", "Conjugate"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, bit) == schema.is_mutable, name
