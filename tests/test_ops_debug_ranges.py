"""In debug mode integers outside of their range are refused, whoever computes the op; otherwise nobody looks twice."""

from __future__ import annotations

import contextlib

import pytest
import torch
from ops_examples import EXAMPLES
from ops_matrix import tensors_of
from torch import Tensor

from spear_fast.ops import debug_ranges, providers
from spear_fast.ops.reference import ranges as reference
from spear_fast.ops.selection_params import IntParam


def first_above(limit):
    """Returns a change that puts `limit + 1` into the first place."""

    def change(tensor):
        tensor.flatten()[0] = limit + 1
        return tensor

    return change


def replace(values):
    return lambda tensor: torch.tensor(values, dtype=tensor.dtype)


def column(which, value):
    return lambda settings: settings.index_fill(1, torch.tensor(int(which)), value)


# op, options, position of the argument, what makes it wrong, what is said
WRONG = [
    ("append_kv", {"tokens": 3}, 3, replace([4, 5, 0]), "positions must lie in 0..4, got 5; "),
    ("append_kv", {}, 3, replace([-1, 5, 0]), "positions must lie in 0..6, got -1; "),
    ("decode_self_attention", {}, 5, replace([[1, 2, 3], [4, 12, 6]]), "lengths must lie in 0..11, got 12; "),
    ("decode_self_attention", {}, 5, replace([[1, 2, 3], [4, -1, 6]]), "lengths must lie in 0..11, got -1; "),
    (
        "decode_self_attention",
        {"lengths": torch.full((2, 3), 11)},
        4,
        lambda table: table.index_put((torch.tensor(1), torch.tensor(2), torch.tensor(10)), torch.tensor(3).byte()),
        "ancestors must lie in 0..2, got 3; ",
    ),
    ("decode_cross_attention", {}, 5, replace([12, 3]), "lengths must lie in 0..11, got 12; "),
    ("attention", {}, 4, replace([0, 3, 2, 8]), "cu_query must rise from 0 to 8, got [0, 3, 2, 8]; "),
    ("attention", {}, 5, replace([0, 3, 3, 7]), "cu_key must rise from 0 to 8, got [0, 3, 3, 7]; "),
    ("attention", {}, 6, lambda longest: longest - 1, "max_query must be at least the longest length 5, got 4; "),
    ("attention_backward", {}, 7, replace([1, 3, 3, 8]), "cu_query must rise from 0 to 8, got [1, 3, 3, 8]; "),
    ("attention_backward", {}, 10, lambda longest: 1, "max_key must be at least the longest length 5, got 1; "),
    ("cross_entropy", {"ignored": "none"}, 2, first_above(6), "labels must lie in 0..6, got 7; "),
    ("cross_entropy", {}, 2, first_above(-2), "labels must lie in 0..6, got -1; "),
    ("cross_entropy_backward", {"ignored": "none"}, 3, first_above(6), "labels must lie in 0..6, got 7; "),
    ("beam_step", {"plain": True}, 3, column(IntParam.BEAM_SIZE, 4), "beam_size must lie in 1..3, got 4; "),
    ("beam_step", {"plain": True}, 3, column(IntParam.EOS_ID, 11), "eos_id must lie in -1..10, got 11; "),
    ("beam_step", {}, 7, lambda lengths: torch.full_like(lengths, 9), "lengths must lie in 0..8, got 9; "),
    ("sample_step", {"plain": True}, 4, column(IntParam.PREFIX_LENGTH, 1), "prefix_length must lie in 0..0, got 1; "),
    ("sample_step", {}, 9, lambda lengths: torch.full_like(lengths, -1), "lengths must lie in 0..8, got -1; "),
]


@contextlib.contextmanager
def careless(op):
    """Within it, `op` is computed by a provider that looks at no number, as on a GPU."""
    calls = []

    def function(*arguments):
        calls.append(arguments)
        results = [torch.zeros_like(arguments[0]) for _ in getattr(torch.ops.spear_fast, op).default._schema.returns]
        return None if not results else results[0] if len(results) == 1 else tuple(results)

    providers.register(providers.Provider(op, "careless", function))
    try:
        with providers.forced(f"{op}=careless"):
            yield calls
    finally:
        providers._providers[op].pop()
        providers.chosen(op).clear()


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize(
    ("op", "options", "index", "spoil", "said"), WRONG, ids=lambda v: v if isinstance(v, str) else ""
)
def test_outside_of_the_range(op, options, index, spoil, said, debug, monkeypatch):
    monkeypatch.setattr(reference, "DEBUG", debug)
    arguments = list(EXAMPLES[op](**options))
    arguments[index] = spoil(arguments[index])
    call = getattr(torch.ops.spear_fast, op).default
    with careless(op) as calls:
        if not debug:
            call(*arguments)
            assert len(calls) == 1
            return
        with pytest.raises(ValueError) as caught:
            call(*arguments)
        assert not calls
    text = str(caught.value)
    assert text.startswith(f"{op}: {said}")
    assert "\n" not in text


@pytest.mark.parametrize("op", sorted(debug_ranges.RANGES))
def test_right_arguments_pass_in_debug_mode(op, monkeypatch):
    monkeypatch.setattr(reference, "DEBUG", True)
    seen = []
    monkeypatch.setitem(
        debug_ranges.RANGES, op, lambda *given, check=debug_ranges.RANGES[op]: seen.append(check(*given))
    )
    arguments = EXAMPLES[op]()
    with providers.forced(f"{op}=reference"):
        results = getattr(torch.ops.spear_fast, op).default(*arguments)
    assert seen == [None]
    assert all(isinstance(result, Tensor) for result in tensors_of(results))


def test_every_op_with_ranges_is_tried():
    assert {case[0] for case in WRONG} == set(debug_ranges.RANGES)


def test_nothing_is_read_where_there_are_no_numbers(monkeypatch):
    monkeypatch.setattr(reference, "DEBUG", True)
    arguments = [each.to("meta") if isinstance(each, Tensor) else each for each in EXAMPLES["append_kv"]()]
    debug_ranges.check("append_kv", *arguments)
