"""The labelling job: prepare, label, journal and commit every shard that is not yet committed."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from spear_fast.labelling.errors import LabellingError
from spear_fast.labelling.files import FolderLock, make_folder
from spear_fast.labelling.identity import job_identity, versions
from spear_fast.labelling.job import opened_job, pending_shards
from spear_fast.labelling.label_files import label_schema
from spear_fast.labelling.options import LabelOptions
from spear_fast.labelling.progress import Reporter, Silent, Summary
from spear_fast.labelling.shards import plan_shards
from spear_fast.labelling.sources import Listing, Rows, open_sources
from spear_fast.labelling.store import LabelStore


def label(
    sources: str | Path | Sequence[str | Path],
    model: Any,
    out: str | Path,
    options: LabelOptions | None = None,
    *,
    report: Reporter | None = None,
    stop: threading.Event | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    relabel_changed: bool = False,
    lock: bool = True,
    about: dict[str, Any] | None = None,
) -> Summary:
    """Labels every utterance of `sources` into Parquet shards in `out`, resuming where an earlier run stopped.

    sources: audio files or folders, manifests, token files. model: a `TextToSemantic`; the job works on a copy where
    the options want another device or dtype. stop: when set, the job ends after the step in progress. workers: threads
    that read and tokenize. retry_failed: labels shards with failed rows again. relabel_changed: labels shards again
    whose source has changed since; otherwise that is an error. lock: False does without one, see `FolderLock`.
    about: facts that the manifest records with this run.

    Raises LabellingError for what the user can mend, Interrupted when `stop` was set.
    """
    options = options or LabelOptions()
    with open_job(sources, model, Path(out), options, about=about, lock=lock) as (store, listing):
        return label_store(
            store,
            listing,
            model,
            options,
            report=report,
            stop=stop,
            workers=workers,
            retry_failed=retry_failed,
            relabel_changed=relabel_changed,
        )


@contextmanager
def open_job(
    sources: str | Path | Sequence[str | Path],
    model: Any,
    out: Path,
    options: LabelOptions,
    *,
    about: dict[str, Any] | None,
    lock: bool,
) -> Iterator[tuple[LabelStore, Listing]]:
    """Lists `sources` and yields the job of labelling them, opened and locked in `out`, and its rows; see `label`."""
    check_is_model(model)
    listing = open_sources([sources] if isinstance(sources, (str, Path)) else sources)
    check_model(model, listing)
    make_folder(out)
    with FolderLock(out, needed=lock):
        identity = job_identity(model, options, listing)
        shards = plan_shards(len(listing), options.num_shards, options.rows_per_shard)
        store = LabelStore(out, identity, shards, label_schema(*sizes_of(model)))
        store.open(run_record(about))
        yield store, listing


def sizes_of(model: Any) -> tuple[int, int]:
    """Returns the sizes of the speech and the text vocabulary."""
    return model.num_semantic_token_ids, model.num_text_token_ids


def check_is_model(model: Any) -> None:
    """Raises LabellingError when `model` is none of ours."""
    if not hasattr(model, "engine"):
        raise LabellingError(
            f"model must be a TextToSemantic, got {type(model).__name__}; load one with spear_fast.load_model(path)."
        )


def check_model(model: Any, rows: Rows) -> None:
    """Raises LabellingError when `model` cannot label such rows."""
    needs_audio = any(source.kind != "tokens" for source in rows.sources)
    if needs_audio and getattr(model, "wav2vec", None) is None:
        raise LabellingError("the model has no speech tokenizer to read audio with; give token files or another model.")


def label_store(
    store: LabelStore,
    rows: Rows,
    model: Any,
    options: LabelOptions,
    *,
    report: Reporter | None = None,
    stop: threading.Event | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    relabel_changed: bool = False,
) -> Summary:
    """Labels the shards of an opened store that are not done; rows: of the whole job. The rest is as in `label`."""
    pending = pending_shards(store, rows, retry_failed=retry_failed, relabel_changed=relabel_changed)
    with opened_job(store, rows, model, options, report=report or Silent(), stop=stop, workers=workers) as job:
        return job.run(pending, rows.passed_over)


def run_record(about: dict[str, Any] | None) -> dict[str, Any]:
    """Returns what the manifest keeps of one run."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"started": started, "versions": versions(), "threads": torch.get_num_threads(), **(about or {})}
