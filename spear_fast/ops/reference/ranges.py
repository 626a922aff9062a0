"""Ranges of integer arguments, looked at where that is free."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# ranges are always checked on the CPU; elsewhere looking costs a wait for the device
DEBUG = os.environ.get("SPEAR_FAST_DEBUG", "") not in ("", "0")


def check_range(op: str, name: str, tensor: Tensor, limit: int, advice: str) -> None:
    """Raises unless all of `tensor` lies in 0..limit, where looking is free."""
    if tensor.numel() == 0 or (tensor.device.type != "cpu" and not DEBUG):
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(tensor))
    if lowest < 0 or highest > limit:
        worst = lowest if lowest < 0 else highest
        raise ValueError(f"{op}: {name} must lie in 0..{limit}, got {worst}; {advice}")


def check_offsets(op: str, name: str, offsets: Tensor, total: int, longest_name: str, longest: int) -> None:
    """Raises unless `offsets` rises from 0 to `total` in steps of at most `longest`, where looking is free."""
    if offsets.device.type != "cpu" and not DEBUG:
        return
    steps = offsets.diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != total or (steps.numel() and int(steps.min()) < 0):
        got = f"{offsets[:8].tolist()}{' ...' if offsets.numel() > 8 else ''}"
        raise ValueError(f"{op}: {name} must rise from 0 to {total}, got {got}; pass cumulative lengths, 0 in front")
    if steps.numel() and int(steps.max()) > longest:
        raise ValueError(
            f"{op}: {longest_name} must be at least the longest length {int(steps.max())}, got {longest}; "
            f"take it from {name}"
        )
