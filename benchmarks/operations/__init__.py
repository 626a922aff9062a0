"""The cases of the ops: what is measured of each, at SPEAR-TTS's real sizes, and tiny ones for tests."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.operations import attention, decode, pointwise, selection
from benchmarks.operations.case import OpCase


def all_cases() -> list[OpCase]:
    """Returns every case of every op, those of one op together."""
    return [case for family in (decode, selection, attention, pointwise) for case in family.cases()]


def chosen_cases(
    kind: str, ops: Sequence[str] | None = None, containing: Sequence[str] | None = None, *, extra: bool = True
) -> list[OpCase]:
    """Returns the cases of a set, what is measured only when there is time last.

    ops: names of ops; all where left out. containing: words of which each must stand in a case's title.
    """
    found = [
        case
        for case in all_cases()
        if kind in case.sets and (not ops or case.op in ops) and all(word in case.title for word in containing or ())
    ]
    return sorted((case for case in found if extra or not case.extra), key=lambda case: case.extra)
