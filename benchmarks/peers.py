"""The reference package's model of a case beside ours; it is loaded as the tests load it, behind four stubs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case


def pair(case: Case, seed: int = 0) -> tuple[nn.Module | None, Any]:
    """Returns the reference's model of a case, None where the package is not installed, and ours, with its weights."""
    from reference import load_reference

    from spear_fast import TextToSemantic

    torch.manual_seed(seed)
    ours = TextToSemantic(**case.model_arguments())
    try:
        reference = load_reference().TextToSemantic(**case.model_arguments()).eval()
    except (RuntimeError, ImportError):
        return None, ours.eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours.eval()
