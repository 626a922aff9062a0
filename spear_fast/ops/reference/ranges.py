"""Ranges of integer arguments, looked at where that is free."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# ranges are always checked on the CPU; elsewhere looking costs a wait for the device
_DEBUG = os.environ.get("SPEAR_FAST_DEBUG", "") not in ("", "0")


def check_range(op: str, name: str, tensor: Tensor, limit: int, advice: str) -> None:
    """Raises unless all of `tensor` lies in 0..limit, where looking is free."""
    if tensor.numel() == 0 or (tensor.device.type != "cpu" and not _DEBUG):
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(tensor))
    if lowest < 0 or highest > limit:
        worst = lowest if lowest < 0 else highest
        raise ValueError(f"{op}: {name} must lie in 0..{limit}, got {worst}; {advice}")
