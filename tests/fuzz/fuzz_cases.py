"""Calls with arguments that fit, and with some of them made hostile: a case is all that its seed says."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from ops_examples import EXAMPLES
from ops_inputs import given
from torch import Tensor

from spear_fast import ops

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHER_DTYPES = (*DTYPES, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16)
INTEGERS = (-1, -2, 0, 1, 255, 256, 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 2.0, 1e-30, 3e4, 1e38, float("nan"), float("inf"), float("-inf"))
# numbers of a tensor that is changed, not only passed on: a huge one is a view of a single number
MOST = 1 << 20
WRAPPING = (0, 2**31 - 1, -(2**31), -1)


@dataclass
class Case:
    """A call: what it is of, its function, its arguments by position, and what was done to them."""

    name: str
    function: Callable[..., Any]
    arguments: list[Any]
    changes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.name}({', '.join(map(_described, self.arguments))}) changed: {', '.join(self.changes) or 'nothing'}"
        )


def _described(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{str(argument.dtype).removeprefix('torch.')}{list(argument.shape)}"
    if isinstance(argument, list):
        return f"[{', '.join(map(_described, argument))}]"
    return "PackedLinear" if isinstance(argument, torch.ScriptObject) else str(argument)


def case_of(seed: int) -> Case:
    """Returns the case of a seed."""
    chosen = random.Random(seed)
    torch.manual_seed(seed)
    kind = chosen.random()
    if kind < 0.03:
        case = Case("set_num_threads", torch.ops.spear_fast.set_num_threads, [1])
        # many threads that may be had are no fault, only slow
        case.arguments = [chosen.choice([number for number in INTEGERS if not 1 < number <= 1024])]
        return case
    case = _of_packed(chosen) if kind < 0.15 else _of_layers(chosen) if kind < 0.35 else _of_op(chosen)
    for _ in range(chosen.choice([0, 1, 1, 1, 2, 3])):
        case.changes.append(_change(case.arguments, chosen))
    return case


def _options(op: str, chosen: random.Random) -> dict[str, Any]:
    some: dict[str, Any] = {}
    if op.startswith("attention"):
        packed = chosen.random() < 0.5
        some = {
            "lengths": [chosen.randint(0, 70) for _ in range(chosen.randint(1, 3))] if packed else None,
            "size": 2 * chosen.randint(1, 20),
            "null": chosen.random() < 0.5,
            "rotary": chosen.random() < 0.5,
            "causal": chosen.random() < 0.3,
            "modulo": chosen.random() < 0.3,
            "dropout": chosen.choice([0.0, 0.0, 0.5]),
            "mask": None if packed else chosen.choice([None, "random", "none"]),
        }
    if op in ("append_kv", "decode_self_attention"):
        some = {"tokens": chosen.randint(1, 3), "size": 2 * chosen.randint(1, 20)}
    if op == "decode_cross_attention":
        some = {"source": chosen.randint(0, 70), "size": chosen.randint(1, 40)}
    if op.startswith(("rms_norm", "geglu")):
        some = {"shape": (chosen.randint(1, 4), chosen.randint(1, 70))}
    if op.startswith("cross_entropy"):
        some = {"rows": chosen.randint(0, 6), "vocab": chosen.randint(1, 70), "size": chosen.randint(1, 40)}
    if op in ("beam_step", "sample_step"):
        some = {"vocab": chosen.randint(1, 70), "beams": chosen.randint(1, 5), "guided": chosen.random() < 0.3}
    return {**some, "dtype": chosen.choice(DTYPES)}


def _of_op(chosen: random.Random) -> Case:
    op = chosen.choice(sorted(EXAMPLES))
    arguments = list(EXAMPLES[op](**_options(op, chosen)))
    public = getattr(ops, op, None)
    # the others' public functions take arguments by name, or are called for gradients alone
    entries = (
        ["default", "cpu"]
        if public is None or op in ("attention", "decode_cross_attention")
        else ["default", "cpu", "python"]
    )
    entry = chosen.choice(entries)
    function = public if entry == "python" else getattr(getattr(torch.ops.spear_fast, op), entry)
    if entry != "python":
        arguments = list(given(function, arguments))
    return Case(f"{op}.{entry}", function, arguments)


def _packed(outputs: int, features: int, kind: str = "float32", bias: bool = False) -> Any:
    one = torch.classes.spear_fast.PackedLinear
    return one(torch.randn(outputs, features), torch.randn(outputs) if bias else None, kind)


def _of_packed(chosen: random.Random) -> Case:
    outputs, features, rows = (chosen.randint(1, 70) for _ in range(3))
    kind = chosen.choice(["float32", "int8"])
    if chosen.random() < 0.3:
        arguments = [torch.randn(outputs, features), torch.randn(outputs), chosen.choice([kind, kind, "int4"])]
        x = torch.randn(rows, features)
        return Case("PackedLinear", lambda *given: torch.classes.spear_fast.PackedLinear(*given).forward(x), arguments)
    linear = _packed(outputs, features, kind, bias=chosen.random() < 0.5)
    if chosen.random() < 0.5:
        return Case("PackedLinear.forward", linear.forward, [torch.randn(rows, features)])
    return Case("PackedLinear.added", linear.added, [torch.randn(rows, features), torch.randn(rows, outputs)])


def _of_layers(chosen: random.Random) -> Case:
    """A constructor or a step; each tensor is an argument of its own, so that each can be made hostile."""
    count, beams, utterances, inner = (chosen.randint(1, 3) for _ in range(4))
    kv_heads, size, dim = chosen.randint(1, 2), 2 * chosen.randint(1, 9), chosen.randint(1, 40)
    heads, capacity, source = kv_heads * chosen.randint(1, 2), chosen.randint(1, 9), chosen.randint(0, 9)
    width, vocabulary = heads * size, chosen.randint(1, 20)
    weights = [
        ((heads + 2 * kv_heads) * size, dim),
        (dim, width),
        (width, dim),
        (dim, width),
        (2 * inner, dim),
        (dim, inner),
    ]
    shapes = [(heads, size), (heads, size), (dim,), (2 * inner,), (size // 2,)]
    linears = [*(_packed(*shape) for shape in weights * count), _packed(vocabulary, dim)]
    halves = utterances * chosen.choice([1, 2])
    rows = halves * beams
    buffers = [
        *(torch.zeros(rows, kv_heads, capacity, size) for _ in range(2 * count)),
        *(torch.zeros(utterances, heads, source, size) for _ in range(2 * count)),
    ]
    numbers = [
        torch.randint(vocabulary + 1, (utterances, beams)),
        torch.randint(source + 1, (utterances,)),
        torch.randint(beams, (halves, beams, capacity), dtype=torch.uint8),
        torch.randint(capacity, (halves, beams)),
    ]
    constants = [torch.randn(shape) for shape in shapes * count]
    embedding = torch.randn(vocabulary + 1, dim)

    def make(*given: Any) -> Any:
        *own, table, some_heads, some_kv_heads = given
        return torch.classes.spear_fast.DecoderLayers(linears, own, table, some_heads, some_kv_heads)

    def step(layers: Any, inputs: Tensor, lengths: Tensor, ancestors: Tensor, done: Tensor, *parts: Tensor) -> Any:
        four = [list(parts[i * count : (i + 1) * count]) for i in range(4)]
        return layers.step(inputs, *four, lengths, ancestors, done)

    if chosen.random() < 0.4:
        return Case(
            "DecoderLayers",
            lambda *given: step(make(*given), *numbers, *buffers),
            [*constants, embedding, heads, kv_heads],
        )
    layers = make(*constants, embedding, heads, kv_heads)
    return Case("DecoderLayers.step", lambda *given: step(layers, *given), [*numbers, *buffers])


def _change(arguments: list[Any], chosen: random.Random) -> str:
    """Makes one argument hostile; returns what was done."""
    index = chosen.randrange(len(arguments))
    given = arguments[index]
    tensors = [each for each in arguments if isinstance(each, Tensor) and each.numel() < MOST]
    if isinstance(given, bool):
        what, arguments[index] = "bool", not given
    elif isinstance(given, int):
        what, arguments[index] = "int", chosen.choice([*INTEGERS, given - 1, given + 1])
    elif isinstance(given, float):
        what, arguments[index] = "float", chosen.choice(FLOATS)
    elif given is None and tensors:
        what, arguments[index] = "something", chosen.choice(tensors).clone()
    elif isinstance(given, Tensor) and given.numel() < MOST and tensors:
        what = chosen.choice(["alias", *TENSORS])
        try:
            arguments[index] = chosen.choice(tensors) if what == "alias" else TENSORS[what](given, chosen)
        except (RuntimeError, IndexError, ValueError, TypeError, OverflowError):
            # not every tensor can be made so
            what = f"no {what}"
    else:
        what = "nothing"
    return f"{what} at {index}"


def _reshaped(x: Tensor, chosen: random.Random) -> Tensor:
    sizes = list(x.shape)
    where = chosen.randrange(len(sizes))
    sizes[where] = max(0, sizes[where] + chosen.choice([-2, -1, 1, 2, 7]))
    more = chosen.random()
    sizes = [*sizes, 1] if more < 0.2 else sizes[:-1] if more < 0.4 else sizes
    return torch.ones(sizes, dtype=x.dtype)


def _with_values(x: Tensor, chosen: random.Random) -> Tensor:
    flat = x.clone().flatten()
    for _ in range(chosen.choice([1, 1, 3])):
        i = chosen.randrange(flat.numel())
        if flat.dtype == torch.bool:
            flat[i] = not flat[i]
        elif flat.is_floating_point():
            flat[i] = chosen.choice(FLOATS)
        else:
            bounds = torch.iinfo(flat.dtype)
            flat[i] = min(max(chosen.choice(INTEGERS), bounds.min), bounds.max)
    return flat.view(x.shape)


def _huge(x: Tensor, chosen: random.Random) -> Tensor:
    sizes = [max(1, size) for size in x.shape]
    sizes[chosen.randrange(len(sizes))] = chosen.choice([2**31, 2**33, 2**40])
    return torch.zeros([1] * len(sizes), dtype=x.dtype).expand(sizes)


def _transposed(x: Tensor, chosen: random.Random) -> Tensor:
    return x.transpose(*(chosen.randrange(x.dim()) for _ in range(2)))


def _expanded(x: Tensor, chosen: random.Random) -> Tensor:
    return x.narrow(chosen.randrange(x.dim()), 0, 1).expand(x.shape)


def _wrapping(x: Tensor, chosen: random.Random) -> Tensor:
    return torch.tensor([*WRAPPING, int(x.flatten()[-1])]).to(x.dtype)


TENSORS: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "dtype": lambda x, chosen: x.to(chosen.choice(OTHER_DTYPES)),
    "shape": _reshaped,
    "values": _with_values,
    "other values": _with_values,
    "none": lambda x, chosen: None,
    "empty": lambda x, chosen: torch.empty([0] * x.dim(), dtype=x.dtype),
    "every second": lambda x, chosen: torch.stack([x, x], -1)[..., 0],
    "repeated": lambda x, chosen: x.repeat_interleave(2, 0)[::2],
    "expanded": _expanded,
    "transposed": _transposed,
    "negative bit": lambda x, chosen: torch._neg_view(x),
    "zero tensor": lambda x, chosen: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "conjugate": lambda x, chosen: x.to(torch.complex64).conj(),
    "gradient": lambda x, chosen: x.clone().requires_grad_(),
    "meta": lambda x, chosen: x.to("meta"),
    "huge": _huge,
    "scalar": lambda x, chosen: torch.ones((), dtype=x.dtype),
    "sparse": lambda x, chosen: x.to_sparse(),
    "mkldnn": lambda x, chosen: x.to_mkldnn(),
    "nested": lambda x, chosen: torch.nested.nested_tensor([x]),
    "wrapping": _wrapping,
}
