"""The selection ops as torch sees them, their columns, and what a wrong argument is answered with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from ops_matrix import runnable
from ops_selection_inputs import random_state
from torch._subclasses.fake_tensor import FakeTensorMode

from spear_fast import ops
from spear_fast.ops.checks import remembering
from spear_fast.ops.selection_params import COLDEST, EarlyStopping, FloatParam, IntParam, SelectionMethod

OPS = ("beam_step", "sample_step")
PUBLIC = {op: getattr(ops, op) for op in OPS}
PROVIDERS = sorted({(op, provider) for op, provider, _ in runnable(*OPS, dtypes=(torch.float32,))})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("guided", [False, True])
def test_opcheck(op, guided):
    arguments = random_state(op, guided=guided, dtype=torch.bfloat16 if guided else torch.float32, strided=guided)
    torch.library.opcheck(getattr(torch.ops.spear_fast, op).default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_compiles_whole(op, dynamic):
    """One graph, no break; what is written in place is seen outside."""

    def stepped(logits, *others):
        PUBLIC[op](logits * 2, *others)
        return others[-1].sum()

    torch.compiler.reset()
    compiled = torch.compile(stepped, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for vocab in (11, 13):
        arguments = random_state(op, vocab=vocab)
        copies = [each if each is None else each.clone() for each in arguments]
        assert int(compiled(*arguments)) == int(stepped(*copies))
        for argument, copy in zip(arguments, copies, strict=True):
            torch.testing.assert_close(argument, copy)


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_are_left_alone(op):
    arguments = random_state(op)
    with FakeTensorMode() as mode:
        PUBLIC[op](*[each if each is None else mode.from_tensor(each) for each in arguments])


NAMES = {
    "beam_step": "logits null_logits float_params int_params prefix inputs scores lengths ancestors tokens "
    "parents logprobs pool_scores pool_beams pool_ends pool_finished pool_last_logprobs ended done".split(),
    "sample_step": "logits null_logits filtered float_params int_params prefix seeds inputs scores lengths "
    "ancestors tokens parents logprobs finished done".split(),
}


def setting(which, value):
    def spoiled(settings):
        settings[:, which] = value
        return settings

    return spoiled


WRONG = [
    ("logits", lambda t: t[0], "logits must be [utterances, beams, vocabulary], got [3, 11]"),
    ("logits", lambda t: t.long(), "logits must be floating point, got torch.int64"),
    ("logits", lambda t: t[..., :0], "vocabulary must be at least 1"),
    ("null_logits", lambda t: t[..., :5], "null_logits must be [4, 3, 11] like logits, got [4, 3, 5]"),
    ("null_logits", lambda t: t.half(), "null_logits must be torch.float32 on cpu like logits, got torch.float16"),
    ("float_params", lambda t: t[:, :3], "float_params must be [4 utterances, 6], got [4, 3]"),
    ("float_params", lambda t: t.double(), "float_params must be torch.float32, got torch.float64"),
    ("int_params", lambda t: t.long(), "int_params must be torch.int32, got torch.int64"),
    ("int_params", setting(IntParam.BEAM_SIZE, 4), "beam_size must lie in 1..3, got 4"),
    ("int_params", setting(IntParam.BEAM_SIZE, 0), "beam_size must lie in 1..3, got 0"),
    ("int_params", setting(IntParam.EOS_ID, 11), "eos_id must lie in -1..10, got 11"),
    ("int_params", setting(IntParam.PREFIX_LENGTH, 9), "prefix_length must lie in 0.."),
    ("prefix", lambda t: t[1:], "prefix must be [4 utterances, longest prefix], got [3,"),
    ("inputs", lambda t: t.int(), "inputs must be torch.int64, got torch.int32"),
    ("scores", lambda t: t[:, 1:], "scores must be [utterances, beams] = [4, 3], got [4, 2]"),
    ("lengths", lambda t: t[:3], "lengths must be [4 or 8, 3], got [3, 3]"),
    ("lengths", lambda t: t + 9, "lengths must lie in 0..8, got"),
    ("lengths", lambda t: t - 9, "lengths must lie in 0..8, got -"),
    ("ancestors", lambda t: t[..., 1:], "ancestors must be [utterances or twice that, beams, capacity] = [8, 3, 9]"),
    ("ancestors", lambda t: t.mT.contiguous().mT, "ancestors must be contiguous, got strides [27, 1, 3]"),
    ("tokens", lambda t: t.to("meta"), "tokens must be on logits' device cpu, got meta"),
    ("tokens", lambda t: t[:3], "tokens must be [utterances, capacity, beams] = [4, 9, 3], got [3, 9, 3]"),
    ("logprobs", lambda t: t.bfloat16(), "logprobs must be torch.float32, got torch.bfloat16"),
    ("done", lambda t: t[:, None], "done must be [utterances] = [4], got [4, 1]"),
]


@pytest.mark.parametrize(("op", "provider"), PROVIDERS)
@pytest.mark.parametrize(("name", "spoil", "said"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_argument(op, provider, name, spoil, said):
    """One sentence, the same from every provider: what, wanted, got, what to do."""
    arguments = random_state(op, guided=True)
    arguments[-1].fill_(False)
    if op == "sample_step":
        arguments[-2].fill_(False)
    # what passed just before does not let the wrong one pass
    PUBLIC[op](*[each if each is None else each.clone() for each in arguments])
    index = NAMES[op].index(name)
    arguments[index] = spoil(arguments[index].clone())
    if "must lie in" in said and provider not in ("reference", "cpu"):
        pytest.skip("ranges are looked at on the CPU alone")
    with ops.forced(f"{op}={provider}"), pytest.raises(ValueError) as caught:
        PUBLIC[op](*arguments)
    text = str(caught.value)
    assert text.startswith(f"{op}: ")
    assert said in text
    assert "\n" not in text
    assert "; " in text


def test_what_passed_is_not_looked_at_again():
    looked_at = []
    check = remembering(lambda *tensors: looked_at.append(tensors[0]))
    first = torch.zeros(4, 4)
    check(first, None)
    check(torch.ones(4, 4), None)
    assert len(looked_at) == 1
    for other in (first[:2], first.double(), first.to("meta"), first.mT, first[None]):
        check(other, None)
        assert looked_at[-1] is other
    check(first, first)
    assert looked_at[-1] is first


def test_what_was_refused_is_refused_again():
    arguments = random_state("beam_step")
    arguments[-1] = arguments[-1][:2]
    for _ in range(2):
        with pytest.raises(ValueError, match="done must be"):
            ops.beam_step(*arguments)


HEADER = Path(__file__).parent.parent / "csrc" / "select" / "params.h"


@pytest.mark.parametrize("columns", [FloatParam, IntParam, SelectionMethod, EarlyStopping])
def test_the_columns_are_those_of_the_header(columns):
    """One name and one place for each, in Python and in C++."""
    enumerations = re.findall(r"enum (\w+) {([^}]*)}", HEADER.read_text())
    listed = {name: re.findall(r"k(\w+)", body) for name, body in enumerations}
    wanted = [member.name.title().replace("_", "") for member in columns]
    found = listed[columns.__name__]
    assert found[: len(wanted)] == wanted
    assert found[len(wanted) :] == ([f"{columns.__name__}s"] if columns in (FloatParam, IntParam) else [])
    assert [int(member) for member in columns] == list(range(len(wanted)))
    (coldest,) = re.findall(r"kColdest = ([\d.e-]+);", HEADER.read_text())
    assert float(coldest) == COLDEST
