"""The state of every random generator of a process: saved in checkpoints, and set aside while a model is validated."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of all random generators of this process, in types that load with `weights_only=True`."""
    name, keys, *rest = np.random.get_state()
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        # torch has no uint32 arithmetic, but holds the bits
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts all random generators of this process back to where `random_state` found them."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """Inside, random draws are the same each time; afterwards they continue as if there had been none."""
    state = random_state(device)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        restore_random_state(state, device)
