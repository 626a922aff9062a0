"""rms_norm, geglu and rotary by every provider: values, gradients, and what torch and users see of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_matrix import DTYPES, assert_gradients, assert_right, device_of, moved, runnable
from ops_pointwise_inputs import MAKE
from torch._subclasses.fake_tensor import FakeTensorMode

from spear_fast import ops
from spear_fast.ops import providers
from spear_fast.ops.reference import pointwise as reference

FORWARD = ("rms_norm", "geglu", "rotary")
BACKWARD = ("rms_norm_backward", "geglu_backward")
OPS = (*FORWARD, *BACKWARD)

_NORMS = [
    {},
    {"shape": (1,)},
    {"shape": (13,), "residual": True},
    {"shape": (7, 1)},
    {"shape": (3, 63), "residual": True},
    {"shape": (5, 64)},
    {"shape": (2, 2, 65), "residual": True},
    {"shape": (37, 512)},
    {"shape": (0, 8)},
    {"shape": (3, 5, 24), "strided": True, "residual": True},
    # every row's norm is below the smallest, and the gradients are of the order of 1e12
    {"shape": (3, 8), "scale": 0.0},
]
_GATES = [
    {},
    {"shape": (), "inner": 1},
    {"shape": (13,), "inner": 7, "bias": True, "extra": 1},
    {"shape": (2, 3), "inner": 31, "extra": 1},
    {"shape": (5,), "inner": 32, "bias": True},
    {"shape": (2, 3), "inner": 33, "bias": True, "extra": 15},
    {"shape": (9,), "inner": 341, "bias": True, "extra": 11},
    {"shape": (0,), "bias": True},
    {"shape": (4,), "inner": 0, "bias": True, "extra": 3},
    {"shape": (3, 5), "inner": 24, "strided": True, "bias": True, "extra": 8},
    {"shape": (3, 2), "inner": 33, "bias": True, "extra": 3, "dim": 200},
    {"shape": (5,), "inner": 24, "strided": True, "dim": 1},
    # far out on both sides, where the gate is 0 or 1
    {"shape": (40,), "inner": 16, "scale": 6.0},
]
_TURNS = [
    {},
    {"shape": (1,), "heads": 1, "size": 2, "positions": "shared"},
    {"shape": (7,), "heads": 3, "size": 10, "inverse": True},
    {"shape": (3, 17), "heads": 2, "size": 64, "positions": "own"},
    {"shape": (2, 2, 5), "heads": 1, "size": 34, "positions": "own", "inverse": True},
    {"shape": (2, 3, 4), "heads": 3, "size": 16, "positions": "shared"},
    {"shape": (2, 0)},
    {"shape": (3, 5), "heads": 2, "size": 24, "strided": True, "positions": "own"},
]
_PLAIN_GATES = [shape for shape in _GATES if "dim" not in shape]
SHAPES = {
    "rms_norm": _NORMS,
    "rms_norm_backward": _NORMS,
    "geglu": _GATES,
    "geglu_backward": _PLAIN_GATES,
    "rotary": _TURNS,
}
# arguments that get gradients
WANTING = {"rms_norm": (0, 1, 2), "geglu": (0, 1), "rotary": (0,)}


def label(value):
    return str(value).replace("torch.", "")


def cases(names, *, gradients):
    """Returns (op, provider, dtype, shape) for every shape of every op, but for gradients that float16 cannot hold."""
    return [
        (*triple, shape)
        for triple in runnable(*names)
        for shape in SHAPES[triple[0]]
        if not (gradients and ((triple[2] == torch.float16 and shape.get("scale") == 0.0) or "dim" in shape))
    ]


def follows_autograd(op):
    """Returns the definition with the signature of the public function."""
    if op != "rms_norm":
        return getattr(reference, op)

    def rms_norm(x, gamma, residual):
        normed, total, _ = reference.rms_norm(x, gamma, residual)
        return normed if residual is None else (normed, total)

    return rms_norm


@pytest.mark.parametrize(
    ("op", "provider", "dtype", "shape"), cases(FORWARD, gradients=False) + cases(BACKWARD, gradients=True), ids=label
)
@pytest.mark.usefixtures("nan_filled_empty")
def test_result(op, provider, dtype, shape):
    # sums of gradients over rows are gradients like any other
    factor = 3.0 if op.endswith("_backward") else 2.0
    assert_right(op, provider, getattr(reference, op), MAKE[op](**shape, dtype=dtype), factor=factor)


@pytest.mark.parametrize(("op", "provider", "dtype", "shape"), cases(FORWARD, gradients=True), ids=label)
@pytest.mark.usefixtures("nan_filled_empty")
def test_gradients(op, provider, dtype, shape):
    arguments = MAKE[op](**shape, dtype=dtype)
    wanting = [index for index in WANTING[op] if arguments[index] is not None]
    assert_gradients(op, provider, getattr(ops, op), follows_autograd(op), arguments, wanting=wanting)


@pytest.mark.parametrize(("op", "provider"), sorted({case[:2] for case in runnable(*OPS) if case[1] != "reference"}))
@pytest.mark.usefixtures("nan_filled_empty")
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(op, provider, data):
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    flag = lambda: data.draw(st.booleans())  # noqa: E731
    rows = tuple(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from([dtype for o, p, dtype in runnable(op) if p == provider]))
    options = {"dtype": dtype, "strided": flag()}
    if op.startswith("rms_norm"):
        options |= {"shape": (*rows, draw(1, 80)), "residual": flag()}
    elif op.startswith("geglu"):
        options |= {"shape": rows, "inner": draw(0, 70), "extra": draw(0, 20), "bias": flag()}
        if op == "geglu":
            options |= {"dim": data.draw(st.sampled_from([None, 3, 140]))}
    else:
        options |= {"shape": rows, "heads": draw(1, 4), "size": 2 * draw(1, 40), "inverse": flag()}
        options["positions"] = data.draw(st.sampled_from(["none", "shared", "own"]))
    assert_right(op, provider, getattr(reference, op), MAKE[op](**options), factor=3.0)


def on_device(provider, *arguments):
    return moved(arguments, device_of(provider))


@pytest.mark.parametrize(("op", "provider", "dtype"), runnable("rms_norm", dtypes=(torch.float32,)), ids=label)
def test_norm_by_hand(op, provider, dtype):
    row = providers.get(op, provider)
    x, gamma = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-13, 0.0]]), torch.tensor([1.0, 2.0])
    normed, total, inverse = row.function(*on_device(row, x, gamma, None))
    root = math.sqrt(2)
    torch.testing.assert_close(normed.cpu(), torch.tensor([[0.6, 1.6], [0, 0], [0.1, 0]]) * root)
    torch.testing.assert_close(inverse.cpu(), torch.tensor([root / 5, root * 1e12, root * 1e12]))
    assert total.shape == (0,)
    # below the smallest norm the inverse is a constant, and so is the gradient
    grad = torch.ones(3, 2)
    grad_x, _ = providers.get(f"{op}_backward", provider).function(*on_device(row, grad, None, x, gamma, inverse))
    torch.testing.assert_close(grad_x[1:].cpu(), torch.tensor([[1.0, 2.0]] * 2) * root * 1e12)


@pytest.mark.parametrize(("op", "provider", "dtype"), runnable("rotary", dtypes=(torch.float32,)), ids=label)
def test_rotation_by_hand(op, provider, dtype):
    """At frequency pi / 2, position 1 turns (1, 0) into (0, 1): pairs are neighbours, not halves."""
    row = providers.get(op, provider)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(2, 1, 4)
    arguments = on_device(row, x, torch.tensor([math.pi / 2, math.pi]), None)
    wanted = torch.tensor([[[1.0, 0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0, -1.0]]])
    torch.testing.assert_close(row.function(*arguments, False).cpu(), wanted)
    turned_back = torch.tensor([[[1.0, 0.0, 0.0, 1.0]], [[0.0, -1.0, 0.0, -1.0]]])
    torch.testing.assert_close(row.function(*arguments, True).cpu(), turned_back)


def test_definitions_are_torchs():
    """In float64 the definitions agree with torch's own functions, written another way."""
    x, gamma, residual = MAKE["rms_norm"](dtype=torch.float64, residual=True)
    normed, total, _ = reference.rms_norm(x, gamma, residual)
    torch.testing.assert_close(normed, F.rms_norm(x + residual, (8,), gamma, eps=0.0))
    torch.testing.assert_close(total, x + residual)
    x, bias, width, _ = MAKE["geglu"](dtype=torch.float64, bias=True, extra=3)
    values, gates = (x + bias).chunk(2, -1)
    torch.testing.assert_close(reference.geglu(x, bias, width), F.pad(values * F.gelu(gates), (0, 3)))
    x, freqs, _, _ = MAKE["rotary"](dtype=torch.float64)
    turns = torch.polar(torch.ones(5, 4, dtype=torch.float64), torch.outer(torch.arange(5), freqs.double()))
    wanted = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns[:, None]).flatten(-2)
    torch.testing.assert_close(reference.rotary(x, freqs, None, False), wanted)


