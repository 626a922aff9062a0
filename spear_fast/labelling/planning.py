"""The plan of a job: what is to be labelled, listed once and written down, so that no worker has to list it again.

`plan.json` says what the job is, its options and its sources; `plan.parquet` has a line for each row: its id, and where
it is. A worker reads the row groups that hold its own shards and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear_fast.labelling.errors import LabellingError, readable, reason_of
from spear_fast.labelling.files import read_json, write_atomically
from spear_fast.labelling.identity import differences, fingerprint
from spear_fast.labelling.items import Item, Source
from spear_fast.labelling.options import DECODING, FIXED, LabelOptions
from spear_fast.labelling.shards import Shard, plan_shards
from spear_fast.labelling.sources import Listing, Rows
from spear_fast.labelling.token_files import TokenLines, TokenParquet

PLAN_NAME = "plan.json"
ROWS_NAME = "plan.parquet"
PLAN_FORMAT = "spear_fast.plan/1"
FINGERPRINT_KEY = b"spear_fast.fingerprint"
# rows of a row group: what a worker reads at once, a few MB
GROUP_ROWS = 1 << 16

# audio: a whole path as the system has it, which need not be UTF-8. origin: what failed.jsonl names, where that is not
# the path. position: in bytes, of a row's line
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("audio", pa.binary()),
        pa.field("origin", pa.string()),
        pa.field("offset", pa.float64()),
        pa.field("duration", pa.float64()),
        pa.field("problem", pa.string()),
        pa.field("position", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class JobPlan:
    """A job as it was planned. rows: all of them, which can be read in parts. model: where it lay, None if unknown."""

    out: Path
    identity: dict[str, Any]
    options: LabelOptions
    rows: PlannedRows
    shards: list[Shard]
    model: str | None
    sizes: tuple[int, int]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    def check(self, identity: dict[str, Any]) -> None:
        """Raises LabellingError, with all that differs, when `identity` is that of another job."""
        clauses = differences(self.identity, identity)
        if clauses:
            raise LabellingError(
                f"{self.out} was planned for another job: {'; '.join(clauses)}. Label with the model and the kind of "
                "device that it was planned for, or plan again into another folder with --out."
            )


def write_plan(
    out: Path,
    listing: Listing,
    identity: dict[str, Any],
    options: LabelOptions,
    model: str | None,
    sizes: Sequence[int],
) -> JobPlan:
    """Writes the plan of a job into `out` and returns it. sizes: of the speech and the text vocabulary.

    Raises LabellingError when the disk refuses.
    """
    mark = fingerprint(identity)

    def write_rows(file: Any) -> None:
        schema = SCHEMA.with_metadata({FINGERPRINT_KEY: mark.encode()})
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for table in _tables(listing.sources):
                writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=GROUP_ROWS)

    write_atomically(out / ROWS_NAME, write_rows)
    record = {
        "format": PLAN_FORMAT,
        "fingerprint": mark,
        "rows": len(listing),
        "shards": len(plan_shards(len(listing), options.num_shards, options.rows_per_shard)),
        "model": model,
        "sizes": list(sizes),
        "options": _options_record(options),
        "sources": [_source_record(source) for source in listing.sources],
        "passed_over": listing.passed_over,
        "identity": identity,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_atomically(out / PLAN_NAME, lambda file: file.write(text.encode() + b"\n"))
    return read_plan(out)


def read_plan(out: Path) -> JobPlan:
    """Returns the plan in a folder. Raises LabellingError when there is none, or it is damaged."""
    path = out / PLAN_NAME
    if not path.exists():
        raise LabellingError(f"there is no {PLAN_NAME} in {out}; write one with: spear-fast plan SOURCE... --out {out}")
    try:
        record = read_json(path)
        options = record["options"]
        options = LabelOptions(**{**options, "decoding": _decoding(options["decoding"])})
        count, identity = record["rows"], record["identity"]
        table = _PlannedTable(out / ROWS_NAME, count, record["fingerprint"])
        rows = PlannedRows(record["sources"], identity["sources"], table, record["passed_over"])
        shards = plan_shards(count, options.num_shards, options.rows_per_shard)
        if fingerprint(identity) != record["fingerprint"] or len(rows) != count or len(shards) != record["shards"]:
            raise ValueError("its parts do not belong together")
        speech, text = record["sizes"]
        return JobPlan(out, identity, options, rows, shards, record["model"], (speech, text))
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
        raise LabellingError(f"the plan in {out} is not readable: {reason_of(error)}; plan it again.") from error


def _decoding(changes: dict[str, Any]) -> Any:
    settings: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in changes.items()}
    return replace(DECODING, **settings)


def _options_record(options: LabelOptions) -> dict[str, Any]:
    own = {each.name: getattr(options, each.name) for each in fields(options) if each.name != "decoding"}
    decoding = {each.name: getattr(options.decoding, each.name) for each in fields(DECODING) if each.name not in FIXED}
    return {**own, "decoding": {name: each for name, each in decoding.items() if each != getattr(DECODING, name)}}


def _source_record(source: Source) -> dict[str, Any]:
    """Returns what opens a source again: for token files, their path and what they were."""
    record: dict[str, Any] = {"name": source.name, "kind": source.kind, "rows": len(source), "origin": source.origin}
    if isinstance(source, (TokenLines, TokenParquet)):
        state = source.path.stat()
        record |= {"file": type(source).__name__, "path": os.fsencode(source.path.absolute()).hex()}
        record |= {"bytes": state.st_size, "mtime": int(state.st_mtime)}
    return record


def _tables(sources: Sequence[Source]) -> Iterator[pa.Table]:
    """Yields the rows of all sources, a row group's worth at a time."""
    rows: list[tuple[Any, ...]] = []
    for source in sources:
        for row in _lines(source):
            rows.append(row)
            if len(rows) == GROUP_ROWS:
                yield _table(rows)
                rows = []
    if rows:
        yield _table(rows)


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )


