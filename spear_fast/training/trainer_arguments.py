"""The checks of a trainer's arguments: what would be ignored, or fail in a later step, is refused at once."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

_AT_LEAST_ONE = (
    "num_train_steps", "batch_size", "grad_accum_every", "log_every", "save_results_every", "save_model_every",
    "num_valid_batches", "input_sample_hz",
)  # fmt: skip
_AT_LEAST_ZERO = ("num_warmup_steps", "num_workers")
_OPTIONAL = ("max_batch_tokens", "input_sample_hz", "max_grad_norm")
# of `Accelerator`, with what the loop has instead
_INSTEAD = {
    "gradient_accumulation_steps": "grad_accum_every",
    "gradient_accumulation_plugin": "grad_accum_every",
    "dataloader_config": "split_batches and num_workers",
}


def check_trainer_arguments(arguments: dict[str, Any]) -> None:
    """Raises ValueError, one sentence, for the first argument that is of no use, or that another one would silence.

    arguments: those of `Trainer`, by name; ones that are not there are not looked at.
    """
    given = {name: value for name, value in arguments.items() if value is not None or name not in _OPTIONAL}
    for names, least in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
        for name in names:
            if name in given and not _is_whole(given[name], least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {given[name]!r}.")
    for name in ("max_grad_norm", "lr"):
        if name in given and not (_is_finite(given[name]) and given[name] > 0):
            raise ValueError(f"{name} must be above 0, got {given[name]!r}.")
    for name in ("initial_lr", "wd"):
        if name in given and not (_is_finite(given[name]) and given[name] >= 0):
            raise ValueError(f"{name} must be at least 0, got {given[name]!r}.")
    fraction = given.get("valid_frac", 0)
    if not _is_finite(fraction) or not 0 <= fraction < 1:
        raise ValueError(f"valid_frac must be in [0, 1), got {fraction!r}.")
    if "max_batch_tokens" in given:
        for name in ("drop_last", "split_batches"):
            if given.get(name):
                raise ValueError(f"{name} is of batches of batch_size rows, which max_batch_tokens replaces; pass one.")


def check_accelerate_arguments(arguments: dict[str, Any]) -> None:
    """Raises ValueError for what `Accelerator` takes and the loop has its own way for: it would not be obeyed."""
    for name, own in _INSTEAD.items():
        value = arguments.get(name)
        if value is not None and (name, value) != ("gradient_accumulation_steps", 1):
            raise ValueError(f"accelerate_kwargs must not hold {name}, which the loop would not obey; set {own}.")


def _is_whole(value: Any, least: int) -> bool:
    # a number of steps is often written as 1e5
    return _is_finite(value) and (isinstance(value, Integral) or float(value).is_integer()) and value >= least


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
