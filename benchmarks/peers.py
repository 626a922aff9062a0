"""The reference package's model of a case beside ours; it is loaded as the tests load it, with four stubs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.machine import CPU

# what makes each part of a layer count, and tokens depend on the source and on those before; with larger matrices,
# softmaxes in a row make so much of a rounding that equally good computations part
MATRICES, EMBEDDINGS = 2.0, 0.12


def pair(case: Case, seed: int = 0, *, device: torch.device = CPU, wanted: bool = True) -> tuple[nn.Module | None, Any]:
    """Returns the reference's model of a case, None where the package is not installed or not `wanted`, and ours.

    Both are in evaluation mode, made on the device and have the same weights.
    """
    from spear_fast import TextToSemantic

    torch.manual_seed(seed)
    with device:
        ours = lively_(TextToSemantic(**case.model_arguments())).eval()
    try:
        theirs = reference(case, device) if wanted else None
    except (RuntimeError, ImportError):
        theirs = None
    if theirs is not None:
        theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs, ours


@torch.no_grad()
def lively_(model: nn.Module) -> nn.Module:
    """Returns the model with its matrices larger and its embeddings smaller.

    As it is made, a model repeats its first token for ever, whatever its source says and its attention computes; then
    its tokens would say little about what gave them.
    """
    for name, parameter in model.named_parameters():
        if name.startswith("token_emb"):
            parameter.mul_(EMBEDDINGS)
        elif parameter.ndim > 1 and not name.endswith("null_kv"):
            parameter.mul_(MATRICES)
    return model


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
