"""One job on many machines: planned once, labelled by workers with shards of their own, and finished together.

A shard has one name and, whoever makes it, the same bytes; a rename commits it. So a worker may be killed, started
again, or made to do what another one does already: nothing is lost by that but time.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from spear_fast.labelling.errors import LabellingError
from spear_fast.labelling.files import FolderLock
from spear_fast.labelling.identity import job_identity
from spear_fast.labelling.job import opened_job
from spear_fast.labelling.journal import Journal, journal_path
from spear_fast.labelling.label_files import label_schema, read_ids
from spear_fast.labelling.options import LabelOptions
from spear_fast.labelling.planning import JobPlan, read_plan, write_plan
from spear_fast.labelling.progress import Reporter, Silent, Summary
from spear_fast.labelling.runner import check_is_model, check_model, label_store, open_job, run_record, sizes_of
from spear_fast.labelling.shards import Shard
from spear_fast.labelling.sharing import Claims
from spear_fast.labelling.store import LabelStore, Totals


class PartStore(LabelStore):
    """A worker's own shards in a folder that it shares: manifest, card and failed rows are left to `finish`."""

    def open(self, run: dict[str, Any]) -> None:
        """Takes up the shards that are there; `run` is not kept."""
        self.check()
        self._read_shards()

    def journal(self, shard: Shard) -> Journal:
        return Journal(journal_path(self.out, shard), self.fingerprint, shared=True)

    def write_manifest(self) -> None:
        pass

    def finish(self) -> None:
        self._check_present()

    def _write_failed(self) -> None:
        pass

    def _append_failed(self, failures: Sequence[dict[str, str]]) -> None:
        pass


def plan(
    sources: str | Path | Sequence[str | Path],
    model: Any,
    out: str | Path,
    options: LabelOptions | None = None,
    *,
    model_path: str | None = None,
    lock: bool = True,
) -> JobPlan:
    """Lists `sources` once and writes the plan of labelling them into `out`, for workers of `label_part`.

    model_path: where workers find the model, unless they are told. Everything else is as in `label`.
    Raises LabellingError, also when `out` holds the plan or the labels of another job.
    """
    options, out = options or LabelOptions(), Path(out)
    # the manifest comes first: shards without one would be a stranger's
    with open_job(sources, model, out, options, about={"planned": True}, lock=lock) as (store, listing):
        return write_plan(out, listing, store.identity, options, model_path, sizes_of(model))


def label_part(
    out: str | Path,
    model: Any,
    part: tuple[int, int] = (0, 1),
    *,
    device: str | None = None,
    report: Reporter | None = None,
    stop: threading.Event | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    relabel_changed: bool = False,
    lock: bool = True,
) -> Summary:
    """Labels part `I` of `N` of what was planned in `out`: the shards I, I + N, I + 2 N, … that are not done.

    model: the one that the plan is for. device: in place of the plan's, of the same kind. Any number of workers may run
    at once, also on the same part. Returns the sums of the part; the rest is as in `label`.
    """
    with _taking_part(Path(out), model, device, lock) as (planned, options):
        return label_store(
            part_store(planned, part),
            planned.rows,
            model,
            options,
            report=report,
            stop=stop,
            workers=workers,
            retry_failed=retry_failed,
            relabel_changed=relabel_changed,
        )


def label_claimed(
    out: str | Path,
    model: Any,
    claim: Callable[[], int | None],
    *,
    device: str | None = None,
    report: Reporter | None = None,
    stop: threading.Event | None = None,
    workers: int | None = None,
    lock: bool = True,
) -> None:
    """Labels shards of what was planned in `out` as a dispatcher gives them, written ones too; see `label_part`.

    claim: returns the number of a shard, None when there are no more. It is called as soon as there is room for another
    shard's rows, so that no slot is free while there is work. The report gets neither a start nor a summary.
    """
    with _taking_part(Path(out), model, device, lock) as (planned, options):
        # of the shards of others there is nothing to be known
        store = PartStore(planned.out, planned.identity, [], label_schema(*planned.sizes))
        store.open({})
        claims = Claims(planned.shards, claim)
        with opened_job(
            store, planned.rows, model, options, report=report or Silent(), stop=stop, workers=workers
        ) as job:
            job.label(claims)


