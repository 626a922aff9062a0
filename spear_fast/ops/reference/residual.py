"""A norm before a matmul that is made up for where the matmul's result is read, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

# the reference's, through torch.nn.functional.normalize
SMALLEST_NORM = 1e-12


def inverse_rms(residual: Tensor) -> Tensor:
    """Returns `sqrt(dim) / max(||row||, 1e-12)` of each row of `[rows, dim]`, `[rows]`, in float32 at least."""
    norm = torch.linalg.vector_norm(residual.to(torch.promote_types(torch.float32, residual.dtype)), dim=-1)
    return residual.shape[-1] ** 0.5 / norm.clamp_min(SMALLEST_NORM)


def normed_after(x: Tensor, leading: int, residual: Tensor | None) -> Tensor:
    """Returns `x` with each row times the inverse RMS of its row of `residual`, rounded once, like x.

    x: what a matmul made of the rows of `residual`; its first `leading` dimensions, flattened, are those rows.
    residual: `[rows, dim]`, or None: x as it is.
    """
    if residual is None:
        return x
    inverse = inverse_rms(residual)
    shape = (*x.shape[:leading], *[1] * (x.dim() - leading))
    return (x.to(inverse.dtype) * inverse.view(shape)).to(x.dtype)
