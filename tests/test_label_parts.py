"""A job that many workers share: planned once, whatever is killed or done twice, the files are those of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelling_jobs import random_rows, read_failed, read_rows, shard_bytes, tiny_model, write_audio, write_lines

from spear_fast import cli
from spear_fast.labelling import LabellingError, LabelOptions, finish, label, label_part, plan, read_labels
from spear_fast.labelling.items import Item
from spear_fast.labelling.label_files import label_schema
from spear_fast.labelling.parts import PartStore, part_of
from spear_fast.labelling.planning import GROUP_ROWS, read_plan
from spear_fast.labelling.sources import Listing, open_sources

OPTIONS = LabelOptions(max_length=8, rows_per_shard=10, batch_tokens=1024, max_source_tokens=40)
OTHER = LabelOptions(beam_size=2, max_length=8, rows_per_shard=10, batch_tokens=1024, max_source_tokens=40)


def sources_of_all_kinds(folder):
    """Returns sources with a bad row in each: JSON lines, Parquet, a folder of audio, a manifest."""
    rows = random_rows(60)
    rows[7]["tokens"] = [1] * 41
    lines = write_lines(folder / "t.jsonl", rows)
    with open(lines, "a") as file:
        file.write("no json\n")
    more = [{"id": f"p{row['id']}", "tokens": row["tokens"]} for row in random_rows(25, seed=3)]
    pq.write_table(pa.Table.from_pylist(more), folder / "t.parquet", row_group_size=7)
    for number in range(3):
        write_audio(folder / "audio" / f"a{number}.wav", 0.4, seed=number)
    (folder / "audio" / "bad.wav").write_bytes(b"RIFF")
    manifest = [{"id": "m0", "audio": "audio/a0.wav", "offset": 0.1, "duration": 0.2}, {"id": "m1"}]
    return [lines, folder / "t.parquet", folder / "audio", write_lines(folder / "m.jsonl", manifest)]


def described(items):
    """Returns what labels and failures depend on."""
    return [
        (e.id, e.origin, e.problem, e.offset, e.duration, e.audio, e.tokens is None or e.tokens.tolist()) for e in items
    ]


def test_a_plan_gives_the_rows_that_the_sources_have_without_listing_them(tmp_path, monkeypatch):
    sources = sources_of_all_kinds(tmp_path)
    listing = open_sources(sources)
    plan(sources, tiny_model(speech=True), tmp_path / "out", OPTIONS)
    monkeypatch.setattr(Listing, "__init__", lambda *_: pytest.fail("a worker listed the sources"))
    planned = read_plan(tmp_path / "out")
    assert planned.options == OPTIONS
    assert described(planned.rows.items(0, len(planned.rows))) == described(listing.items(0, len(listing)))
    for shard in reversed(planned.shards):
        items = list(listing.items(shard.start, shard.stop))
        assert described(planned.rows.items(shard.start, shard.stop)) == described(items)
        assert planned.rows.ids(shard) == [item.id for item in items]
    assert planned.rows.passed_over == listing.passed_over


def test_workers_make_the_files_that_one_process_makes(tmp_path):
    sources, model = sources_of_all_kinds(tmp_path), tiny_model(speech=True)
    label(sources, model, tmp_path / "whole", OPTIONS)
    out = tmp_path / "out"
    plan(sources, model, out, OPTIONS)
    for index in (2, 0):
        label_part(out, model, (index, 3))
        assert not (out / "failed.jsonl").exists()
    with pytest.raises(LabellingError, match=r"3 of 10 shards of .* are not labelled yet: labels-00001-of-00010"):
        finish(out)
    label_part(out, model, (1, 3))
    totals = finish(out)
    assert len(shard_bytes(out)) == 10
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
    assert read_failed(out) == read_failed(tmp_path / "whole")
    assert [row["id"] for row in read_failed(out)] == ["u7", "t.jsonl:61", "bad", "m1"]
    assert totals.rows == len(read_rows(out))
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (out, tmp_path / "whole")]
    for name in ("complete", "totals", "shards", "identity", "fingerprint"):
        assert manifests[0][name] == manifests[1][name]
    # and the plain command takes the folder for its own
    assert label(sources, model, out, OPTIONS).rows_this_run == 0


def test_two_workers_at_the_same_shards_do_no_harm(tmp_path):
    tokens, out = write_lines(tmp_path / "t.jsonl", random_rows(60)), tmp_path / "out"
    label([tokens], tiny_model(), tmp_path / "whole", OPTIONS)
    plan([tokens], tiny_model(), out, OPTIONS)
    start, errors, journals = threading.Barrier(3), [], set()

    def work(model):
        def report(event, **_):
            if event == "start":
                start.wait(30)
            journals.update(path.name for path in out.glob(".*.journal*"))

        report.close = lambda: None
        try:
            label_part(out, model, report=report)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=[tiny_model()]) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert any(not name.endswith(".journal") for name in journals), "they were never at the same shard"
    finish(out)
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


WORKER = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from labelling_jobs import tiny_model
from spear_fast.labelling import label_part
count = 0
def report(event, **_):
    global count
    count += event == "batch"
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
report.close = lambda: None
label_part(sys.argv[1], tiny_model(), (0, 2), report=report)
"""


