"""The optimizer that the reference takes, its learning rate, and its state from a file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def make_optimizer(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Returns Adam, or AdamW with weight decay on matrices alone, each step of it one pass over the weights.

    In the groups of audiolm-pytorch's `get_optimizer`, so that optimizer states of the reference fit.
    """
    if not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr}.")
    if weight_decay == 0:
        return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99), fused=True)
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2]},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)


def skip_unless_finite(optimizer: Any, norm: Tensor) -> None:
    """Makes the next step change nothing where the gradients' norm is no finite number.

    The host does not wait for it: the fused step looks for itself. A gradient scaler does that already.
    optimizer: of `make_optimizer`, prepared by accelerate. norm: `[]`, of the gradients that the step takes, alike in
        all processes.
    """
    if optimizer.scaler is None:
        optimizer.optimizer.found_inf = (~norm.isfinite()).float()


def warmup_then_cosine(step: int, *, num_warmup_steps: int, num_train_steps: int, initial: float) -> float:
    """Returns the learning rate of a step, counted from 0, as a fraction of the highest.

    From `initial` up to 1 in `num_warmup_steps`, then along half a cosine to 0 at `num_train_steps`.
    """
    if step < num_warmup_steps:
        return initial + (1 - initial) * step / num_warmup_steps
    left = max(num_train_steps - num_warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(step - num_warmup_steps, left) / left))


def load_optimizer(optimizer: Any, state: dict[str, Any], origin: str | Path) -> None:
    """Loads an optimizer's state; raises ValueError when it is of other parameters."""
    ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    theirs = [number for group in state["param_groups"] for number in group["params"]]
    shapes = {number: moments["exp_avg"].shape for number, moments in state["state"].items() if "exp_avg" in moments}
    fits = len(ours) == len(theirs) and all(
        shapes.get(number, parameter.shape) == parameter.shape for number, parameter in zip(theirs, ours, strict=True)
    )
    groups = [len(group["params"]) for group in optimizer.param_groups]
    if not fits or groups != [len(group["params"]) for group in state["param_groups"]]:
        raise ValueError(
            f"{origin} has the optimizer state of {len(theirs)} parameters in {len(state['param_groups'])} groups, not "
            f"of the {len(ours)} in {len(groups)} trained here; freeze the same layers and set the same wd, or pass "
            "restore_optimizer=False."
        )
    # how a step is computed is ours to say, whoever wrote the file
    for theirs_group, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for name in ("fused", "foreach"):
            theirs_group[name] = group[name]
    optimizer.load_state_dict(state)
