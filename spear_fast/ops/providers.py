"""Who computes an op: a table of providers, and the choice among them, made once for each kind of input.

SPEAR_FAST_PROVIDER=op=provider,op=provider forces providers (`*` stands for every op that has the provider); one that
cannot run then raises and says why, where an automatic choice passes on to the next.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch


class ProviderQuery(NamedTuple):
    """What a choice depends on: the device and dtype of an op's first argument, and its last size (head_dim).

    options: what else the op's definition says that it depends on, such as which optional tensors are there.
    """

    device: torch.device
    dtype: torch.dtype
    size: int
    options: tuple = ()


@dataclass(frozen=True)
class Provider:
    """One implementation of one op.

    function: takes the op's arguments, already checked, and returns what the op returns.
    devices: types of device it runs on; empty for any.
    missing: why it cannot run on this machine at all, or None.
    why_not: why it cannot run on such a query, or None.
    fastest: whether an automatic choice asks it first for such a query, whatever the order.
    """

    op: str
    name: str
    function: Callable
    devices: tuple[str, ...] = ()
    missing: Callable[[], str | None] = lambda: None
    why_not: Callable[[ProviderQuery], str | None] = lambda query: None
    fastest: Callable[[ProviderQuery], bool] = lambda query: False

    def refusal(self, query: ProviderQuery) -> str | None:
        """Returns why this provider cannot take such a query here, or None."""
        if self.devices and query.device.type not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {query.device.type}"
        return self.missing() or self.why_not(query)


class ProviderRow(NamedTuple):
    """A line of the table that `spear-fast info` prints."""

    op: str
    provider: str
    devices: str
    missing: str | None


# modules of layers above which define ops: a setting may name one before anybody has imported its module
ABOVE = ("spear_fast.decoding.step",)
# op → its providers, the preferred first; new ones are added with register()
_providers: dict[str, list[Provider]] = {}
_chosen: dict[str, dict[tuple, Callable]] = {}
_forced: dict[str, str] | None = None


def add_op(op: str) -> dict[tuple, Callable]:
    """Makes room for an op's providers; returns the memory of its choices, the same object for the process' life."""
    _providers[op] = []
    _chosen[op] = {}
    return _chosen[op]


def register(provider: Provider, *, before: str | None = None) -> None:
    """Adds a provider to its op, before the one of that name, else last."""
    rows = _providers[provider.op]
    names = [row.name for row in rows]
    if provider.name in names:
        raise ValueError(f"{provider.op} already has a provider {provider.name!r}")
    rows.insert(names.index(before) if before else len(rows), provider)
    # an op may choose by what others have chosen
    for memory in _chosen.values():
        memory.clear()


def _parse(setting: str) -> dict[str, str]:
    """Returns op → provider for a setting such as "append_kv=cpu,*=reference"; later entries win over earlier ones."""
    try:
        return _wanted(setting)
    except ValueError:
        for module in ABOVE:
            importlib.import_module(module)
        return _wanted(setting)


def _wanted(setting: str) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in setting.split(","))):
        op, equals, name = (part.strip() for part in entry.partition("="))
        if not equals or (op != "*" and op not in _providers):
            ops = ", ".join(_providers)
            raise ValueError(
                f"SPEAR_FAST_PROVIDER wants op=provider with op one of {ops} or *, got {entry!r}; correct it"
            )
        having = [each for each in (_providers if op == "*" else [op]) if name in names(each)]
        if not having:
            known = sorted({provider for each in _providers for provider in names(each)}) if op == "*" else names(op)
            raise ValueError(
                f"SPEAR_FAST_PROVIDER: {op} has no provider {name!r}; choose from {', '.join(known)}, or leave it out"
            )
        wanted.update(dict.fromkeys(having, name))
        # who computes the values computes the gradients, where it can
        backward = [f"{each}_backward" for each in having if f"{each}_backward" in _providers]
        wanted.update(dict.fromkeys((each for each in backward if name in names(each)), name))
    return wanted


def ops() -> list[str]:
    """Returns the names of all ops, in the order of their definition."""
    return list(_providers)


def names(op: str) -> list[str]:
    """Returns the names of an op's providers, the preferred first."""
    return [provider.name for provider in _providers[op]]


def get(op: str, name: str) -> Provider:
    """Returns one provider of an op, to be compared with others in tests and benchmarks."""
    for provider in _providers[op]:
        if provider.name == name:
            return provider
    raise ValueError(f"{op} has no provider {name!r}; choose from {', '.join(names(op))}")


def asked_for(op: str) -> str | None:
    """Returns the provider of an op that is asked for by name, or None."""
    global _forced
    if _forced is None:
        _forced = _parse(os.environ.get("SPEAR_FAST_PROVIDER", ""))
    return _forced.get(op)


def choose(op: str, query: ProviderQuery) -> Callable:
    """Returns the function that computes `op` for such a query: the forced one, or the first that can."""
    asked = asked_for(op)
    by_speed = sorted(_providers[op], key=lambda provider: not provider.fastest(query))
    candidates = by_speed if asked is None else [get(op, asked)]
    refusals = []
    for provider in candidates:
        reason = provider.refusal(query)
        if reason is None:
            _chosen[op][query] = provider.function
            return provider.function
        refusals.append(f"{provider.name}: {reason}")
    which = "no provider can" if asked is None else "the provider asked for cannot"
    advice = "" if asked is None else "; leave it out of SPEAR_FAST_PROVIDER, or out of ops.forced()"
    reasons = "; ".join(refusals)
    raise RuntimeError(f"{op} on {query.device.type} in {query.dtype}: {which} compute it ({reasons}){advice}")


def chosen(op: str) -> dict[tuple, Callable]:
    """Returns the memory of an op's choices, the same object for the life of the process."""
    return _chosen[op]


@contextlib.contextmanager
def forced(setting: str) -> Iterator[None]:
    """Within it, the providers named by a setting like SPEAR_FAST_PROVIDER's are used instead of the automatic ones."""
    global _forced
    wanted, before = _parse(setting), _forced
    _forced = wanted
    for memory in _chosen.values():
        memory.clear()
    try:
        yield
    finally:
        _forced = before
        for memory in _chosen.values():
            memory.clear()


def available() -> list[ProviderRow]:
    """Returns a row for each op and provider, with the reason where it cannot run on this machine."""
    return [
        ProviderRow(op, provider.name, ", ".join(provider.devices) or "any", provider.missing())
        for op, rows in _providers.items()
        for provider in rows
    ]
