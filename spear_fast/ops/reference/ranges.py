"""Ranges of integer arguments, looked at where that is free."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from spear_fast.ops.selection_params import IntParam

# ranges are always checked on the CPU; elsewhere looking costs a wait for the device
DEBUG = os.environ.get("SPEAR_FAST_DEBUG", "") not in ("", "0")


def check_range(op: str, name: str, tensor: Tensor, limit: int, advice: str, least: int = 0) -> None:
    """Raises unless all of `tensor` lies in least..limit, where looking is free."""
    if tensor.numel() == 0 or (tensor.device.type != "cpu" and not DEBUG):
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(tensor))
    if lowest < least or highest > limit:
        worst = lowest if lowest < least else highest
        raise ValueError(f"{op}: {name} must lie in {least}..{limit}, got {worst}; {advice}")


def check_offsets(op: str, name: str, offsets: Tensor, total: int, longest_name: str, longest: int) -> None:
    """Raises unless `offsets` rises from 0 to `total` in steps of at most `longest`, where looking is free."""
    if offsets.device.type != "cpu" and not DEBUG:
        return
    # in 64 bits: a difference that wraps would pass for a length
    steps = offsets.long().diff()
    if int(offsets[0]) != 0 or int(offsets[-1]) != total or (steps.numel() and int(steps.min()) < 0):
        got = f"{offsets[:8].tolist()}{' ...' if offsets.numel() > 8 else ''}"
        raise ValueError(f"{op}: {name} must rise from 0 to {total}, got {got}; pass cumulative lengths, from 0")
    if steps.numel() and int(steps.max()) > longest:
        raise ValueError(
            f"{op}: {longest_name} must be at least the longest length {int(steps.max())}, got {longest}; "
            f"take it from {name}"
        )


def check_selection(
    op: str, logits: Tensor, live: Tensor, int_params: Tensor, prefix: Tensor, steps: Tensor, tokens: Tensor
) -> None:
    """Raises unless the parameters of the utterances that are `live` and their `steps` so far fit the buffers."""
    _, beams, vocab = logits.shape
    for name, which, least, limit in (
        ("beam_size", IntParam.BEAM_SIZE, 1, beams),
        ("eos_id", IntParam.EOS_ID, -1, vocab - 1),
        ("prefix_length", IntParam.PREFIX_LENGTH, 0, prefix.shape[1]),
    ):
        wanted = int_params[:, which].masked_fill(~live, least)
        check_range(op, name, wanted, limit, "correct the utterance's settings", least)
    check_range(op, "lengths", steps, tokens.shape[1] - 1, "make the histories longer")
