"""The output folder: one Parquet file per shard, a manifest, the failed rows, a card; committed whole or not at all.

A shard's file is the only truth about it: its metadata carries the job's fingerprint, its failed rows and its totals,
so that a single rename commits everything. manifest.json and failed.jsonl are drawn from the shards at each start.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear_fast.labelling.card import card_text
from spear_fast.labelling.errors import LabellingError, reason_of
from spear_fast.labelling.files import write_atomically, write_error
from spear_fast.labelling.identity import differences, fingerprint
from spear_fast.labelling.journal import journal_path
from spear_fast.labelling.plan import Shard

MANIFEST_NAME = "manifest.json"
FAILED_NAME = "failed.jsonl"
CARD_NAME = "README.md"
METADATA_KEY = b"spear_fast"


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled utterance as it is stored. source, target: `[n]`, integer, without pads and end-of-sequence."""

    id: str
    source: np.ndarray
    target: np.ndarray
    text: str | None
    score: float | None
    mean_logprob: float | None
    finished: bool | None
    flags: Sequence[str] = ()


@dataclass(slots=True)
class Totals:
    """Sums over rows. audio_seconds counts rows whose length in seconds is known; confidence sums exp(mean_logprob)."""

    rows: int = 0
    failed: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    unfinished: int = 0
    audio_seconds: float = 0.0
    confidence: float = 0.0

    def add(self, other: Totals) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True, slots=True)
class Committed:
    """A finished shard."""

    totals: Totals
    failures: list[dict[str, str]]


def integer_type(vocabulary: int) -> pa.DataType:
    """Returns the narrowest Arrow integer type that holds ids 0 to `vocabulary - 1`, signed where both fit."""
    for dtype in (pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.int64()):
        if vocabulary - 1 <= np.iinfo(dtype.to_pandas_dtype()).max:
            return dtype
    raise LabellingError(f"a vocabulary must have less than 2**63 ids, got {vocabulary}.")


