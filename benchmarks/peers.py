"""The reference package's model of a case beside ours; it is loaded as the tests load it, behind four stubs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.machine import CPU


def pair(case: Case, seed: int = 0, *, device: torch.device = CPU, wanted: bool = True) -> tuple[nn.Module | None, Any]:
    """Returns the reference's model of a case, None where the package is not installed or not `wanted`, and ours.

    Both are in evaluation mode, made on the device and have the same weights.
    """
    from spear_fast import TextToSemantic

    torch.manual_seed(seed)
    with device:
        ours = TextToSemantic(**case.model_arguments()).eval()
    try:
        theirs = reference(case, device) if wanted else None
    except (RuntimeError, ImportError):
        theirs = None
    if theirs is not None:
        ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def reference(case: Case, device: torch.device, *, flash: bool = False) -> nn.Module:
    """Returns the reference's model of a case, in evaluation mode.

    flash: with its switch for torch's attention on. It then allows the backends that are not for this kind of GPU;
    here it is repaired: torch may take any. Raises RuntimeError or ImportError where the package is not installed.
    """
    from reference import load_reference

    package = load_reference()
    with device:
        model = package.TextToSemantic(**case.model_arguments(), attn_flash=flash).eval()
    for module in model.modules() if flash else ():
        if hasattr(module, "cuda_config"):
            module.cuda_config = module.cpu_config
    return model
