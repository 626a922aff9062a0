"""The labelling job: prepare, label, journal and commit every shard that is not yet committed."""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spear_fast.labelling.errors import Interrupted, LabellingError
from spear_fast.labelling.files import FolderLock, make_folder
from spear_fast.labelling.identity import job_identity, versions
from spear_fast.labelling.labeller import Labeller
from spear_fast.labelling.options import LabelOptions
from spear_fast.labelling.plan import Shard, plan_shards
from spear_fast.labelling.prepare import Preparer, Window
from spear_fast.labelling.progress import Meter, Reporter, Silent
from spear_fast.labelling.sources import open_sources
from spear_fast.labelling.store import LabelStore, label_schema
from spear_fast.labelling.stream import Stream
from spear_fast.labelling.summary import Summary


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
    about: dict[str, Any] | None = None,
) -> Summary:
    """Labels every utterance of `sources` into Parquet shards in `out`, going on where an earlier run stopped.

    sources: audio files or folders, manifests, token files. model: a `TextToSemantic`; it is moved to the options'
    device and dtype. stop: when set, the job ends after the step in progress. workers: threads that read and tokenize.
    retry_failed: labels shards with failed rows again. about: facts that the manifest records with this run.

    Raises LabellingError for what the user can mend, Interrupted when `stop` was set.
    """
    options = options or LabelOptions()
    out = Path(out)
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    if not hasattr(model, "engine"):
        raise LabellingError(
            f"model must be a TextToSemantic, got {type(model).__name__}; load one with spear_fast.load_model(path)."
        )
    listing = open_sources(sources)
    needs_audio = any(source.kind != "tokens" for source in listing.sources)
    if needs_audio and getattr(model, "wav2vec", None) is None:
        raise LabellingError("the model has no speech tokenizer to read audio with; give token files or another model.")
    make_folder(out)
    with FolderLock(out):
        identity = job_identity(model, options, listing)
        shards = plan_shards(len(listing), options.num_shards, options.rows_per_shard)
        schema = label_schema(model.num_semantic_token_ids, model.num_text_token_ids)
        store = LabelStore(out, identity, shards, schema)
        store.open(_run_record(about))
        _move(model, options)
        workers = workers or min(8, os.cpu_count() or 1)
        stop = stop or threading.Event()
        preparer = Preparer(model, max_source_tokens=options.max_source_tokens, workers=workers, stop=stop)
        windows = lambda bounds: preparer.windows(listing, bounds)  # noqa: E731
        with closing(Labeller(model, options, len(listing))) as labeller:
            return _Job(store, labeller, report or Silent(), stop).run(windows, retry_failed)


def _move(model: Any, options: LabelOptions) -> None:
    dtype = torch.float32 if options.dtype == "int8" else getattr(torch, options.dtype)
    for name, child in model.named_children():
        # the speech tokenizer keeps its precision: rounded centres would give other tokens
        child.to(device=options.device, dtype=None if name == "wav2vec" else dtype)
    model.eval()


def _run_record(about: dict[str, Any] | None) -> dict[str, Any]:
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"started": started, "versions": versions(), "threads": torch.get_num_threads(), **(about or {})}


class _Job:
    """One run over the pending shards of a store."""

    def __init__(self, store: LabelStore, labeller: Labeller, report: Reporter, stop: threading.Event) -> None:
        self._store = store
        self._stream = Stream(store, labeller, self._say)
        self._stop = stop
        self._meter = Meter()
        self._report = report

    def _say(self, event: str, **fields: Any) -> None:
        self._meter.take(event, fields)
        self._report(event, **fields)

    def run(self, windows: Callable[[Iterator[tuple[int, int]]], Iterator[Window]], retry_failed: bool) -> Summary:
        began = time.perf_counter()
        pending = [shard for shard in self._store.shards if self._is_pending(shard, retry_failed)]
        rows = sum(map(len, self._store.shards))
        done = rows - sum(map(len, pending))
        self._say(
            "start",
            rows=rows,
            done=done,
            shards=len(self._store.shards),
            shards_done=len(self._store.shards) - len(pending),
            fingerprint=self._store.fingerprint,
        )
        for name in self._store.damaged:
            self._say("warning", message=f"{name} is damaged or of another job and is labelled again.")
        bounds = (window for shard in pending for window in shard.windows())
        try:
            with closing(windows(bounds)) as prepared, closing(self._stream):  # type: ignore[type-var]
                self._label(pending, prepared)
        except Interrupted as interrupted:
            self._store.finish()
            raise Interrupted(self._progress(rows)) from interrupted
        self._store.finish()
        summary = self._summary(time.perf_counter() - began)
        self._say("summary", **asdict(summary))
        return summary

    def _is_pending(self, shard: Shard, retry_failed: bool) -> bool:
        committed = self._store.committed.get(shard.index)
        return committed is None or (retry_failed and bool(committed.failures))

    def _label(self, pending: list[Shard], prepared: Iterator[Window]) -> None:
        try:
            for _ in self._stream.run(pending, prepared):
                if self._stop.is_set():
                    raise Interrupted("")
        except Interrupted:
            self._stream.keep()
            raise

    def _progress(self, rows: int) -> str:
        done = self._store.totals()
        committed = f"{len(self._store.committed)} of {len(self._store.shards)} shards are written"
        count = self._stream.kept
        kept = f", {count} utterances of the next ones are kept" if count else ""
        return f"{done.rows + done.failed + count} of {rows} utterances are done: {committed}{kept}"

    def _summary(self, seconds: float) -> Summary:
        totals = self._store.totals()
        return Summary(
            rows=totals.rows,
            failed=totals.failed,
            shards=len(self._store.shards),
            hours=totals.audio_seconds / 3600 if totals.audio_seconds else None,
            mean_confidence=totals.confidence / totals.rows if totals.rows else None,
            unfinished_share=totals.unfinished / totals.rows if totals.rows else None,
            tokens_per_second=self._meter.tokens_per_second,
            tokenizing_speed=self._meter.tokenizing_speed,
            labelling_speed=self._meter.labelling_speed,
            rows_this_run=self._meter.rows,
            seconds=seconds,
        )
