"""A part of a planned labelling job as a step of datatrove's executors, which nothing here imports."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from spear_fast.labelling.errors import LabellingError
from spear_fast.labelling.parts import label_part
from spear_fast.labelling.planning import read_plan


def label_shards(
    data: Iterable[Any] | None,
    rank: int = 0,
    world_size: int = 1,
    *,
    out: str | Path,
    model: str | None = None,
    device: str | None = None,
    workers: int | None = None,
) -> Iterable[Any] | None:
    """Labels part `rank` of `world_size` of what `spear-fast plan` wrote to `out`, and hands `data` on as it came.

    Give it to an executor as `functools.partial(label_shards, out=…)`; tasks are parts. One that was killed and runs
    again resumes inside a shard. model: where it is, by default where the plan says. device: by default the plan's.
    workers: threads that read and tokenize. Raises LabellingError.
    """
    path = model or read_plan(Path(out)).model
    if path is None:
        raise LabellingError("the plan does not say where the model is; give it as model.")
    label_part(out, _load(path), (rank, world_size), device=device, workers=workers)
    return data


@lru_cache(maxsize=1)
def _load(path: str) -> Any:
    """Returns the model in a folder; tasks that run in one process share it."""
    from spear_fast.checkpoints.load import load_model

    return load_model(path)