def _lines(source: Source) -> Iterator[tuple[Any, ...]]:
    if isinstance(source, TokenLines):
        for identifier, position in zip(source.ids(), source.positions, strict=True):
            yield identifier, None, None, None, None, None, position
        return
    if isinstance(source, TokenParquet):
        for identifier in source.ids():
            yield identifier, None, None, None, None, None, None
        return
    for item in source.items(0, len(source)):
        audio = None if item.audio is None else item.audio.absolute()
        origin = None if readable(str(audio)) == item.origin else item.origin
        path = None if audio is None else os.fsencode(audio)
        yield item.id, path, origin, item.offset, item.duration, item.problem, None


class _PlannedTable:
    """`plan.parquet`, read a row group at a time; the last one is kept."""

    def __init__(self, path: Path, rows: int, mark: str) -> None:
        self._path = path
        with open(path, "rb") as file:
            self._metadata = pq.read_metadata(file)
        if self._metadata.num_rows != rows or self._metadata.metadata.get(FINGERPRINT_KEY, b"").decode() != mark:
            raise ValueError(f"{path.name} is of another plan than {PLAN_NAME}")
        sizes = [self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups)]
        self._edges = np.cumsum([0, *sizes])
        self._kept: tuple[int, pa.Table] | None = None

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yields rows `start` to `stop - 1`."""
        while start < stop:
            group = int(np.searchsorted(self._edges, start, side="right")) - 1
            first, upto = int(self._edges[group]), min(stop, int(self._edges[group + 1]))
            yield from self._group(group).slice(start - first, upto - start).to_pylist()
            start = upto

    def _group(self, group: int) -> pa.Table:
        kept = self._kept
        if kept is None or kept[0] != group:
            with open(self._path, "rb") as file:
                kept = group, pq.ParquetFile(file, metadata=self._metadata, memory_map=False).read_row_group(group)
            self._kept = kept
        return kept[1]


class _Planned:
    """A source of a plan: rows of audio as they were listed, or of a token file, which is opened when it is needed."""

    def __init__(self, record: dict[str, Any], table: _PlannedTable, start: int) -> None:
        self.name, self.kind, self._rows = record["name"], record["kind"], record["rows"]
        self.passed_over: dict[str, int] = {}
        self.origin = record["origin"]
        self._record, self._table, self._start = record, table, start
        self._file: TokenLines | TokenParquet | None = None

    def __len__(self) -> int:
        return self._rows

    def ids(self) -> Iterator[str]:
        return (row["id"] for row in self._read(0, self._rows))

    def _read(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        return self._table.read(self._start + start, self._start + stop)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        if self.kind != "tokens":
            return map(self._item, self._read(start, stop))
        source = self._open()
        if isinstance(source, TokenLines):
            return source.items_at([row["position"] for row in self._read(start, stop)], start)
        return source.items(start, stop)

    def _item(self, row: dict[str, Any]) -> Item:
        audio = None if row["audio"] is None else Path(os.fsdecode(row["audio"]))
        origin = readable(str(audio)) if row["origin"] is None else row["origin"]
        segment = {name: row[name] for name in ("problem", "offset", "duration")}
        return Item(row["id"], origin, audio, **segment)

    def _open(self) -> TokenLines | TokenParquet:
        if self._file is not None:
            return self._file
        path = Path(os.fsdecode(bytes.fromhex(self._record["path"])))
        try:
            state = path.stat()
        except OSError as error:
            raise LabellingError(f"cannot read the source {path}: {reason_of(error)}.") from error
        # whole seconds: what copies keep
        if (state.st_size, int(state.st_mtime)) != (self._record["bytes"], self._record["mtime"]):
            raise LabellingError(f"{path} has changed since it was planned; plan again into another folder with --out.")
        lines = self._record["file"] == "TokenLines"
        self._file = TokenLines(path, listed=False) if lines else TokenParquet(path)
        self._file.origin = self.origin
        return self._file


class PlannedRows(Rows):
    """All rows of a plan. Nothing is listed: a part costs what it takes to read that part."""

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        identity: list[dict[str, Any]],
        table: _PlannedTable,
        passed_over: dict[str, int],
    ) -> None:
        starts = np.cumsum([0, *(record["rows"] for record in records)]).tolist()
        super().__init__([_Planned(record, table, start) for record, start in zip(records, starts[:-1], strict=True)])
        self._identity, self._passed_over, self._table = identity, passed_over, table

    @property
    def passed_over(self) -> dict[str, int]:
        return self._passed_over

    def identity(self) -> list[dict[str, Any]]:
        """Returns what the listing of the plan said of its sources."""
        return self._identity

    def ids(self, shard: Shard) -> list[str]:
        """Returns the ids of a shard's rows, in order."""
        return [row["id"] for row in self._table.read(shard.start, shard.stop)]
