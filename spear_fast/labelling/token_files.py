"""Token files: Parquet or JSON lines with `id` and `tokens`."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spear_fast.labelling.errors import LabellingError, reason_of
from spear_fast.labelling.items import Item, identify

# rows decoded from a Parquet file at once
READ_ROWS = 1024


class TokenLines:
    """JSON lines `{"id": …, "tokens": […]}`; ids and line offsets are kept, tokens are read when asked for."""

    kind = "tokens"

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        self._offsets = array("q")
        self._ids: list[str] = []
        with open(path, "rb") as file:
            offset = 0
            for line in file:
                if line.strip():
                    self._offsets.append(offset)
                    self._ids.append(self._parse(line, len(self._offsets)).id)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> Iterator[str]:
        return iter(self._ids)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        with open(self._path, "rb") as file:
            for index in range(start, stop):
                file.seek(self._offsets[index])
                yield self._parse(file.readline(), index + 1)

    def _parse(self, line: bytes, number: int) -> Item:
        fallback = f"{self.name}:{number}"
        origin = str(self._path)
        try:
            row = json.loads(line)
        except ValueError:
            return Item(id=fallback, origin=origin, problem="the line is not JSON.")
        identifier, problem = identify(row.get("id") if isinstance(row, dict) else None, fallback)
        if problem is not None:
            return Item(id=identifier, origin=origin, problem=problem)
        tokens = as_tokens(row.get("tokens"))
        if tokens is None:
            return Item(id=identifier, origin=origin, problem="'tokens' must be a list of whole numbers.")
        return Item(id=identifier, origin=origin, tokens=tokens)


def as_tokens(value: Any) -> np.ndarray | None:
    """Returns a list of whole numbers as int64 `[n]`, None for anything else (true and 1.0 are no token ids)."""
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        return None
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        return None


class TokenParquet:
    """A Parquet file with `id: string` and `tokens: list<int>`, read forwards from one open file."""

    kind = "tokens"

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.name = path.name
        self._path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise LabellingError(
                f"{path} is not a readable Parquet file, it may be truncated: {reason_of(error)}."
            ) from error
        schema = self._file.schema_arrow
        columns = {name: schema.field(name).type for name in schema.names}
        if "id" not in columns or "tokens" not in columns:
            raise LabellingError(f"{path} must have the columns id and tokens, got {', '.join(columns) or 'none'}.")
        kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        tokens = columns["tokens"]
        if not any(is_kind(tokens) for is_kind in kinds) or not pa.types.is_integer(tokens.value_type):
            raise LabellingError(f"the column tokens of {path} must be a list of integers, got {tokens}.")
        self._rows: Iterator[tuple[Any, Any]] | None = None
        self._position = 0

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def ids(self) -> Iterator[str]:
        number = 0
        for batch in self._batches(READ_ROWS * 16, range(self._file.num_row_groups), ["id"]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield identify(value, f"{self.name}:{number}")[0]

    def items(self, start: int, stop: int) -> Iterator[Item]:
        rows = self._rows_from(start)
        for number in range(start + 1, stop + 1):
            identifier, tokens = next(rows)
            self._position = number
            yield self._item(identifier, tokens, number)

    def _item(self, identifier: Any, tokens: Any, number: int) -> Item:
        name, problem = identify(identifier, f"{self.name}:{number}")
        origin = str(self._path)
        if problem is not None:
            return Item(id=name, origin=origin, problem=problem)
        if tokens.as_py() is None or tokens.values.null_count:
            return Item(id=name, origin=origin, problem="'tokens' must be a list of whole numbers, got null.")
        return Item(id=name, origin=origin, tokens=tokens.values.to_numpy(zero_copy_only=False).astype(np.int64))

    def _rows_from(self, start: int) -> Iterator[tuple[Any, Any]]:
        if self._rows is None or self._position != start:
            self._rows = self._read_from(start)
            self._position = start
        return self._rows

    def _read_from(self, start: int) -> Iterator[tuple[Any, Any]]:
        group, skip = 0, start
        while group < self._file.num_row_groups and skip >= self._file.metadata.row_group(group).num_rows:
            skip -= self._file.metadata.row_group(group).num_rows
            group += 1
        for batch in self._batches(READ_ROWS, range(group, self._file.num_row_groups), ["id", "tokens"]):
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            identifiers, tokens = batch.column("id").to_pylist(), batch.column("tokens")
            for row in range(skip, batch.num_rows):
                yield identifiers[row], tokens[row]
            skip = 0

    def _batches(self, rows: int, groups: range, columns: list[str]) -> Iterator[Any]:
        import pyarrow as pa

        try:
            yield from self._file.iter_batches(rows, row_groups=list(groups), columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise LabellingError(f"{self._path} is damaged: {reason_of(error)}; copy it again.") from error
