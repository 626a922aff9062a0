"""Shards of one job, given to workers as they ask: whoever is fast does more, and those of the dead go to others."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

from spear_fast.labelling.errors import LabellingError
from spear_fast.labelling.progress import Meter, Reporter
from spear_fast.labelling.shards import Shard

# workers that may die of one shard, or with it, before the job gives up
MOST_LOSSES = 10


class Dispatcher:
    """Numbers of shards, each at one worker at a time."""

    def __init__(self, shards: Iterable[int], *, most_losses: int = MOST_LOSSES) -> None:
        self._waiting = deque(shards)
        self._claimed: dict[Hashable, list[int]] = {}
        self._losses: Counter[int] = Counter()
        self._most_losses = most_losses

    @property
    def left(self) -> int:
        """Shards that are not done."""
        return len(self._waiting) + sum(map(len, self._claimed.values()))

    @property
    def waiting(self) -> int:
        """Shards that nobody has claimed."""
        return len(self._waiting)

    def claim(self, worker: Hashable) -> int | None:
        """Returns a shard for a worker, None when all are done or claimed."""
        if not self._waiting:
            return None
        shard = self._waiting.popleft()
        self._claimed.setdefault(worker, []).append(shard)
        return shard

    def done(self, worker: Hashable, shard: int) -> None:
        """Takes note of a shard that is written."""
        if shard in self._claimed.get(worker, ()):
            self._claimed[worker].remove(shard)

    def release(self, worker: Hashable) -> list[int]:
        """Returns the shards that a worker claimed and has not done; they are the next that are claimed.

        Raises LabellingError when workers have died of one of them again and again.
        """
        shards = self._claimed.pop(worker, [])
        self._waiting.extendleft(reversed(shards))
        # the others were not begun, or are not what it died of
        self._losses.update(shards[:1])
        for shard in shards[:1]:
            if self._losses[shard] >= self._most_losses:
                raise LabellingError(
                    f"{self._losses[shard]} workers died while they were at shard {shard}; look at what they said, and "
                    "run the same command again to resume."
                )
        return shards


class Claims:
    """Shards that are claimed one by one, as far as somebody iterates; each iteration gives the same ones."""

    def __init__(self, shards: Sequence[Shard], claim: Callable[[], int | None]) -> None:
        """shards: all of the job. claim: returns the number of one of them, None when there are no more."""
        self._shards, self._claim = shards, claim
        self._claimed: list[Shard] = []
        self._ended = False

    def __iter__(self) -> Iterator[Shard]:
        position = 0
        while position < len(self._claimed) or self._more():
            yield self._claimed[position]
            position += 1

    def _more(self) -> bool:
        number = None if self._ended else self._claim()
        if number is None:
            self._ended = True
            return False
        self._claimed.append(self._shards[number])
        return True


class Tally:
    """What the workers of one job say, as if one had said it. meter: of all of them."""

    def __init__(self, report: Reporter) -> None:
        self.meter = Meter()
        self._report = report
        # by worker, rows of shards that are not written
        self._labelled: Counter[Hashable] = Counter()
        self._failed: Counter[Hashable] = Counter()

    @property
    def kept(self) -> int:
        """Labels of shards that are not written."""
        return self._labelled.total()

    def say(self, event: str, **fields: Any) -> None:
        """Says something of the whole job; see `Reporter`."""
        self.meter.take(event, fields)
        self._report(event, **fields)

    def take(self, worker: Hashable, event: str, fields: dict[str, Any], workers: int) -> None:
        """Passes on what one of several workers says; the rates of each, taken together, are those of the job."""
        if event in ("prepared", "batch"):
            fields = {**fields, "seconds": fields["seconds"] / workers}
        if event == "prepared":
            self._failed[worker] += fields["failed"]
        if event == "batch":
            self._labelled[worker] += fields["rows"]
        if event == "shard":
            self._labelled[worker] -= fields["rows"]
            self._failed[worker] -= fields["failed"]
        self.say(event, **fields)

    def lose(self, worker: Hashable) -> None:
        """Takes back the rows of what a worker that died has not written: whoever resumes it counts them again."""
        none = {"audio_seconds": 0.0, "seconds": 0.0}
        self.say("prepared", rows=0, failed=-self._failed.pop(worker, 0), **none)
        rows = -self._labelled.pop(worker, 0)
        self.say("batch", rows=rows, tokens=0, source_tokens=0, restored=True, **none)
