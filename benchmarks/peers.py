"""What we are compared with. The reference is loaded as the tests load it: the real package behind four stubs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case


def pair(case: Case, seed: int = 0) -> tuple[nn.Module, Any]:
    """Returns the reference's model of a case and ours, with the same random weights.

    Raises RuntimeError when the reference package is not installed; it says how to install it.
    """
    from reference import load_reference

    from spear_fast import TextToSemantic

    torch.manual_seed(seed)
    reference = load_reference().TextToSemantic(**case.model_arguments()).eval()
    ours = TextToSemantic(**case.model_arguments())
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours.eval()
