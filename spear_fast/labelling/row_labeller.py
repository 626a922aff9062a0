"""Labels for rows that come one by one, from any thread, for pipelines of others: no folder, no shards, no manifest."""

from __future__ import annotations

import os
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any, TypeAlias

from spear_fast.decoding import DecodingResult
from spear_fast.labelling.items import Item
from spear_fast.labelling.job import placed
from spear_fast.labelling.label_files import LabelRow
from spear_fast.labelling.labeller import Labeller
from spear_fast.labelling.options import LARGEST, LabelOptions
from spear_fast.labelling.prepare import Failure, Preparer, Utterance
from spear_fast.labelling.runner import check_is_model
from spear_fast.labelling.stream import label_row

Outcome: TypeAlias = LabelRow | Failure
_Ready: TypeAlias = "tuple[Utterance, Future[Outcome]]"


class RowLabeller:
    """Labels rows, many side by side, each as soon as there is a slot: what waits for one row holds up no other.

    Rows of several batches are in the engine together, so that it is full as long as somebody gives rows. A label is
    what a job of the same model and options, of as many rows as there are slots, would store. Use it as a context
    manager, or call `close`.

    model: a `TextToSemantic`, which is moved or copied where the options want another device or dtype. workers: threads
    that read and tokenize. Raises LabellingError.
    """

    def __init__(self, model: Any, options: LabelOptions | None = None, *, workers: int | None = None) -> None:
        check_is_model(model)
        options = options or LabelOptions()
        workers = workers or min(8, os.cpu_count() or 1)
        self._stop = threading.Event()
        self._incoming: queue.SimpleQueue[_Ready | None] = queue.SimpleQueue()
        with ExitStack() as stack:
            model = stack.enter_context(placed(model, options))
            self._labeller = stack.enter_context(closing(Labeller(model, options, LARGEST)))
            self._preparer = Preparer(
                model, max_source_tokens=options.max_source_tokens, workers=workers, stop=self._stop
            )
            # what is wrong with the sizes is said here
            self.slots = self._labeller.slots
            self._pool = stack.enter_context(ThreadPoolExecutor(workers))
            self._thread = threading.Thread(target=self._serve, name="spear_fast labels", daemon=True)
            self._thread.start()
            self._stack = stack.pop_all()

    def __enter__(self) -> RowLabeller:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, item: Item) -> Future[Outcome]:
        """Takes a row and returns the future of its label, or of why it has none.

        The future fails with LabellingError only where no row can be labelled any more.
        """
        if self._stop.is_set():
            raise RuntimeError("the labeller is closed and takes no more rows; make another one.")
        future: Future[Outcome] = Future()
        # a future that is running cannot be cancelled: it is always completed here
        future.set_running_or_notify_cancel()
        self._pool.submit(self._prepare, item, future)
        return future

    def close(self) -> None:
        """Ends all threads and frees the buffers; rows that have no label yet fail."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=False)
        self._incoming.put(None)
        self._thread.join()
        self._stack.close()

    def _prepare(self, item: Item, future: Future[Outcome]) -> None:
        try:
            row = self._preparer.row(0, item)
        except BaseException as error:
            # a package that is missing, or the end
            future.set_exception(error)
            return
        if isinstance(row, Failure):
            future.set_result(row)
            return
        self._incoming.put((row, future))

    def _serve(self) -> None:
        open_rows: set[Future[Outcome]] = set()
        error: BaseException = RuntimeError("the labeller was closed before the row had a label.")
        try:
            while self._admit(open_rows):
                for (utterance, future), result in self._labeller.step():
                    open_rows.discard(future)
                    future.set_result(self._outcome(utterance, result))
        except BaseException as failed:
            error = failed
        self._stop.set()
        for future in open_rows:
            future.set_exception(error)
        while not self._incoming.empty():
            ready = self._incoming.get()
            if ready is not None:
                ready[1].set_exception(error)

    def _admit(self, open_rows: set[Future[Outcome]]) -> bool:
        """Gives the engine all that has come, and waits where there is nothing to do; returns whether to go on."""
        while not self._incoming.empty() or not self._labeller.busy:
            ready = self._incoming.get()
            if ready is None:
                return False
            utterance, future = ready
            open_rows.add(future)
            self._labeller.submit(utterance, (utterance, future))
        return True

    def _outcome(self, utterance: Utterance, result: DecodingResult | ValueError) -> Outcome:
        if isinstance(result, ValueError):
            return utterance.failed(result)
        (label,) = self._labeller.labels([(utterance, result)])
        return utterance.failed(label) if isinstance(label, Exception) else label_row(utterance, label)
