"""How an op comes to be: its schema, what must hold for its arguments, its shape without numbers, and who is asked.

The dispatcher knows each op as `spear_fast::op`, which picks a provider when called, and as one overload for each
provider that is registered from C++, such as `spear_fast::op.cpu`. Real calls, fake tensors and torch.compile share one
check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from spear_fast.ops import debug_ranges
from spear_fast.ops.checks import refuse_layouts, refuse_views
from spear_fast.ops.providers import ProviderQuery, add_op, choose

LIBRARY = torch.library.Library("spear_fast", "DEF")

# op → how it is called where gradients are wanted, and what computes them; see `differentiate`
_runs: dict[str, Callable[..., Any]] = {}
_functions: dict[str, type[torch.autograd.Function]] = {}

# subclasses stand for something else than their numbers: the dispatcher knows what
_PLAIN = (Tensor, nn.Parameter)


def autocasts(device: str) -> bool:
    """Returns whether autocast is on for a type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _refusing_views(op: str) -> Callable[..., NoReturn]:
    """Returns what the dispatcher calls where an argument of an op that writes into its arguments has such a bit.

    torch's own way, to compute with copies and to copy back, wants every written argument returned, and else crashes.
    """

    def refusal(*arguments: Any) -> NoReturn:
        refuse_views(op)

    return refusal


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which autocast is off for a type of device, whether or not that knows autocast."""
    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()


def define(
    op: str,
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    options: Callable[..., tuple] | None = None,
    native: tuple[str, ...] = (),
    native_schema: str | None = None,
) -> Callable[..., Any]:
    """Defines `spear_fast::op`; returns the function that calls it with all of the schema's arguments, by position.

    schema: the dispatcher's, without the name; the first argument is a tensor.
    check: raises ValueError unless the arguments fit each other; it looks at no numbers: those are for debug_ranges.py.
    fake: takes the same arguments, checked by it too, and returns empty tensors like the result.
    options: returns what a provider's `why_not` may want to know of the arguments, hashable.
    native: providers whose functions are registered from C++, each as an overload of the op. native_schema: theirs,
        where they take the op's first arguments alone; `fake` is then called with those too.
    """
    memory = add_op(op)

    def run(first: Tensor, *others: Any) -> Any:
        try:
            check(first, *others)
            debug_ranges.check(op, first, *others)
            # a plain tuple equals the ProviderQuery it was remembered under, and is quicker to make
            depends = () if options is None else options(first, *others)
            query = first.device, first.dtype, first.shape[-1] if first.ndim else 1, depends
            function = memory.get(query) or choose(op, ProviderQuery(*query))
            if not autocasts(first.device.type):
                return function(first, *others)
            # the op's arguments say what it computes in, whatever its provider is made of
            with torch.autocast(first.device.type, enabled=False):
                return function(first, *others)
        except (RuntimeError, TypeError):
            # asked only now: every call would pay for it
            refuse_layouts(op, dict(zip(names, (first, *others), strict=False)))
            raise

    for name in (op, *(f"{op}.{provider}" for provider in native)):
        LIBRARY.define(name + (schema if name == op else native_schema or schema))
        torch.library.register_fake(f"spear_fast::{name}", fake, lib=LIBRARY)
        if "!" in schema:
            for bit in ("Negative", "Conjugate"):
                LIBRARY.impl(name, _refusing_views(op), bit)
    LIBRARY.impl(op, run, "CompositeExplicitAutograd")
    _runs[op] = run
    dispatched = getattr(torch.ops.spear_fast, op).default
    names = [argument.name for argument in dispatched._schema.arguments]

    def call(first: Tensor, *others: Any) -> Any:
        if torch.compiler.is_compiling() or type(first) not in _PLAIN:
            return dispatched(first, *others)
        if torch.is_grad_enabled() and any(
            isinstance(each, Tensor) and each.requires_grad for each in (first, *others)
        ):
            return _functions[op].apply(first, *others) if op in _functions else dispatched(first, *others)
        # past the dispatcher: some microseconds less
        return run(first, *others)

    return call


def differentiate(op: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """Gives an op its gradients, as `torch.library.register_autograd` takes them: `backward(ctx, *gradients)` and
    `save(ctx, inputs, output)`.

    Eager calls go past the dispatcher here too, which takes a hundred microseconds for what a function does in some.
    """
    torch.library.register_autograd(f"spear_fast::{op}", backward, setup_context=save, lib=LIBRARY)
    run = _runs[op]

    def forward(ctx: Any, *arguments: Any) -> Any:
        result = run(*arguments)
        save(ctx, arguments, result)
        return result

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[op] = type(op, (torch.autograd.Function,), members)
