"""The stream of a job: utterances of one shard after the other through the labeller's slots, shards out in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from spear_fast.decoding import DecodingResult
from spear_fast.labelling.journal import Journal
from spear_fast.labelling.label_files import LabelRow
from spear_fast.labelling.labeller import Label, Labeller
from spear_fast.labelling.prepare import Failure, Utterance, Window
from spear_fast.labelling.shards import Shard, longest_first
from spear_fast.labelling.store import LabelStore, Totals

MANIFEST_SECONDS = 5.0
# a round: what is written, synced and reported together, a share of the slots
ROUND_SHARE = 4

Labelled = tuple[Utterance, Label]


@dataclass
class OpenShard:
    """A shard in progress. missing: utterances that are not done. whole: whether all of its rows have been seen."""

    shard: Shard
    journal: Journal
    labelled: list[Labelled] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    missing: int = 0
    whole: bool = False


class Say(Protocol):
    """Takes the events of a job; see `Reporter`."""

    def __call__(self, event: str, **fields: Any) -> None: ...


class Stream:
    """Labels the shards of a store, several at once where they are small, and commits them in their order.

    Within a window of rows the longest go first; the slots of those that are done are given away at once, to rows of
    the next window or shard too. What is finished is journalled a round at a time.
    """

    def __init__(self, store: LabelStore, labeller: Labeller, say: Say) -> None:
        self._store = store
        self._labeller = labeller
        self._say = say
        self._open: deque[OpenShard] = deque()
        self._queue: deque[tuple[OpenShard, Utterance]] = deque()
        self._round: list[tuple[OpenShard, Utterance, DecodingResult]] = []
        self._slots = 0
        self._told_seconds = 0.0
        self._manifest_written = time.monotonic()

    def run(self, shards: Iterable[Shard], prepared: Iterator[Window]) -> Iterator[None]:
        """Labels and commits the shards; yields before whatever takes time, where a caller may stop it.

        prepared: the rows of the shards' windows, in order.
        """
        for shard in shards:
            # only now: a run without shards needs no engine
            self._slots = self._slots or self._labeller.slots
            opened = OpenShard(shard, self._store.journal(shard))
            opened.journal.open()
            self._open.append(opened)
            for _ in shard.windows():
                yield
                self._take(opened, next(prepared))
                while len(self._queue) >= self._labeller.slots:
                    yield
                    self._step()
            opened.whole = True
            self._commit_finished()
        if not self._slots:
            return
        while self._queue or self._labeller.busy:
            yield
            self._step()
        self.keep()
        if self._open:
            raise RuntimeError(f"{self._open[0].missing} rows of {self._open[0].shard.name} have been lost on the way.")

    @property
    def kept(self) -> int:
        """Utterances that have a label, in shards that are not committed."""
        return sum(len(opened.labelled) for opened in self._open)

    def keep(self) -> None:
        """Journals what is finished, and commits the shards that are whole by that."""
        by_shard: dict[int, list[Labelled]] = {}
        labels = self._labeller.labels([(utterance, result) for _, utterance, result in self._round])
        for (opened, utterance, _), label in zip(self._round, labels, strict=True):
            if isinstance(label, Exception):
                self._fail(opened, utterance, label)
                continue
            by_shard.setdefault(opened.shard.index, []).append((utterance, label))
        self._round = []
        for opened in self._open:
            labelled = by_shard.get(opened.shard.index, [])
            if labelled:
                opened.journal.append(labelled)
                opened.labelled += labelled
                opened.missing -= len(labelled)
        everything = [each for labelled in by_shard.values() for each in labelled]
        if everything:
            self._tell(everything, self._labeller.seconds - self._told_seconds, restored=False)
            self._told_seconds = self._labeller.seconds
        self._commit_finished()

    def _fail(self, opened: OpenShard, utterance: Utterance, error: Exception) -> None:
        """Sets a row aside that turned out not to be labelled while it was decoded."""
        opened.failures.append(utterance.failed(error))
        opened.missing -= 1
        self._say("prepared", rows=-1, failed=1, audio_seconds=0.0, seconds=0.0)

    def close(self) -> None:
        for opened in self._open:
            opened.journal.close()

    def _take(self, opened: OpenShard, window: Window) -> None:
        """Queues the rows of a window, but for those whose label an earlier run journalled."""
        self._say(
            "prepared",
            rows=len(window.utterances),
            failed=len(window.failures),
            audio_seconds=window.audio_seconds,
            seconds=window.elapsed,
        )
        opened.failures += window.failures
        restored: list[Labelled] = []
        for position in longest_first([len(utterance.tokens) for utterance in window.utterances]):
            utterance = window.utterances[position]
            label = opened.journal.find(utterance)
            if label is None:
                self._queue.append((opened, utterance))
                opened.missing += 1
            else:
                restored.append((utterance, label))
        if restored:
            opened.labelled += restored
            self._tell(restored, 0.0, restored=True)

    def _step(self) -> None:
        """Fills the slots, makes a step, and keeps what is done once it is a round or all that a shard waits for."""
        labeller = self._labeller
        while self._queue and labeller.busy < labeller.slots:
            opened, utterance = self._queue.popleft()
            labeller.submit(utterance, (opened, utterance))
        for (opened, utterance), result in labeller.step():
            if isinstance(result, ValueError):
                self._fail(opened, utterance, result)
            else:
                self._round.append((opened, utterance, result))
        if labeller.slots < self._slots:
            self._say(
                "warning",
                message=f"the device's memory has run out; continuing with {labeller.slots} utterances side by side "
                f"instead of {self._slots}. Labels that are equally likely within rounding may come out differently.",
            )
            self._slots = labeller.slots
        first = self._open[0]
        ready = sum(opened is first for opened, _, _ in self._round)
        if len(self._round) >= max(1, self._slots // ROUND_SHARE) or (first.whole and first.missing == ready):
            self.keep()

    def _tell(self, labelled: Sequence[Labelled], seconds: float, *, restored: bool) -> None:
        self._say(
            "batch",
            rows=len(labelled),
            tokens=sum(label.generated for _, label in labelled),
            source_tokens=sum(len(utterance.tokens) for utterance, _ in labelled),
            audio_seconds=sum(utterance.seconds or 0.0 for utterance, _ in labelled),
            seconds=seconds,
            restored=restored,
        )

    def _commit_finished(self) -> None:
        """Commits the shards that are whole, in order, up to the first that is not."""
        while self._open:
            opened = self._open[0]
            if not opened.whole or opened.missing:
                return
            opened.labelled.sort(key=lambda each: each[0].index)
            rows = [label_row(utterance, label) for utterance, label in opened.labelled]
            failures = [failure.as_record() for failure in sorted(opened.failures, key=lambda each: each.index)]
            contents = b"".join(utterance.content for utterance, _ in opened.labelled)
            self._store.commit(opened.shard, rows, failures, _totals(opened), contents)
            opened.journal.remove()
            opened.journal.close()
            self._open.popleft()
            self._say("shard", name=opened.shard.name, rows=len(rows), failed=len(opened.failures))
            if time.monotonic() - self._manifest_written >= MANIFEST_SECONDS:
                self._store.write_manifest()
                self._manifest_written = time.monotonic()


def label_row(utterance: Utterance, label: Label) -> LabelRow:
    """Returns an utterance with its label as it is stored."""
    return LabelRow(
        id=utterance.id,
        source=utterance.tokens,
        target=label.target,
        text=label.text,
        score=label.score,
        mean_logprob=label.mean_logprob,
        finished=label.finished,
        flags=label.flags,
    )


def _totals(opened: OpenShard) -> Totals:
    """Returns a shard's sums, rows taken in their own order and not in that of decoding: rounding is stored too."""
    totals = Totals(failed=len(opened.failures))
    for utterance, label in opened.labelled:
        totals.rows += 1
        totals.source_tokens += len(utterance.tokens)
        totals.target_tokens += len(label.target)
        totals.unfinished += not label.finished
        totals.audio_seconds += utterance.seconds or 0.0
        totals.confidence += float(np.exp(label.mean_logprob))
    return totals