@pytest.mark.parametrize("op", ["rms_norm", "geglu"])
def test_backward_definitions_are_autograds(op):
    options = {"residual": True} if op == "rms_norm" else {"bias": True, "extra": 3}
    arguments = [a.requires_grad_() if torch.is_tensor(a) else a for a in MAKE[op](dtype=torch.float64, **options)]
    outputs = follows_autograd(op)(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(output) for output in outputs]
    wanted = torch.autograd.grad(outputs, [a for a in arguments if torch.is_tensor(a)], grads)
    with torch.no_grad():
        if op == "rms_norm":
            _, total, inverse = reference.rms_norm(*arguments)
            grad_x, other = reference.rms_norm_backward(*grads, total, arguments[1], inverse)
            torch.testing.assert_close(wanted[2], grad_x)
        else:
            grad_x, other = reference.geglu_backward(*grads, *arguments[:2])
    torch.testing.assert_close((grad_x, other), wanted[:2])


def test_only_the_sum_used():
    x, gamma, residual = (each.requires_grad_() for each in MAKE["rms_norm"](residual=True))
    _, total = ops.rms_norm(x, gamma, residual)
    total.sum().backward()
    assert x.grad.equal(torch.ones_like(x))
    assert residual.grad.equal(torch.ones_like(x))
    assert gamma.grad is None