def test_a_worker_killed_in_a_shard_resumes_inside_it(tmp_path):
    tokens, out = write_lines(tmp_path / "t.jsonl", random_rows(100)), tmp_path / "out"
    options = LabelOptions(max_length=8, num_shards=2, batch_tokens=1024)
    label([tokens], tiny_model(), tmp_path / "whole", options)
    plan([tokens], tiny_model(), out, options)
    command = [sys.executable, "-c", WORKER, str(out), str(Path(__file__).parent)]
    killed = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not shard_bytes(out)
    events = []
    report = lambda event, **fields: events.append((event, fields))  # noqa: E731
    report.close = lambda: None
    label_part(out, tiny_model(), (0, 2), report=report)
    assert sum(fields["rows"] for event, fields in events if event == "batch" and fields["restored"]) > 0
    label_part(out, tiny_model(), (1, 2))
    finish(out)
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")


def test_another_model_source_or_row_is_refused(tmp_path):
    tokens, out = write_lines(tmp_path / "t.jsonl", random_rows(20)), tmp_path / "out"
    plan([tokens], tiny_model(), out, OPTIONS)
    with pytest.raises(LabellingError, match=r"was planned for another job: model\.weights was"):
        label_part(out, tiny_model(seed=2))
    with pytest.raises(LabellingError, match=r"holds the labels of another job: options\.beam_size was 4 and is 2"):
        plan([tokens], tiny_model(), out, OTHER)
    label_part(out, tiny_model())
    planned = read_plan(out)
    store = PartStore(out, planned.identity, planned.shards, label_schema(*planned.sizes))
    store.open({})
    rows, totals = list(read_labels(out))[:10], store.committed[0].totals
    # whole, and of this job, but a row stands for another
    store.commit(planned.shards[0], [*rows[:9], replace(rows[9], id="u0")], [], totals)
    with pytest.raises(LabellingError, match=r"^labels-00000-of-00002\.parquet in .* do not hold the rows that were"):
        finish(out)
    (out / "data" / planned.shards[0].name).write_bytes(b"damaged")
    with pytest.raises(LabellingError, match=r"1 of 2 shards of .* are not labelled yet: labels-00000"):
        finish(out)
    label_part(out, tiny_model())
    finish(out)
    write_lines(tokens, random_rows(21))
    with pytest.raises(LabellingError, match=r"t\.jsonl has changed since it was planned"):
        label_part(out, tiny_model())


