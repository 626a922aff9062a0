"""The labelling job: prepare, label, journal and commit every shard that is not yet committed."""

from __future__ import annotations

import copy
import datetime
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spear_fast.labelling.audio_files import counted
from spear_fast.labelling.errors import Interrupted, LabellingError
from spear_fast.labelling.files import FolderLock, make_folder
from spear_fast.labelling.identity import job_identity, versions
from spear_fast.labelling.label_files import label_schema
from spear_fast.labelling.labeller import Labeller
from spear_fast.labelling.options import LabelOptions
from spear_fast.labelling.prepare import Preparer, Window, device_of
from spear_fast.labelling.progress import Meter, Reporter, Silent, Summary
from spear_fast.labelling.shards import Shard, plan_shards
from spear_fast.labelling.sources import Listing, Rows, open_sources
from spear_fast.labelling.store import LabelStore, changed_error
from spear_fast.labelling.stream import Stream


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
    changed = store.changed(rows.items)
    if changed and not relabel_changed:
        raise changed_error(store.out, [name for _, name in changed])
    again = {index for index, _ in changed}
    if retry_failed:
        again |= {index for index, committed in store.committed.items() if committed.failures}
    workers = workers or min(8, os.cpu_count() or 1)
    stop = stop or threading.Event()
    with _placed(model, options) as placed, closing(Labeller(placed, options, len(rows))) as labeller:
        preparer = Preparer(placed, max_source_tokens=options.max_source_tokens, workers=workers, stop=stop)
        windows = lambda bounds: preparer.windows(rows, bounds)  # noqa: E731
        return _Job(store, labeller, report or Silent(), stop).run(windows, again, rows.passed_over)


@contextmanager
def _placed(model: Any, options: LabelOptions) -> Iterator[Any]:
    """Yields the model in evaluation mode on the options' device and in their dtype; the caller's is as before after.

    It is a copy where that takes another device or dtype. The speech tokenizer is not copied, and keeps its precision:
    rounded centres would give other tokens.
    """
    dtype = torch.float32 if options.dtype == "int8" else getattr(torch, options.dtype)
    device = torch.empty(0, device=options.device).device
    modes = [(module, module.training) for module in model.modules()]
    tokenizer = getattr(model, "wav2vec", None)
    home = device_of(tokenizer)
    shared = [tokenizer, getattr(model, "tokenizer", None), getattr(model, "tokenizer_encode", None)]
    parts = [part for name, part in model.named_children() if name != "wav2vec"]
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    if any(tensor.device != device or (tensor.is_floating_point() and tensor.dtype != dtype) for tensor in tensors):
        model = copy.deepcopy(model, {id(each): each for each in shared if each is not None})
        for name, part in model.named_children():
            part.to(device=device, dtype=None if name == "wav2vec" else dtype)
    try:
        model.eval()
        _check_finite(model, options)
        yield model
    finally:
        for module, training in modes:
            module.training = training
        if tokenizer is not None:
            tokenizer.to(home)


def _check_finite(model: Any, options: LabelOptions) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise LabellingError(
                f"the model's weights {name} are not finite in {options.dtype}; use another --dtype or checkpoint."
            )


def run_record(about: dict[str, Any] | None) -> dict[str, Any]:
    """Returns what the manifest keeps of one run."""
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

    def run(
        self,
        windows: Callable[[Iterator[tuple[int, int]]], Iterator[Window]],
        again: set[int],
        passed_over: dict[str, int],
    ) -> Summary:
        """Labels the shards that are not committed, and those of `again`."""
        began = time.perf_counter()
        committed = self._store.committed
        pending = [shard for shard in self._store.shards if shard.index in again or shard.index not in committed]
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
        if passed_over:
            self._say("warning", message=f"passed over files that are no audio: {counted(passed_over)}.")
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
        kept = f", and {count} labels of unfinished shards are kept" if count else ""
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