@pytest.mark.parametrize("op", FORWARD)
def test_gradients_of_one_argument_alone(op):
    """The rest of a model may be frozen."""
    arguments = list(MAKE[op]())
    arguments[0].requires_grad_()
    getattr(ops, op)(*arguments).sum().backward()
    assert arguments[0].grad.abs().sum() > 0


OPTIONS = {
    "rms_norm": [{}, {"residual": True, "strided": True, "dtype": torch.bfloat16}],
    "rms_norm_backward": [{}, {"residual": True, "strided": True, "dtype": torch.bfloat16}],
    "geglu": [{}, {"bias": True, "extra": 3, "strided": True, "dtype": torch.bfloat16}],
    "geglu_backward": [{}, {"bias": True, "extra": 3, "strided": True, "dtype": torch.bfloat16}],
    "rotary": [{}, {"positions": "own", "strided": True, "dtype": torch.bfloat16}],
}


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    packet = getattr(torch.ops.spear_fast, op)
    for options in OPTIONS[op]:
        arguments = MAKE[op](**options)
        for overload in packet.overloads():
            if overload == "default" or providers.get(op, overload).missing() is None:
                torch.library.opcheck(getattr(packet, overload), arguments)
        if op in FORWARD:
            wanting = [a.detach().clone().requires_grad_() if i in WANTING[op] and a is not None else a
                       for i, a in enumerate(arguments)]  # fmt: skip
            torch.library.opcheck(packet.default, tuple(wanting))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", FORWARD)
