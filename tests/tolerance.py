"""The one rule by which floating-point results are judged, after FlashAttention's tests.

Truth is the computation in float64; the same-dtype baseline is the computation by plain torch in the tested dtype. A
result may be off by twice what torch is off (gradients: three times), and a floor of a few roundings for where torch
happens to be exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

VALUES = 2.0
GRADIENTS = 3.0
# roundings of the largest value that are always allowed; in float64 the truth and the baseline are rounded as well
FLOOR = 4.0
FLOOR_FLOAT64 = 64.0


def to_float64(tree):
    """Returns the same nest of tuples, lists and dicts with every floating tensor in float64, detached."""
    if isinstance(tree, Tensor):
        return tree.detach().double() if tree.is_floating_point() else tree.detach()
    if isinstance(tree, dict):
        return {key: to_float64(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(to_float64(value) for value in tree)
    return tree


def allowed_error(truth: Tensor, baseline: Tensor, *, factor: float = VALUES) -> float:
    """Returns how far from `truth` a result in the baseline's dtype may be."""
    if truth.numel() == 0:
        return 0.0
    roundings = FLOOR_FLOAT64 if baseline.dtype == torch.float64 else FLOOR
    floor = roundings * torch.finfo(baseline.dtype).eps * max(1.0, truth.abs().max().item())
    return factor * (baseline.double() - truth.double()).abs().max().item() + floor


def assert_within(
    result: Tensor, truth: Tensor, baseline: Tensor, *, factor: float = VALUES, what: str = "result"
) -> None:
    """Raises AssertionError unless `result` is about as near to `truth` as `baseline` is.

    result: any shape, the tested dtype.
    truth: the same shape, float64.
    baseline: the same-dtype baseline: the same shape and dtype as `result`, by plain torch.
    factor: VALUES or GRADIENTS.
    """
    assert result.shape == truth.shape, f"{what} has shape {list(result.shape)}, wanted {list(truth.shape)}"
    assert result.dtype == baseline.dtype, f"{what} is {result.dtype}, wanted {baseline.dtype}"
    if not result.dtype.is_floating_point:
        assert torch.equal(result.long(), truth.long()), f"{what} is integer and differs"
        return
    assert result.isfinite().equal(truth.isfinite()), (
        f"{what} has NaN or infinity where the truth has none, or none where it has"
    )
    error = (result.double() - truth.double()).nan_to_num(0.0, 0.0, 0.0).abs()
    worst = error.max().item() if error.numel() else 0.0
    bound = allowed_error(truth, baseline, factor=factor)
    assert worst <= bound, f"{what} is off by {worst:.3g}, allowed {bound:.3g}"
