"""Token files: Parquet or JSON lines with `id` and `tokens`."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from spear_fast.labelling.errors import LabellingError, readable, reason_of
from spear_fast.labelling.items import Item, identify, parse_object, read_item

# rows decoded from a Parquet file at once
READ_ROWS = 1024


class Unchanged:
    """Sees to it that a file is the one that was listed: rows that come from two states of it would be a mixture."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = _state(os.stat(path))

    def check(self, file: IO[bytes]) -> None:
        """Raises LabellingError when the file was written to, or replaced, since it was listed."""
        if _state(os.fstat(file.fileno())) != self._state:
            raise LabellingError(f"{self._path} has changed while it was read; run the command again.")


def _state(state: os.stat_result) -> tuple[int, int]:
    return state.st_size, state.st_mtime_ns


class TokenLines:
    """JSON lines `{"id": …, "tokens": […]}`; ids and line offsets are kept, tokens are read when asked for."""

    kind = "tokens"

    def __init__(self, path: Path, *, listed: bool = True) -> None:
        """Lists the rows of a file; listed: False leaves that, and only `items_at` gives rows."""
        self.name = readable(path.name)
        self.origin = readable(str(path))
        self.passed_over: dict[str, int] = {}
        self.path = path
        self._unchanged = Unchanged(path)
        # in bytes, where the line of each row begins
        self.positions = array("q")
        self._ids: list[str] = []
        if listed:
            self._list()

    def _list(self) -> None:
        with open(self.path, "rb") as file:
            position = 0
            for line in file:
                if line.strip():
                    self.positions.append(position)
                    self._ids.append(self._parse(line, len(self.positions)).id)
                position += len(line)

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> Iterator[str]:
        return iter(self._ids)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        return self.items_at(self.positions[start:stop], start)

    def items_at(self, positions: Sequence[int], start: int) -> Iterator[Item]:
        """Yields the rows from row `start` on, whose lines begin at `positions`."""
        with open(self.path, "rb") as file:
            self._unchanged.check(file)
            for number, position in enumerate(positions, start + 1):
                file.seek(position)
                yield self._parse(file.readline(), number)

    def _parse(self, line: bytes, number: int) -> Item:
        origin = self.origin
        row: dict[str, Any] = {}

        def identifier() -> Any:
            row.update(parse_object(line))
            return row.get("id")

        def read(name: str) -> Item:
            return Item(id=name, origin=origin, tokens=as_tokens(row.get("tokens")))

        return read_item(f"{self.name}:{number}", origin, identifier, read)


def as_tokens(value: Any) -> np.ndarray:
    """Returns a list of whole numbers as int64 `[n]`. Raises LabellingError: true and 1.0 are no token ids."""
    if isinstance(value, list) and all(type(token) is int for token in value):
        try:
            return np.array(value, dtype=np.int64)
        except OverflowError:
            pass
    raise LabellingError("'tokens' must be a list of whole numbers.")


class TokenParquet:
    """A Parquet file with `id` (text or integers) and `tokens: list<int>`, read forwards while it is asked for.

    Other columns are not looked at. The file is read and not mapped into memory: one that shrinks is an error then,
    and not the end of the process.
    """

    kind = "tokens"

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.name = readable(path.name)
        self.origin = readable(str(path))
        self.passed_over: dict[str, int] = {}
        self.path = path
        self._unchanged = Unchanged(path)
        self._file: IO[bytes] | None = None
        try:
            with open(path, "rb") as file:
                parquet = _parquet(file)
                self._groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
                self._length = parquet.metadata.num_rows
                schema = parquet.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise LabellingError(
                f"{path} is not a readable Parquet file, it may be truncated: {reason_of(error)}."
            ) from error
        self._check_columns(schema)
        self._rows: Iterator[tuple[Any, Any]] | None = None
        self._position = 0

    def _check_columns(self, schema: Any) -> None:
        import pyarrow as pa

        for name in ("id", "tokens"):
            count = schema.names.count(name)
            if not count:
                names = ", ".join(schema.names) or "none"
                raise LabellingError(f"{self.path} must have the columns id and tokens, got {names}.")
            if count > 1:
                raise LabellingError(f"{self.path} has {count} columns {name}; rename all but one.")
        tokens = schema.field("tokens").type
        kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        if not any(is_kind(tokens) for is_kind in kinds) or not pa.types.is_integer(tokens.value_type):
            raise LabellingError(f"the column tokens of {self.path} must be a list of integers, got {tokens}.")

    def __len__(self) -> int:
        return self._length

    def ids(self) -> Iterator[str]:
        # a generator of its own: it does not disturb whoever reads items
        with open(self.path, "rb") as file:
            number = 0
            for batch in self._batches(file, READ_ROWS * 16, range(len(self._groups)), ["id"]):
                for value in _values(batch.column(0)):
                    number += 1
                    try:
                        yield identify(value)
                    except LabellingError:
                        yield f"{self.name}:{number}"

    def items(self, start: int, stop: int) -> Iterator[Item]:
        rows = self._rows_from(start)
        for number in range(start + 1, stop + 1):
            row = next(rows, None)
            if row is None:
                raise LabellingError(f"{self.path} is damaged: it holds fewer rows than it says; write it again.")
            self._position = number
            yield self._item(*row, number)
        if stop == self._length:
            self._close()

    def _item(self, identifier: Any, tokens: Any, number: int) -> Item:
        origin = self.origin

        def read(name: str) -> Item:
            if not tokens.is_valid or tokens.values.null_count:
                raise LabellingError("'tokens' must be a list of whole numbers, got null.")
            values = tokens.values.to_numpy(zero_copy_only=False)
            if len(values) and values.dtype.kind == "u" and values.max() > np.iinfo(np.int64).max:
                raise LabellingError("'tokens' must be a list of whole numbers below 2**63.")
            return Item(id=name, origin=origin, tokens=values.astype(np.int64))

        return read_item(f"{self.name}:{number}", origin, lambda: identifier, read)

    def _rows_from(self, start: int) -> Iterator[tuple[Any, Any]]:
        if self._rows is None or self._position != start:
            self._close()
            self._file = open(self.path, "rb")  # noqa: SIM115 (until the next call, or the last row)
            self._rows = self._read_from(self._file, start)
            self._position = start
        return self._rows

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._rows = None

    def _read_from(self, file: IO[bytes], start: int) -> Iterator[tuple[Any, Any]]:
        group, skip = 0, start
        while group < len(self._groups) and skip >= self._groups[group]:
            skip -= self._groups[group]
            group += 1
        for batch in self._batches(file, READ_ROWS, range(group, len(self._groups)), ["id", "tokens"]):
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            identifiers, tokens = _values(batch.column("id")), batch.column("tokens")
            for row in range(skip, batch.num_rows):
                yield identifiers[row], tokens[row]
            skip = 0

    def _batches(self, file: IO[bytes], rows: int, groups: range, columns: list[str]) -> Iterator[Any]:
        import pyarrow as pa

        self._unchanged.check(file)
        try:
            for batch in _parquet(file).iter_batches(rows, row_groups=list(groups), columns=columns):
                self._unchanged.check(file)
                yield batch
        except (pa.ArrowException, OSError) as error:
            # one that is overwritten looks damaged, too
            self._unchanged.check(file)
            raise LabellingError(f"{self.path} is damaged: {reason_of(error)}; copy it again.") from error


def _parquet(file: IO[bytes]) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file, memory_map=False)


def _values(column: Any) -> list[Any]:
    """Returns a column of ids as Python values, text as bytes: a single one that is not UTF-8 is no end of all."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return column.to_pylist()
