"""Which rows go into which shard, and which rows are decoded together: functions of the input and the options alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# rows whose audio is tokenized, sorted and batched together; bounds memory when shards are large
WINDOW_ROWS = 4096
# decoding a row costs memory for its label too, so a very short source is not free
LEAST_ROW_TOKENS = 64


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


def compose_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Returns the positions of `lengths` in batches, longest first, whose padded size stays within `batch_tokens`.

    A row longer than the budget is a batch of its own. Rows of equal length keep their order.
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    batches: list[list[int]] = []
    room = 0
    for position in order:
        if room == 0:
            batches.append([])
            # the first row is the longest; one more for the end-of-sequence
            room = max(1, batch_tokens // max(lengths[position] + 1, LEAST_ROW_TOKENS))
        batches[-1].append(position)
        room -= 1
    return batches
