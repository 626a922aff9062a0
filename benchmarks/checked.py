"""The gate before every time: what is to be timed must first give the right numbers, by the tests' own rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tolerance import GRADIENTS, VALUES, allowed_error, assert_within, to_float64
from torch import Tensor

from benchmarks.operations.case import OpCase, cloned, with_gradients
from spear_fast.ops import providers


@dataclass(frozen=True)
class Gate:
    """What a case's results must be: in float64, and as plain torch rounds them in the case's dtype."""

    case: OpCase
    truths: Sequence[Tensor]
    plain: Sequence[Tensor]

    @classmethod
    def of(cls, case: OpCase, arguments: Sequence[Any]) -> Gate:
        """Returns the gate of a case for these inputs: the reference provider computes it."""
        return cls(
            case, computed(case, "reference", to_float64(list(arguments))), computed(case, "reference", arguments)
        )

    def error(self, results: Sequence[Tensor]) -> dict[str, float | None]:
        """Returns the largest error of the results, and how large it may be where it is largest.

        Raises AssertionError, as the tests do, where a result is wrong. Baselines may give the first results alone.
        """
        worst: dict[str, float | None] = {"max_error": None, "allowed_error": None}
        for i, result in enumerate(results):
            truth, baseline = self.truths[i], self.plain[i]
            values = self.case.outputs if self.case.gradients else len(self.truths)
            factor = VALUES if i < (values or 1) else GRADIENTS
            # only what the definition's dtype differs in: a baseline may return losses in the tested dtype
            assert_within(result.to(baseline.dtype), truth, baseline, factor=factor, what=f"result {i}")
            if not truth.is_floating_point() or not truth.numel():
                continue
            difference = (result.double() - truth).nan_to_num(0.0, 0.0, 0.0).abs().max().item()
            if worst["max_error"] is None or difference > worst["max_error"]:
                allowed = allowed_error(truth, baseline, factor=factor)
                worst = {"max_error": difference, "allowed_error": allowed}
        return worst


def call_of(case: OpCase, provider: str, arguments: Sequence[Any]) -> Any:
    """Returns what computes a case by one provider, over these inputs; with gradients within `providers.forced`."""
    if case.gradients:
        op = getattr(torch.ops.spear_fast, case.op).default
        return with_gradients(op, case.gradients, arguments, case.outputs)
    function = providers.get(case.op, provider).function
    return lambda: function(*arguments)


def computed(case: OpCase, provider: str, arguments: Sequence[Any]) -> list[Tensor]:
    """Returns the results of a case by one provider; the arguments stay as they are."""
    copies = cloned(arguments)
    with providers.forced(f"{case.op}={provider}"):
        result = call_of(case, provider, copies)()
    return list(result) if case.gradients else case.results(result, copies)
