"""One run over shards of a store: which are pending, the model where it is needed, labels in, shards out, a summary."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

import torch

from spear_fast.labelling.audio_files import counted
from spear_fast.labelling.errors import Interrupted, LabellingError
from spear_fast.labelling.labeller import Labeller
from spear_fast.labelling.options import LabelOptions
from spear_fast.labelling.prepare import Preparer, Window, device_of
from spear_fast.labelling.progress import Meter, Reporter, Summary
from spear_fast.labelling.shards import Shard
from spear_fast.labelling.sources import Rows
from spear_fast.labelling.store import LabelStore, changed_error
from spear_fast.labelling.stream import Say, Stream

Windows = Callable[[Iterator[tuple[int, int]]], Iterator[Window]]


def pending_shards(store: LabelStore, rows: Rows, *, retry_failed: bool, relabel_changed: bool) -> list[Shard]:
    """Returns the shards that are to be labelled: those that are not written, and those that are to be written again.

    retry_failed: those with failed rows too. relabel_changed: those whose source has changed too; without it that
    raises LabellingError.
    """
    changed = store.changed(rows.items)
    if changed and not relabel_changed:
        raise changed_error(store.out, [name for _, name in changed])
    again = {index for index, _ in changed}
    if retry_failed:
        again |= {index for index, committed in store.committed.items() if committed.failures}
    return [shard for shard in store.shards if shard.index in again or shard.index not in store.committed]


def announce(say: Say, store: LabelStore, pending: list[Shard], passed_over: dict[str, int]) -> None:
    """Says what a run begins with."""
    rows = sum(map(len, store.shards))
    say(
        "start",
        rows=rows,
        done=rows - sum(map(len, pending)),
        shards=len(store.shards),
        shards_done=len(store.shards) - len(pending),
        fingerprint=store.fingerprint,
    )
    for name in store.damaged:
        say("warning", message=f"{name} is damaged or of another job and is labelled again.")
    if passed_over:
        say("warning", message=f"passed over files that are no audio: {counted(passed_over)}.")


def progress(store: LabelStore, kept: int) -> str:
    """Returns how far a job is that was stopped. kept: labels of shards that are not written."""
    done, rows = store.totals(), sum(map(len, store.shards))
    committed = f"{len(store.committed)} of {len(store.shards)} shards are written"
    more = f", and {kept} labels of unfinished shards are kept" if kept else ""
    return f"{done.rows + done.failed + kept} of {rows} utterances are done: {committed}{more}"


def summarize(store: LabelStore, meter: Meter, seconds: float) -> Summary:
    """Returns the totals of a store with the rates of a run that took `seconds`."""
    totals = store.totals()
    return Summary(
        rows=totals.rows,
        failed=totals.failed,
        shards=len(store.shards),
        hours=totals.audio_seconds / 3600 if totals.audio_seconds else None,
        mean_confidence=totals.confidence / totals.rows if totals.rows else None,
        unfinished_share=totals.unfinished / totals.rows if totals.rows else None,
        tokens_per_second=meter.tokens_per_second,
        tokenizing_speed=meter.tokenizing_speed,
        labelling_speed=meter.labelling_speed,
        rows_this_run=meter.rows,
        seconds=seconds,
    )


@contextmanager
def opened_job(
    store: LabelStore,
    rows: Rows,
    model: Any,
    options: LabelOptions,
    *,
    report: Reporter,
    stop: threading.Event | None,
    workers: int | None,
) -> Iterator[Job]:
    """Yields a run over shards of an opened store, with the model where the options want it; rows: of the whole job."""
    workers = workers or min(8, os.cpu_count() or 1)
    stop = stop or threading.Event()
    with placed(model, options) as ready, closing(Labeller(ready, options, len(rows))) as labeller:
        preparer = Preparer(ready, max_source_tokens=options.max_source_tokens, workers=workers, stop=stop)
        yield Job(store, labeller, lambda bounds: preparer.windows(rows, bounds), report, stop)


class Job:
    """One run over shards of a store; see `opened_job`."""

    def __init__(
        self, store: LabelStore, labeller: Labeller, windows: Windows, report: Reporter, stop: threading.Event
    ) -> None:
        self._store = store
        self._stream = Stream(store, labeller, self._say)
        self._windows = windows
        self._stop = stop
        self._meter = Meter()
        self._report = report

    def _say(self, event: str, **fields: Any) -> None:
        self._meter.take(event, fields)
        self._report(event, **fields)

    def run(self, pending: list[Shard], passed_over: dict[str, int]) -> Summary:
        """Labels the pending shards of the store, and returns the summary."""
        began = time.perf_counter()
        announce(self._say, self._store, pending, passed_over)
        self.label(pending)
        summary = summarize(self._store, self._meter, time.perf_counter() - began)
        self._say("summary", **asdict(summary))
        return summary

    def label(self, shards: Iterable[Shard]) -> None:
        """Labels shards, which are taken one by one as there is room for their rows, and says how that goes.

        shards: gives the same ones each time it is iterated. Raises Interrupted when the job was stopped.
        """
        bounds = (window for shard in shards for window in shard.windows())
        try:
            with closing(self._windows(bounds)) as prepared, closing(self._stream):  # type: ignore[type-var]
                self._run(shards, prepared)
        except Interrupted as interrupted:
            self._store.finish()
            raise Interrupted(progress(self._store, self._stream.kept)) from interrupted
        self._store.finish()

    def _run(self, shards: Iterable[Shard], prepared: Iterator[Window]) -> None:
        try:
            for _ in self._stream.run(shards, prepared):
                if self._stop.is_set():
                    raise Interrupted("")
        except Interrupted:
            self._stream.keep()
            raise


@contextmanager
def placed(model: Any, options: LabelOptions) -> Iterator[Any]:
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
