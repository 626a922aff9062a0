"""cross_entropy by every provider: losses, log-probabilities, gradients, and what torch and users see of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_matrix import assert_gradients, assert_right, device_of, moved, runnable
from ops_pointwise_inputs import MAKE, cross_entropy
from torch._subclasses.fake_tensor import FakeTensorMode

from spear_fast import ops
from spear_fast.ops import providers
from spear_fast.ops.reference import cross_entropy as reference

OPS = ("cross_entropy", "cross_entropy_backward")
SHAPES = [
    {},
    {"rows": 1, "vocab": 1, "size": 1, "ignored": "none"},
    {"rows": 13, "vocab": 31, "size": 7},
    {"rows": 31, "vocab": 64, "size": 64},
    {"rows": 33, "vocab": 65, "size": 33, "ignored": "none"},
    {"rows": 17, "vocab": 257, "size": 24, "ignore_index": 3},
    {"rows": 6, "ignored": "all"},
    {"rows": 0},
    {"rows": 9, "vocab": 19, "size": 16, "strided": True},
]


def label(value):
    return str(value).replace("torch.", "")


def definition(hidden, weight, labels, ignore_index):
    return reference.cross_entropy(hidden, weight, labels, ignore_index)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize(("op", "provider", "dtype"), runnable(*OPS), ids=label)
@pytest.mark.usefixtures("nan_filled_empty")
def test_result(op, provider, dtype, shape):
    factor = 3.0 if op.endswith("_backward") else 2.0
    assert_right(op, provider, getattr(reference, op), MAKE[op](**shape, dtype=dtype), factor=factor)


@pytest.mark.parametrize("shape", SHAPES, ids=label)
@pytest.mark.parametrize(("op", "provider", "dtype"), runnable("cross_entropy"), ids=label)
@pytest.mark.usefixtures("nan_filled_empty")
def test_gradients(op, provider, dtype, shape):
    assert_gradients(op, provider, ops.cross_entropy, definition, cross_entropy(**shape, dtype=dtype), wanting=(0, 1))


@pytest.mark.parametrize(("op", "provider"), sorted({case[:2] for case in runnable(*OPS) if case[1] != "reference"}))
@pytest.mark.usefixtures("nan_filled_empty")
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_shape(op, provider, data):
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dtype = data.draw(st.sampled_from([dtype for o, p, dtype in runnable(op) if p == provider]))
    sizes = {"rows": draw(0, 40), "vocab": draw(1, 140), "size": draw(1, 40)}
    options = {"strided": data.draw(st.booleans()), "ignored": data.draw(st.sampled_from(["none", "some", "all"]))}
    assert_right(op, provider, getattr(reference, op), MAKE[op](**sizes, **options, dtype=dtype), factor=3.0)


@pytest.mark.parametrize(("op", "provider", "dtype"), runnable("cross_entropy", dtypes=(torch.float32,)), ids=label)
def test_is_torchs_cross_entropy(op, provider, dtype):
    """Losses and the gradients of their mean are those of torch on the logits."""
    device = device_of(providers.get(op, provider))
    hidden, weight, labels, ignored = moved(cross_entropy(rows=11, vocab=23), device)
    found, wanted = [], []
    for results, own in ((found, True), (wanted, False)):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        with ops.forced(f"{op}={provider}"):
            if own:
                losses = ops.cross_entropy(*inputs, labels, ignored)
            else:
                losses = F.cross_entropy(inputs[0] @ inputs[1].mT, labels, ignore_index=ignored, reduction="none")
            (losses.sum() / (labels != ignored).sum()).backward()
        results += [losses, *(tensor.grad for tensor in inputs)]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("op", "provider", "dtype"), runnable("cross_entropy", dtypes=(torch.float32,)), ids=label)
def test_large_logits(op, provider, dtype):
    """Logits of a thousand neither overflow nor lose the small differences between them."""
    device = device_of(providers.get(op, provider))
    hidden, weight = torch.tensor([[1000.0], [-1000.0]]), torch.tensor([[1.0], [1.0], [-1.0]])
    with ops.forced(f"{op}={provider}"):
        losses = ops.cross_entropy(*moved((hidden, weight, torch.tensor([0, 1])), device))
    torch.testing.assert_close(losses.cpu(), torch.tensor([math.log(2), 2000.0]))


def test_label_log_probs():
    hidden, weight, labels, ignored = cross_entropy(rows=12, vocab=9)
    found = ops.label_log_probs(hidden.view(3, 4, -1), weight, labels.view(3, 4), ignored)
    picked = (hidden @ weight.mT).log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(found, picked.where(labels != ignored, torch.zeros(())).view(3, 4))


def test_definition_in_chunks(monkeypatch):
    """The definition gives the same however many rows it takes at once."""
    arguments = MAKE["cross_entropy_backward"](rows=11, dtype=torch.float64)
    whole = reference.cross_entropy(*arguments[1:4], -100), reference.cross_entropy_backward(*arguments)
    monkeypatch.setattr(reference, "CHUNK", 2 * 7)
    parts = reference.cross_entropy(*arguments[1:4], -100), reference.cross_entropy_backward(*arguments)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    packet = getattr(torch.ops.spear_fast, op)
    for options in ({}, {"strided": True, "dtype": torch.bfloat16}):
        arguments = MAKE[op](**options)
        for overload in packet.overloads():
            if overload == "default" or providers.get(op, overload).missing() is None:
                torch.library.opcheck(getattr(packet, overload), arguments)
        if op == "cross_entropy":
            wanting = [tensor.detach().clone().requires_grad_() for tensor in arguments[:2]]
            torch.library.opcheck(packet.default, (*wanting, *arguments[2:]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def loss(hidden, weight, labels, ignored):
        return ops.cross_entropy(hidden * 2, weight, labels, ignored).sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 9):
        hidden, *others = cross_entropy(rows=rows)
        results = []
        for function in (compiled, loss):
            leaf = hidden.clone().requires_grad_()
            result = function(leaf, *others)
            result.backward()
            results.append((result, leaf.grad))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_give_shape_and_dtype(op):
    arguments = MAKE[op](dtype=torch.bfloat16, strided=True)
    function = getattr(torch.ops.spear_fast, op)
    real = function(*arguments)
    with FakeTensorMode() as mode:
        fake = function(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments))
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


WRONG = [
    (0, lambda t: t[0], "labels must be [hidden's sizes but the last] = [], got [5]"),
    (0, lambda t: t.long(), "hidden must be floating point, got torch.int64"),
    (1, lambda t: t[:, 1:], "weight must be [vocabulary, dim] with dim 8, got [7, 7]"),
    (1, lambda t: t[:0], "weight must be [vocabulary, dim] with dim 8, got [0, 8]"),
    (1, lambda t: t.bfloat16(), "weight must be torch.float32 like hidden, got torch.bfloat16"),
    (2, lambda t: t[1:], "labels must be [hidden's sizes but the last] = [5], got [4]"),
    (2, lambda t: t.int(), "labels must be torch.int64, got torch.int32"),
]
OUTSIDE = [
    (2, lambda t: t + 7, "labels must lie in 0..6, got "),
    (2, lambda t: t - 7, "labels must lie in 0..6, got "),
]


@pytest.mark.parametrize(
    ("provider", "index", "spoil", "said"),
    [("reference", *case) for case in WRONG]
    # looking at labels is free on the CPU alone
    + [
        (p, *case)
        for _, p, _ in runnable("cross_entropy", dtypes=(torch.float32,))
        if p != "triton"
        for case in OUTSIDE
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_argument(provider, index, spoil, said):
    """One sentence: what, wanted, got, what to do."""
    arguments = list(cross_entropy(ignored="none"))
    arguments[index] = spoil(arguments[index])
    with ops.forced(f"cross_entropy={provider}"), pytest.raises(ValueError) as caught:
        ops.cross_entropy(*arguments)
    text = str(caught.value)
    assert text.startswith("cross_entropy: " + said)
    assert "\n" not in text
    assert "; " in text


def test_wrong_arguments_of_the_op_itself():
    grad, hidden, weight, labels, lse, ignored = MAKE["cross_entropy_backward"]()
    with pytest.raises(ValueError, match=r"hidden must be \[n, dim\], got \[1, 5, 8\]"):
        torch.ops.spear_fast.cross_entropy(hidden[None], weight, labels, ignored)
    with pytest.raises(ValueError, match=r"labels must be \[n\] = \[5\], got \[4\]"):
        torch.ops.spear_fast.cross_entropy(hidden, weight, labels[1:], ignored)
    with pytest.raises(ValueError, match=r"grad_losses must be torch.float32 on cpu, got torch.float64 on cpu"):
        torch.ops.spear_fast.cross_entropy_backward(grad.double(), hidden, weight, labels, lse, ignored)
    with pytest.raises(ValueError, match=r"lse must be \[n\] = \[5\], got \[4\]"):
        torch.ops.spear_fast.cross_entropy_backward(grad, hidden, weight, labels, lse[1:], ignored)
