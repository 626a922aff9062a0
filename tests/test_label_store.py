"""The output folder: whole files or none, one job in a folder, the narrowest types."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelling_jobs import read_failed, read_rows

from spear_fast.labelling import files
from spear_fast.labelling.errors import LabellingError
from spear_fast.labelling.files import FolderLock, make_folder, write_atomically
from spear_fast.labelling.identity import FORMAT, differences
from spear_fast.labelling.label_files import LabelRow, integer_type, label_schema, read_labels
from spear_fast.labelling.shards import plan_shards
from spear_fast.labelling.store import LabelStore, Totals

IDENTITY = {"format": FORMAT, "options": {"beam_size": 4}, "sources": [{"name": "t.jsonl", "ids": "ab"}]}


def row(number, **changes):
    fields = dict(text="hé", score=-0.5, mean_logprob=-0.25, finished=True, flags=["empty"])
    return LabelRow(f"r{number}", np.arange(number), np.array([511, 0]), **{**fields, **changes})


def open_store(out, identity=IDENTITY, rows=4):
    out.mkdir(exist_ok=True)
    store = LabelStore(out, identity, plan_shards(rows, 2, 1), label_schema(500, 512))
    store.open({"started": "now"})
    return store


def test_the_narrowest_integers_that_hold_the_vocabulary():
    kinds = {128: pa.int8(), 129: pa.uint8(), 256: pa.uint8(), 257: pa.int16(), 32768: pa.int16(), 32769: pa.uint16()}
    kinds |= {65536: pa.uint16(), 65537: pa.int32(), 2**31 + 1: pa.int64()}
    assert {size: integer_type(size) for size in kinds} == kinds


def test_a_shard_reads_back_as_it_was_committed(tmp_path):
    store = open_store(tmp_path)
    rows = [row(0), row(3, text=None, score=None, mean_logprob=None, finished=None, flags=[])]
    store.commit(store.shards[0], rows, [], Totals(rows=2))
    table = pq.read_table(tmp_path / "data" / "labels-00000-of-00002.parquet")
    assert [str(kind) for kind in table.schema.types] == [
        "string",
        "list<element: int16>",
        "list<element: int16>",
        "string",
        "float",
        "float",
        "int32",
        "int32",
        "bool",
        "list<element: string>",
    ]
    assert table.to_pylist() == [
        dict(id="r0", source=[], target=[511, 0], text="hé", score=-0.5, mean_logprob=-0.25)
        | dict(num_source=0, num_target=2, finished=True, flags=["empty"]),
        dict(id="r3", source=[0, 1, 2], target=[511, 0], text=None, score=None, mean_logprob=None)
        | dict(num_source=3, num_target=2, finished=None, flags=[]),
    ]
    back = list(read_labels(tmp_path))
    assert [each.id for each in back] == ["r0", "r3"]
    assert back[1].source.tolist() == [0, 1, 2]


def test_an_opened_folder_goes_on_where_it_was(tmp_path):
    store = open_store(tmp_path)
    failure = {"id": "bad", "source": "x.wav", "reason": "is empty."}
    store.commit(store.shards[1], [row(1)], [failure], Totals(rows=1, failed=1))
    (tmp_path / "data" / ".labels-00000-of-00002.parquet.tmp").write_bytes(b"half")
    (tmp_path / "failed.jsonl").unlink()
    (tmp_path / ".labels-00001-of-00002.parquet.journal").write_bytes(b"of a committed shard")

    again = open_store(tmp_path)
    assert list(again.committed) == [1]
    assert again.totals() == Totals(rows=1, failed=1)
    assert read_failed(tmp_path) == [failure]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [None, 1]
    assert not manifest["complete"]
    assert len(manifest["runs"]) == 2
    assert not list(tmp_path.rglob(".*.tmp"))
    assert not list(tmp_path.rglob(".*.journal"))


def test_a_damaged_shard_is_not_taken_for_done(tmp_path):
    store = open_store(tmp_path)
    for shard in store.shards:
        store.commit(shard, [row(1)], [], Totals(rows=1))
    path = tmp_path / "data" / store.shards[0].name
    path.write_bytes(path.read_bytes()[:-20])
    again = open_store(tmp_path)
    assert list(again.committed) == [1]
    assert again.damaged == [store.shards[0].name]


def test_failed_rows_of_a_shard_committed_again_are_replaced(tmp_path):
    store = open_store(tmp_path)
    failures = [{"id": name, "source": "s", "reason": "r"} for name in ("a", "b")]
    store.commit(store.shards[0], [], failures[:1], Totals(failed=1))
    store.commit(store.shards[1], [], failures[1:], Totals(failed=1))
    assert read_failed(tmp_path) == failures
    store.commit(store.shards[0], [row(1)], [], Totals(rows=1))
    assert read_failed(tmp_path) == failures[1:]


def test_another_job_is_told_what_differs(tmp_path):
    open_store(tmp_path)
    other = {**IDENTITY, "options": {"beam_size": 8, "dtype": "float16"}}
    with pytest.raises(LabellingError) as caught:
        open_store(tmp_path, other)
    text = str(caught.value)
    assert 'options.beam_size was 4 and is 8; options.dtype was absent and is "float16"' in text
    assert "--out" in text


def test_differences_reach_into_lists():
    before = {"sources": [{"ids": "a" * 64}, {"ids": "b"}]}
    assert differences(before, {"sources": [{"ids": "c" * 64}]}) == [
        "sources.1.ids was aaaaaaaaaaaa… and is cccccccccccc…",
        'sources.2.ids was "b" and is absent',
    ]
    assert differences(before, before) == []


def test_labels_without_a_manifest_are_left_alone(tmp_path):
    (tmp_path / "labels-00000-of-00001.parquet").write_bytes(b"somebody's")
    with pytest.raises(LabellingError, match=r"but no manifest\.json"):
        open_store(tmp_path)
    assert (tmp_path / "labels-00000-of-00001.parquet").read_bytes() == b"somebody's"


def test_a_folder_of_earlier_versions_is_read_and_resumed_where_its_shards_lie(tmp_path):
    store = open_store(tmp_path)
    store.commit(store.shards[0], [row(1)], [], Totals(rows=1))
    name = store.shards[0].name
    (tmp_path / "data" / name).rename(tmp_path / name)
    again = open_store(tmp_path)
    assert list(again.committed) == [0]
    again.commit(again.shards[1], [row(2)], [], Totals(rows=1))
    again.finish()
    assert [each.id for each in read_labels(tmp_path)] == ["r1", "r2"]
    assert not list((tmp_path / "data").iterdir())
    assert "path: labels-*.parquet" in (tmp_path / "README.md").read_text()


def test_readers_take_the_folder_of_data_whole(tmp_path):
    store = open_store(tmp_path)
    for shard in store.shards:
        store.commit(shard, [row(shard.index)], [], Totals(rows=1))
    (tmp_path / "data" / f".{store.shards[0].name}.tmp").write_bytes(b"half")
    assert pq.read_table(tmp_path / "data").column("id").to_pylist() == ["r0", "r1"]
    assert "path: data/labels-*.parquet" in (tmp_path / "README.md").read_text()


def test_a_broken_manifest_is_an_error(tmp_path):
    (tmp_path / "manifest.json").write_text('{"identity": ')
    with pytest.raises(LabellingError, match=r"manifest\.json is not readable"):
        open_store(tmp_path)


@pytest.mark.parametrize("when", ["write", "sync", "rename"])
def test_a_full_disk_leaves_no_partial_shard(tmp_path, monkeypatch, when):
    store = open_store(tmp_path)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = {"write": (pq.ParquetWriter, "write_table"), "sync": (files.os, "fsync"), "rename": (files.os, "replace")}[
        when
    ]
    with monkeypatch.context() as patch:
        patch.setattr(*place, full)
        with pytest.raises(LabellingError, match=r"cannot write .*No space left on device; free or mend the disk"):
            store.commit(store.shards[0], [row(1)], [], Totals(rows=1))
    assert not list(tmp_path.rglob("*.parquet"))
    assert not list(tmp_path.rglob(".*.tmp"))
    store.commit(store.shards[0], [row(1)], [], Totals(rows=1))
    assert [each["id"] for each in read_rows(tmp_path)] == ["r1"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fails(file):
        file.write(b"new")
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(LabellingError, match="Input/output error"):
        write_atomically(path, fails)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", "/proc/nowhere"):
        with pytest.raises(LabellingError, match="cannot write to the output folder"):
            make_folder(type(tmp_path)(folder))


HOLD = """
import sys, time, pathlib
from spear_fast.labelling.files import FolderLock
with FolderLock(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_dead_one_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(LabellingError, match=f"is in use by process {holder.pid} on "), FolderLock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / ".lock").exists()
    with FolderLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