@contextmanager
def _taking_part(out: Path, model: Any, device: str | None, lock: bool) -> Iterator[tuple[JobPlan, LabelOptions]]:
    """Yields the plan in `out`, which `model` is for, and its options on this device; others may take part too."""
    planned = read_plan(out)
    check_is_model(model)
    check_model(model, planned.rows)
    options = planned.options if device is None else replace(planned.options, device=device)
    planned.check(job_identity(model, options, planned.rows))
    with FolderLock(out, needed=lock, shared=True):
        yield planned, options


def part_store(planned: JobPlan, part: tuple[int, int]) -> PartStore:
    """Returns the opened store of part `I` of `N` of a plan."""
    index, count = part
    if not 0 <= index < count:
        raise LabellingError(f"a part must be I/N with I from 0 to N - 1, got {index}/{count}.")
    store = PartStore(planned.out, planned.identity, planned.shards[index::count], label_schema(*planned.sizes))
    store.open({})
    return store


def finish(out: str | Path, *, lock: bool = True, about: dict[str, Any] | None = None) -> Totals:
    """Checks that every row of the plan in `out` is there once, and writes manifest, card and failed rows.

    Raises LabellingError that names the shards that are missing, damaged, or hold other rows.
    """
    out = Path(out)
    planned = read_plan(out)
    with FolderLock(out, needed=lock):
        store = LabelStore(out, planned.identity, planned.shards, label_schema(*planned.sizes))
        store.open(run_record(about))
        missing = [shard for shard in planned.shards if shard.index not in store.committed]
        if missing:
            raise LabellingError(
                f"{len(missing)} of {len(planned.shards)} shards of {out} are not labelled yet: {_named(missing)}; run "
                f"their workers again: spear-fast label --out {out} --shard I/N"
            )
        wrong = [shard for shard in planned.shards if not _holds(store, planned, shard)]
        if wrong:
            raise LabellingError(
                f"{_named(wrong)} in {out} do not hold the rows that were planned; remove these files and run their "
                "workers again."
            )
        for path in out.glob(".labels-*.journal*"):
            path.unlink(missing_ok=True)
        store.finish()
        return store.totals()


def _holds(store: LabelStore, planned: JobPlan, shard: Shard) -> bool:
    """Returns whether each row of a shard is in its file, labelled or failed, once."""
    there = Counter(read_ids(store.data / shard.name))
    there.update(failure["id"] for failure in store.committed[shard.index].failures)
    return there == Counter(planned.rows.ids(shard))


def _named(shards: Sequence[Shard]) -> str:
    more = f" and {len(shards) - 5} more" if len(shards) > 5 else ""
    return ", ".join(shard.name for shard in shards[:5]) + more


def part_of(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Returns I and N of "I/N"; without a text, what launchers say of a process in its environment, else the whole.

    Slurm arrays say SLURM_ARRAY_TASK_ID with _MIN, _STEP and _COUNT, torchrun and others RANK and WORLD_SIZE; where
    both do, each process of each task has a part of its own. Raises LabellingError.
    """
    if text is not None:
        return _part(*(text.split("/") if text.count("/") == 1 else (text, "")), shown=text)
    index, count = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        names = {"ID": "0", "MIN": "0", "STEP": "1", "COUNT": ""}
        values = {name: environment.get(f"SLURM_ARRAY_TASK_{name}", default) for name, default in names.items()}
        task, first, step = (_whole(values[name]) for name in ("ID", "MIN", "STEP"))
        index, off = divmod(task - first, max(step, 1))
        index, count = _part("" if off else str(index), values["COUNT"], shown=f"Slurm's {values}")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, size = environment["RANK"], environment["WORLD_SIZE"]
        rank_index, rank_count = _part(rank, size, shown=f"RANK {rank} of WORLD_SIZE {size}")
        index, count = index * rank_count + rank_index, count * rank_count
    return index, count


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() else -1


def _part(index: str, count: str, *, shown: str) -> tuple[int, int]:
    if not 0 <= _whole(index) < _whole(count):
        raise LabellingError(
            f"a part must be I/N, of whole numbers, with I from 0 to N - 1, got {shown}; give --shard I/N."
        )
    return _whole(index), _whole(count)
