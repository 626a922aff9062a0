"""The output folder: one Parquet file per shard, a manifest, the failed rows, a card; committed whole or not at all.

A shard's file is the only truth about it: its footer carries the job's fingerprint, which shard it is, its failed rows
and its totals, so that a single rename commits everything. manifest.json and failed.jsonl are drawn from the shards at
each start.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from spear_fast.labelling.errors import LabellingError, reason_of
from spear_fast.labelling.files import make_folder, open_regular, read_json, write_atomically, write_error
from spear_fast.labelling.identity import differences, fingerprint
from spear_fast.labelling.items import Item, content_of
from spear_fast.labelling.journal import Journal, journal_path
from spear_fast.labelling.label_files import (
    PATTERN,
    LabelRow,
    card_text,
    data_folder,
    label_paths,
    read_record,
    shard_bytes,
)
from spear_fast.labelling.shards import Shard

MANIFEST_NAME = "manifest.json"
FAILED_NAME = "failed.jsonl"
CARD_NAME = "README.md"


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
    """A finished shard. contents: 8 bytes for each of its rows, of what its source was; None in folders of old."""

    totals: Totals
    failures: list[dict[str, str]]
    contents: bytes | None = None


class LabelStore:
    """The shards of one job in one folder, which the caller has locked."""

    def __init__(self, out: Path, identity: dict[str, Any], shards: Sequence[Shard], schema: pa.Schema) -> None:
        self.out = out
        self.data = data_folder(out)
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
        self.check()
        self._remove_stale()
        self._read_shards()
        for index in self.committed:
            journal_path(self.out, self.shards[index]).unlink(missing_ok=True)
        self._runs.append(run)
        self.write_manifest()
        self._write_failed()

    def _read_shards(self) -> None:
        for shard in self.shards:
            found = self._read_committed(shard)
            if found is not None:
                self.committed[shard.index] = found

    def check(self) -> None:
        """Raises LabellingError when the folder holds the labels of another job, with everything that differs."""
        path = self.out / MANIFEST_NAME
        if not path.exists() and not path.is_symlink():
            strangers = label_paths(self.out)
            if strangers:
                raise LabellingError(
                    f"{self.out} holds {strangers[0].name} but no {MANIFEST_NAME}, so its model is not known; "
                    "give another folder with --out."
                )
            return
        try:
            manifest = read_json(path)
            before, self._runs = manifest["identity"], list(manifest["runs"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise LabellingError(f"{path} is not readable: {reason_of(error)}; give another --out.") from error
        if manifest.get("fingerprint") != self.fingerprint:
            clauses = differences(before, self.identity) or ["the manifest was edited"]
            remedy = "Run the command that it was begun with, or give another folder with --out."
            if all(clause.startswith("sources.") for clause in clauses):
                remedy = "Label rows that were added into a folder of their own, with --out."
            raise LabellingError(f"{self.out} holds the labels of another job: {'; '.join(clauses)}. {remedy}")

    def _remove_stale(self) -> None:
        for folder in {self.out, self.data}:
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def _read_committed(self, shard: Shard) -> Committed | None:
        path = self.data / shard.name
        if not path.exists():
            return None
        try:
            record = read_record(path)
            if record["fingerprint"] != self.fingerprint or record.get("index", shard.index) != shard.index:
                raise ValueError("it is another shard, or of another job")
            contents = base64.b64decode(record["contents"]) if "contents" in record else None
            return Committed(Totals(**record["totals"]), record["failures"], contents)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError):
            self.damaged.append(shard.name)
            return None

    def changed(self, items: Callable[[int, int], Iterable[Item]]) -> list[tuple[int, str]]:
        """Returns shard and id of the rows whose source is not what it was when they were written.

        Rows that failed may be mended, and files that are gone need not come back.
        items: returns the rows `start` to `stop - 1`.
        """
        changed = []
        for shard in self.shards:
            committed = self.committed.get(shard.index)
            if committed is None or committed.contents is None:
                continue
            failed = {failure["id"] for failure in committed.failures}
            written = (item for item in items(shard.start, shard.stop) if item.id not in failed)
            for number, item in enumerate(written):
                content = content_of(item)
                if content is not None and content != committed.contents[8 * number : 8 * number + 8]:
                    changed.append((shard.index, item.id))
        return changed

    def journal(self, shard: Shard) -> Journal:
        """Returns the journal of a shard, not yet opened."""
        return Journal(journal_path(self.out, shard), self.fingerprint)

    def commit(
        self,
        shard: Shard,
        rows: Sequence[LabelRow],
        failures: Sequence[dict[str, str]],
        totals: Totals,
        contents: bytes | None = None,
    ) -> None:
        """Writes a shard: rows, failed rows and totals with one rename. Raises LabellingError when the disk refuses.

        contents: 8 bytes for each row, of what its source was.
        """
        before = self.committed.get(shard.index)
        record = {"fingerprint": self.fingerprint, "index": shard.index, "totals": asdict(totals)}
        record |= {"failures": list(failures)}
        if contents is not None:
            record |= {"contents": base64.b64encode(contents).decode()}
        make_folder(self.data)
        write_atomically(self.data / shard.name, lambda file: file.write(shard_bytes(rows, self._schema, record)))
        self.committed[shard.index] = Committed(totals, list(failures), contents)
        journal_path(self.out, shard).unlink(missing_ok=True)
        if before is not None and before.failures:
            self._write_failed()
        elif failures:
            self._append_failed(failures)

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
        card = card_text(manifest, (self.data / PATTERN).relative_to(self.out).as_posix())
        write_atomically(self.out / CARD_NAME, lambda file: file.write(card.encode()))

    def finish(self) -> None:
        """Brings manifest, card and failed rows up to date at the end of a run.

        Raises LabellingError when a shard that was written is no longer there.
        """
        self._check_present()
        self._write_failed()
        self.write_manifest()

    def _check_present(self) -> None:
        gone = [shard.name for shard in self.shards if shard.index in self.committed and not self._has(shard)]
        if gone:
            raise LabellingError(
                f"{self.out} no longer holds {gone[0]}{f' and {len(gone) - 1} more' if len(gone) > 1 else ''}: the "
                "folder was moved or emptied while it was written to. Put it back and run the same command again."
            )

    def _has(self, shard: Shard) -> bool:
        return (self.data / shard.name).is_file()

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
            with open(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
                _dump_lines(file, failures)
        except OSError as error:
            raise write_error(path, error) from error


def changed_error(out: Path, names: Sequence[str]) -> LabellingError:
    """Returns the sentence for rows whose source has changed since they were written."""
    first = ", ".join(map(repr, names[:5]))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return LabellingError(
        f"the source of {len(names)} row{'s' if len(names) > 1 else ''} has changed since it was labelled into {out}: "
        f"{first}{more}. Put it back, add --relabel-changed to write the shards again, or give another folder with "
        "--out."
    )


def _dump_lines(file: IO[bytes], records: Iterable[dict[str, str]]) -> None:
    file.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