def test_compiles_whole(op, dynamic):
    """One graph, no break, the same numbers and gradients."""

    def doubled(first, *others):
        result = getattr(ops, op)(first * 2, *others)
        return sum(each.sum() for each in result) if isinstance(result, tuple) else result * 2

    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    shapes = {
        "rms_norm": ({"residual": True}, {"residual": True, "shape": (4, 3, 8)}),
        "geglu": ({"bias": True}, {"bias": True, "inner": 10}),
        "rotary": ({}, {"shape": (2, 9)}),
    }
    for shape in shapes[op]:
        results = []
        for function in (compiled, doubled):
            torch.manual_seed(1)
            arguments = list(MAKE[op](**shape))
            arguments[0].requires_grad_()
            result = function(*arguments)
            result.sum().backward()
            results.append((result, arguments[0].grad))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_give_shape_and_dtype(op):
    for options in OPTIONS[op]:
        arguments = MAKE[op](**options)
        function = getattr(torch.ops.spear_fast, op)
        real = function(*arguments)
        with FakeTensorMode() as mode:
            fake = function(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments))
        for one, other in zip(*((r,) if torch.is_tensor(r) else r for r in (fake, real)), strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


WRONG = {
    "rms_norm": [
        (0, lambda t: t[0, 0, 0], "x must be [..., dim] with dim at least 1, got []"),
        (0, lambda t: t[..., :0], "x must be [..., dim] with dim at least 1, got [2, 3, 0]"),
        (0, lambda t: t.long(), "x must be floating point, got torch.int64"),
        (1, lambda t: t[1:], "gamma must be [dim] = [8], got [7]"),
        (1, lambda t: t.double(), "gamma must be torch.float32 like x, got torch.float64"),
        (1, lambda t: t.to("meta"), "gamma must be on x's device cpu, got meta"),
        (2, lambda t: t[:1], "residual must be [..., dim] = [2, 3, 8], got [1, 3, 8]"),
        (2, lambda t: t.half(), "residual must be torch.float32 like x, got torch.float16"),
    ],
    "geglu": [
        (0, lambda t: t[..., 1:], "x must be [..., 2 * inner], got [2, 3, 15]"),
        (0, lambda t: t.int(), "x must be floating point, got torch.int32"),
        (1, lambda t: t[1:], "bias must be [2 * inner] = [16], got [15]"),
        (1, lambda t: t.double(), "bias must be torch.float32 like x, got torch.float64"),
        (2, lambda width: 7, "width must be at least the 8 that x holds, got 7"),
        (3, lambda _: torch.zeros(5, 4), "residual must be [rows, dim] with 6 rows, got [5, 4]"),
        (3, lambda _: torch.zeros(6, 4).half(), "residual must be torch.float32 like x, got torch.float16"),
    ],
    "rotary": [
        (0, lambda t: t[0, 0], "x must be [..., length, heads, head_dim], got [3, 8]"),
        (0, lambda t: t[..., 1:], "head_dim must be even, got 7"),
        (0, lambda t: t.long(), "x must be floating point, got torch.int64"),
        (1, lambda t: t[1:], "freqs must be [head_dim / 2] = [4], got [3]"),
        (1, lambda t: t.half(), "freqs must be torch.float32, got torch.float16"),
        (2, lambda t: t[:, 1:], "positions must be [length] = [5], got [2, 4]"),
        (2, lambda t: t.int(), "positions must be torch.int64, got torch.int32"),
    ],
}
FULL = {"rms_norm": {"residual": True}, "geglu": {"bias": True}, "rotary": {"positions": "own"}}


@pytest.mark.parametrize(
    ("op", "index", "spoil", "said"),
    [(op, *case) for op, rows in WRONG.items() for case in rows],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_argument(op, index, spoil, said):
    """One sentence: what, wanted, got, what to do."""
    arguments = list(MAKE[op](**FULL[op]))
    arguments[index] = spoil(arguments[index])
    with pytest.raises(ValueError) as caught:
        getattr(ops, op)(*arguments)
    text = str(caught.value)
    assert text.startswith(f"{op}: {said}")
    assert "\n" not in text
    assert "; " in text


def test_wrong_gradients_are_refused():
    """The backward ops are reachable by anyone, so they check as well."""
    grad, grad_sum, x, gamma, inverse = MAKE["rms_norm_backward"](residual=True)
    backward = torch.ops.spear_fast.rms_norm_backward
    with pytest.raises(ValueError, match=r"grad_normed must be \[\.\.\., dim\]"):
        backward(grad[:1], grad_sum, x, gamma, inverse)
    with pytest.raises(ValueError, match=r"inverse must be \[rows\] = \[6\]"):
        backward(grad, grad_sum, x, gamma, inverse[1:])
    with pytest.raises(ValueError, match=r"inverse must be torch.float32 on cpu, got torch.float64 on cpu"):
        backward(grad, grad_sum, x, gamma, inverse.double())
    grad, x, bias = MAKE["geglu_backward"](bias=True)
    with pytest.raises(ValueError, match=r"grad must be \[\.\.\., width\]"):
        torch.ops.spear_fast.geglu_backward(grad[..., 1:], x, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_returned(dtype):
    """A norm alone without a residual, with one also the sum; no width given means no zeros."""
    x, gamma, residual = MAKE["rms_norm"](residual=True, dtype=dtype)
    assert ops.rms_norm(x, gamma).dtype == dtype
    normed, total = ops.rms_norm(x, gamma, residual)
    assert total.equal(x + residual)
    torch.testing.assert_close(normed, ops.rms_norm(total, gamma))
    assert ops.geglu(x).shape == (2, 3, 4)


def test_turned_back():
    x, freqs, positions, _ = MAKE["rotary"](dtype=torch.float64, positions="own")
    turned = ops.rotary(x, freqs, positions)
    torch.testing.assert_close(ops.rotary(turned, freqs, positions, inverse=True), x)
    torch.testing.assert_close(turned.norm(), x.norm())
    assert not turned.allclose(x)