def label_schema(speech_vocabulary: int, text_vocabulary: int) -> pa.Schema:
    """Returns the columns of a shard."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("source", pa.list_(integer_type(speech_vocabulary)), nullable=False),
            pa.field("target", pa.list_(integer_type(text_vocabulary)), nullable=False),
            pa.field("text", pa.string()),
            pa.field("score", pa.float32()),
            pa.field("mean_logprob", pa.float32()),
            pa.field("num_source", pa.int32(), nullable=False),
            pa.field("num_target", pa.int32(), nullable=False),
            pa.field("finished", pa.bool_()),
            pa.field("flags", pa.list_(pa.string()), nullable=False),
        ]
    )


def _lists(rows: Iterable[np.ndarray], dtype: pa.DataType) -> pa.Array:
    rows = list(rows)
    ends = np.cumsum([0, *map(len, rows)])
    values = np.concatenate([np.zeros(0, np.int64), *rows]).astype(dtype.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values, dtype))


def _table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    columns = {
        "source": _lists((row.source for row in rows), schema.field("source").type.value_type),
        "target": _lists((row.target for row in rows), schema.field("target").type.value_type),
        "num_source": pa.array([len(row.source) for row in rows], pa.int32()),
        "num_target": pa.array([len(row.target) for row in rows], pa.int32()),
        "flags": pa.array([list(row.flags) for row in rows], pa.list_(pa.string())),
    }
    for name in ("id", "text", "score", "mean_logprob", "finished"):
        columns[name] = pa.array([getattr(row, name) for row in rows], schema.field(name).type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _write_parquet(table: pa.Table, file: IO[bytes]) -> None:
    with pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
        # datasets takes its batch size from the first row group and fails on one without rows
        if len(table):
            writer.write_table(table)


class LabelStore:
    """The shards of one job in one folder, which the caller has locked."""

    def __init__(self, out: Path, identity: dict[str, Any], shards: Sequence[Shard], schema: pa.Schema) -> None:
        self.out = out
        self.identity = identity
        self.fingerprint = fingerprint(identity)
        self.shards = list(shards)
        self.committed: dict[int, Committed] = {}
        self.damaged: list[str] = []
        self._schema = schema
        self._runs: list[dict[str, Any]] = []

    def open(self, run: dict[str, Any]) -> None:
        """Takes up what the folder holds: committed shards stay, temporary files go. `run` joins the manifest.

        Raises LabellingError when the folder holds the labels of another job, with everything that differs.
        """
        self._check_manifest()
        self._remove_stale()
        for shard in self.shards:
            found = self._read_committed(shard)
            if found is not None:
                self.committed[shard.index] = found
                journal_path(self.out, shard).unlink(missing_ok=True)
        self._runs.append(run)
        self.write_manifest()
        self._write_failed()

    def _check_manifest(self) -> None:
        path = self.out / MANIFEST_NAME
        if not path.exists():
            strangers = sorted(self.out.glob("labels-*.parquet"))
            if strangers:
                raise LabellingError(
                    f"{self.out} holds {strangers[0].name} but no {MANIFEST_NAME}, so its model is not known; "
                    "give another folder with --out."
                )
            return
        try:
            manifest = json.loads(path.read_bytes())
            before, self._runs = manifest["identity"], list(manifest["runs"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise LabellingError(f"{path} is not readable: {reason_of(error)}; give another --out.") from error
        if manifest.get("fingerprint") != self.fingerprint:
            clauses = differences(before, self.identity) or ["the manifest was edited"]
            raise LabellingError(
                f"{self.out} holds the labels of another job: {'; '.join(clauses)}. Run the command that it was begun "
                "with, or give another folder with --out."
            )

    def _remove_stale(self) -> None:
        for path in self.out.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def _read_committed(self, shard: Shard) -> Committed | None:
        path = self.out / shard.name
        if not path.exists():
            return None
        try:
            metadata = pq.read_metadata(path)
            record = json.loads(metadata.metadata[METADATA_KEY])
            totals = Totals(**record["totals"])
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
            self.damaged.append(shard.name)
            return None
        if record["fingerprint"] != self.fingerprint or totals.rows != metadata.num_rows:
            self.damaged.append(shard.name)
            return None
        return Committed(totals, record["failures"])

    def commit(self, shard: Shard, rows: Sequence[Row], failures: Sequence[dict[str, str]], totals: Totals) -> None:
        """Writes a shard: rows, failed rows and totals with one rename. Raises LabellingError when the disk refuses."""
        before = self.committed.get(shard.index)
        self._write_shard(shard, rows, failures, totals)
        self.committed[shard.index] = Committed(totals, list(failures))
        journal_path(self.out, shard).unlink(missing_ok=True)
        if before is not None and before.failures:
            self._write_failed()
        elif failures:
            self._append_failed(failures)

    def _write_shard(
        self, shard: Shard, rows: Sequence[Row], failures: Sequence[dict[str, str]], totals: Totals
    ) -> None:
        record = {"fingerprint": self.fingerprint, "totals": asdict(totals), "failures": list(failures)}
        schema = self._schema.with_metadata({METADATA_KEY: json.dumps(record)})
        table = _table(rows, schema)
        write_atomically(self.out / shard.name, lambda file: _write_parquet(table, file))

    def write_manifest(self) -> None:
        """Replaces manifest.json and the card by the present state."""
        total = self.totals()
        manifest = {
            "format": self.identity["format"],
            "fingerprint": self.fingerprint,
            "complete": len(self.committed) == len(self.shards),
            "totals": asdict(total),
            "shards": [self._manifest_entry(shard) for shard in self.shards],
            "identity": self.identity,
            "runs": self._runs,
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        write_atomically(self.out / MANIFEST_NAME, lambda file: file.write(text.encode() + b"\n"))
        card = card_text(manifest)
        write_atomically(self.out / CARD_NAME, lambda file: file.write(card.encode()))

    def finish(self) -> None:
        """Brings manifest, card and failed rows up to date at the end of a run."""
        self._write_failed()
        self.write_manifest()

    def _manifest_entry(self, shard: Shard) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": shard.name, "planned": len(shard), "rows": None, "failed": None}
        if shard.index in self.committed:
            totals = self.committed[shard.index].totals
            entry.update(rows=totals.rows, failed=totals.failed)
        return entry

    def totals(self) -> Totals:
        """Returns the sums over all committed shards."""
        total = Totals()
        for committed in self.committed.values():
            total.add(committed.totals)
        return total

    def failures(self) -> Iterator[dict[str, str]]:
        for index in sorted(self.committed):
            yield from self.committed[index].failures

    def _write_failed(self) -> None:
        path = self.out / FAILED_NAME
        failures = list(self.failures())
        if failures:
            write_atomically(path, lambda file: _dump_lines(file, failures))
            return
        path.unlink(missing_ok=True)

    def _append_failed(self, failures: Sequence[dict[str, str]]) -> None:
        path = self.out / FAILED_NAME
        try:
            with open(path, "ab") as file:
                _dump_lines(file, failures)
        except OSError as error:
            raise write_error(path, error) from error


def _dump_lines(file: IO[bytes], records: Iterable[dict[str, str]]) -> None:
    file.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def read_labels(folder: str | Path) -> Iterator[Row]:
    """Yields the labelled rows of a folder in the order of its source.

    Raises LabellingError when it holds no labels, or they are damaged.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("labels-*.parquet"))
    if not paths:
        raise LabellingError(f"there are no labels in {folder}; wanted a folder of spear-fast label or import-pt.")
    for path in paths:
        try:
            batches = list(pq.ParquetFile(path).iter_batches())
        except (pa.ArrowException, OSError) as error:
            raise LabellingError(f"{path} is damaged: {reason_of(error)}; label it again.") from error
        for row in (row for batch in batches for row in batch.to_pylist()):
            del row["num_source"], row["num_target"]
            row["source"], row["target"] = (np.array(row[name], dtype=np.int64) for name in ("source", "target"))
            yield Row(**row)
