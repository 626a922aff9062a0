"""Ops of many arguments are called by position, whoever computes them, and read by name: from a named tuple."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def takes(arguments: type[tuple]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator: a function whose last parameter is such a tuple then takes its fields, by position.

    arguments: a class that `NamedTuple` made.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        *before, _ = signature.parameters.values()
        count = len(before)

        @functools.wraps(function)
        def by_position(*given: Any) -> Any:
            return function(*given[:count], arguments(*given[count:]))

        parameters = *before, *inspect.signature(arguments).parameters.values()
        by_position.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return by_position

    return decorate
