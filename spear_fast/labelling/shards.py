"""Which rows go into which shard, in what order and how many together: functions of the rows and the options alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# rows whose audio is tokenized and sorted together; bounds memory when shards are large
WINDOW_ROWS = 4096
# source tokens of an ordinary utterance: 5 to 10 seconds
SLOT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows `start` to `stop - 1` of the listing, one output file."""

    index: int
    count: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"labels-{self.index:05d}-of-{self.count:05d}.parquet"

    def __len__(self) -> int:
        return self.stop - self.start

    def windows(self) -> Iterator[tuple[int, int]]:
        """Yields `start, stop` of consecutive runs of rows."""
        for start in range(self.start, self.stop, WINDOW_ROWS):
            yield start, min(start + WINDOW_ROWS, self.stop)


def plan_shards(num_rows: int, num_shards: int | None, rows_per_shard: int) -> list[Shard]:
    """Returns shards of equal size (give or take a row) that cover all rows in order, none of them empty."""
    count = num_shards if num_shards is not None else -(-num_rows // rows_per_shard)
    count = max(1, min(count, num_rows))
    edges = [num_rows * index // count for index in range(count + 1)]
    return [Shard(index, count, edges[index], edges[index + 1]) for index in range(count)]


def slots_for(batch_tokens: int, rows: int) -> int:
    """Returns how many utterances are decoded side by side in a job of `rows`; it decides how matmuls round.

    batch_tokens: source tokens that are worked on together, taken as `SLOT_TOKENS` an utterance.
    """
    return max(1, min(batch_tokens // SLOT_TOKENS, rows))


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Returns the positions of `lengths` from the longest to the shortest; equal ones keep their order."""
    return sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