def test_a_plan_of_many_row_groups_is_read_where_it_is_asked(tmp_path):
    count = GROUP_ROWS + 3
    pq.write_table(pa.table({"id": pa.array(range(count)), "tokens": [[1]] * count}), tmp_path / "t.parquet")
    planned = plan([tmp_path / "t.parquet"], tiny_model(), tmp_path / "out", LabelOptions(rows_per_shard=1000))
    for shard in (planned.shards[65], planned.shards[0]):
        assert planned.rows.ids(shard) == [str(number) for number in range(shard.start, shard.stop)]
        items = list(planned.rows.items(shard.start, shard.stop))
        assert all(isinstance(item, Item) for item in items)
        assert [item.id for item in items] == planned.rows.ids(shard)


def test_a_broken_plan_is_an_error_and_is_planned_again(tmp_path):
    tokens, out = write_lines(tmp_path / "t.jsonl", random_rows(20)), tmp_path / "out"
    with pytest.raises(LabellingError, match=r"there is no plan\.json in .*; write one with: spear-fast plan"):
        label_part(out, tiny_model())
    plan([tokens], tiny_model(), out, OPTIONS)
    (out / "plan.parquet").write_bytes((out / "plan.parquet").read_bytes()[:-9])
    with pytest.raises(LabellingError, match="is not readable"):
        label_part(out, tiny_model())
    plan([tokens], tiny_model(), out, OPTIONS)
    assert label_part(out, tiny_model()).rows == 20


@pytest.mark.parametrize(
    ("text", "environment", "part"),
    [
        (None, {}, (0, 1)),
        ("3/8", {"RANK": "1", "WORLD_SIZE": "2"}, (3, 8)),
        (None, {"RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
        (None, {"RANK": "1"}, (0, 1)),
        (None, {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "6"}, (5, 6)),
        (
            None,
            dict(zip(["SLURM_ARRAY_TASK_" + name for name in ("ID", "MIN", "STEP", "COUNT")], "9354", strict=True)),
            None,
        ),
        (
            None,
            dict(zip(["SLURM_ARRAY_TASK_" + name for name in ("ID", "MIN", "STEP", "COUNT")], "9334", strict=True)),
            (2, 4),
        ),
        (
            None,
            {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3", "RANK": "1", "WORLD_SIZE": "2"},
            (5, 6),
        ),
        ("8/8", {}, None),
        ("-1/8", {}, None),
        ("3", {}, None),
        ("a/b", {}, None),
        (None, {"RANK": "4", "WORLD_SIZE": "4"}, None),
        (None, {"SLURM_ARRAY_TASK_ID": "7"}, None),
    ],
)
def test_parts_of_arguments_and_launchers(text, environment, part):
    if part is None:
        with pytest.raises(LabellingError, match=r"a part must be I/N.*give --shard I/N"):
            part_of(text, environment)
    else:
        assert part_of(text, environment) == part


def test_the_commands(tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    tiny_model(text=True).save_pretrained(model)
    tokens, out = write_lines(tmp_path / "t.jsonl", random_rows(20)), tmp_path / "out"
    sizes = ["--max-length", "6", "--rows-per-shard", "5", "--device", "cpu"]

    def run(*arguments, status=0):
        assert cli.main([str(argument) for argument in arguments]) == status
        return capsys.readouterr()

    run("label", tokens, "--model", model, "--out", tmp_path / "whole", *sizes)
    said = run("plan", tokens, "--model", model, "--out", out, *sizes).out
    assert said == f"20 utterances planned in 4 shards for cpu in {out}\n"
    run("label", "--out", out, "--shard", "0/2")
    assert len(shard_bytes(out)) == 2
    assert "2 of 4 shards" in run("finish", "--out", out, status=2).err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run("label", "--out", out)
    assert run("finish", "--out", out).out == f"20 utterances labelled in {out}\n"
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
    assert "--max-length stand in the plan" in run("label", "--out", out, "--max-length", "9", status=2).err
    again = ["label", tokens, "--model", model, "--out", out]
    assert "--shard is for a job that was planned" in run(*again, "--shard", "0/1", status=2).err
    assert (
        "the following arguments are required: --model" in run("label", tokens, "--out", tmp_path / "new", status=2).err
    )
