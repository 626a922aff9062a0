"""Whoever adds an op adds all of it: definition, schema, fake, checks, documentation, a place in every table."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import torch
from ops_examples import EXAMPLES
from ops_inputs import given
from ops_matrix import tensors_of
from torch import Tensor
from torch._library.simple_registry import singleton
from torch._subclasses.fake_tensor import FakeTensorMode

from spear_fast import cli, ops
from spear_fast.ops import debug_ranges, extension, providers

# its first argument is an object of Python, for which the dispatcher has no type
UNDISPATCHED = ["decode_step"]
OPS = [op for op in providers.ops() if op not in UNDISPATCHED]
# what an op is not called by its users with: autograd calls it
PUBLIC = [op for op in OPS if not op.endswith("_backward")]
# arguments of integers that address memory; rotary's positions are angles alone, and a seed may be any number
ADDRESSES = {"ancestors", "cu_key", "cu_query", "ids", "labels", "lengths", "positions", "prefix", "tokens"}
ANGLES = {("rotary", "positions")}
# an op's last arguments that C++ on the CPU has no use for, or does not see
FOR_GPUS = {"decode_cross_attention": ["Optional[Tensor] arrivals", "int split", "Optional[Tensor] scales"]}


def schema_of(op):
    return getattr(torch.ops.spear_fast, op).default._schema


def tensors(op):
    """Returns the names of an op's tensors."""
    return [argument.name for argument in schema_of(op).arguments if "Tensor" in str(argument.type)]


@pytest.mark.parametrize("op", OPS)
def test_definition(op):
    """Plain torch, on any device, with the schema's arguments, by the schema's names."""
    reference = providers.get(op, "reference")
    assert providers.names(op)[-1] == "reference", "the definition is the last resort"
    assert reference.devices == ()
    assert reference.missing() is None
    assert reference.function.__module__.startswith("spear_fast.ops.reference.")
    named = list(inspect.signature(reference.function).parameters)
    assert named == [argument.name for argument in schema_of(op).arguments]


@pytest.mark.parametrize("op", OPS)
def test_schema(op):
    schema = schema_of(op)
    assert "Tensor" in str(schema.arguments[0].type)
    # by position, so that every provider is called alike
    assert not any(argument.kwarg_only or argument.has_default_value() for argument in schema.arguments)
    returns = [each.name for each in schema.returns]
    assert len(returns) < 2 or all(returns), "several results have names"


@pytest.mark.parametrize("op", [op for op in OPS if "cpu" in providers.names(op)])
def test_cpu_provider(op):
    """C++ for every op: an overload of its own, with the same schema, or without what the work is divided by."""
    provider = providers.get(op, "cpu")
    assert provider.missing() == extension.missing()
    overload = getattr(torch.ops.spear_fast, op).cpu
    taken, wanted = (str(own).partition("(")[2].partition(") ->")[0] for own in (overload._schema, schema_of(op)))
    left_out = [f"{each.type} {each.name}" for each in schema_of(op).arguments][len(overload._schema.arguments) :]
    assert wanted == taken or wanted.startswith(f"{taken}, ")
    assert left_out == FOR_GPUS.get(op, [])
    assert provider.function is overload or op in FOR_GPUS
    assert str(overload._schema).partition("->")[2] == str(schema_of(op)).partition("->")[2]
    if not provider.missing():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"spear_fast::{op}.cpu", "CPU")


@pytest.mark.parametrize("op", OPS)
def test_fake(op):
    """Shapes, dtypes and strides without numbers are those with numbers."""
    for overload in getattr(torch.ops.spear_fast, op).overloads():
        name = f"spear_fast::{op}" if overload == "default" else f"spear_fast::{op}.{overload}"
        assert singleton.find(name).fake_impl.kernel is not None, name
    arguments = EXAMPLES[op]()
    call = getattr(torch.ops.spear_fast, op).default
    with FakeTensorMode() as mode:
        fake = call(*(mode.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments))
    real = call(*arguments)
    for ours, theirs in zip(tensors_of(fake), tensors_of(real), strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    packet = getattr(torch.ops.spear_fast, op)
    for overload in packet.overloads():
        if overload == "default" or providers.get(op, overload).refusal(inputs_of(op)) is None:
            torch.library.opcheck(getattr(packet, overload), given(getattr(packet, overload), EXAMPLES[op]()))


def inputs_of(op):
    first = EXAMPLES[op]()[0]
    return providers.ProviderQuery(first.device, first.dtype, first.shape[-1])


@pytest.mark.parametrize("op", PUBLIC)
def test_documentation(op):
    """The public function has the op's name, a line on every tensor with its shape and dtype, and a word on errors."""
    assert op in ops.__all__
    function = getattr(ops, op)
    text = inspect.getdoc(function) or ""
    first, _, rest = text.partition("\n")
    assert re.match(r"(Returns|Writes) ", first), "what it returns comes first"
    assert first.endswith(".") or rest, first
    for name in tensors(op):
        assert re.search(rf"\b{name}\b[\w, ]*: .*`\[", text), f"{op}: {name}: `[shape]`, dtype"
    assert "\nRaises ValueError " in text, "what is refused"


@pytest.mark.parametrize("op", OPS)
def test_a_backward_op_belongs_to_an_op(op):
    if op.endswith("_backward"):
        assert op.removesuffix("_backward") in PUBLIC
        return
    if f"{op}_backward" in OPS:
        first, *others = EXAMPLES[op]()
        result = getattr(torch.ops.spear_fast, op).default(first.requires_grad_(), *others)
        assert any(each.requires_grad for each in tensors_of(result)), "register its gradients"


@pytest.mark.parametrize("op", OPS)
def test_integers_have_ranges(op):
    addresses = {name for name in tensors(op) if name in ADDRESSES and (op, name) not in ANGLES}
    assert bool(addresses) == (op in debug_ranges.RANGES), f"{op} takes {addresses or 'no addresses'}"


def test_every_op_has_examples():
    assert set(EXAMPLES) == set(OPS)


def test_every_op_is_in_the_table_that_info_prints(capsys):
    assert cli.main(["info", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["ops"]
    assert {(row["op"], row["provider"]) for row in rows} == {
        (op, name) for op in [*OPS, *UNDISPATCHED] for name in providers.names(op)
    }
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for op in OPS:
        assert re.search(rf"^{op} .*\breference\b", text, re.MULTILINE)
