"""Several devices of one machine, a process for each: whoever dies, the files are those of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from labelling_jobs import random_rows, read_failed, shard_bytes, tiny_model, write_lines

from spear_fast import cli
from spear_fast.cli_arguments import devices_of
from spear_fast.labelling import Interrupted, LabellingError, LabelOptions, devices, finish, label, label_part, plan
from spear_fast.labelling.devices import label_on_devices
from spear_fast.labelling.progress import Summary
from spear_fast.labelling.shards import plan_shards
from spear_fast.labelling.sharing import Claims, Dispatcher

OPTIONS = LabelOptions(max_length=20, rows_per_shard=50, batch_tokens=1024, max_source_tokens=40)
SUMMARY = Summary(0, 0, 0, *[None] * 6, 0, 0.0)


@pytest.fixture
def job(tmp_path):
    """Tokens of 400 rows, of which some fail, and a model; the labels of one process are in `whole`."""
    rows = random_rows(400)
    for index in (5, 201):
        rows[index]["tokens"] = [1] * 41
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokens = write_lines(tmp_path / "t.jsonl", rows)
    label([tokens], model, tmp_path / "whole", OPTIONS)
    plan([tokens], model, tmp_path / "out", OPTIONS, model_path=str(tmp_path / "model"))
    return tmp_path / "out", str(tmp_path / "model")


class Events:
    """Keeps the events of a job; `on` is called with each."""

    def __init__(self, on=lambda event, fields: None):
        self._on, self._seen = on, []

    def __call__(self, event, **fields):
        self._seen.append((event, fields))
        self._on(event, fields)

    def close(self):
        pass

    def of(self, name):
        return [fields for event, fields in self._seen if event == name]


def test_the_shards_of_a_process_that_dies_in_a_shard_are_done_by_the_rest(job, tmp_path):
    out, model = job
    killed = []

    def kill_first(event, fields):
        if event == "batch" and not killed:
            killed.append(fields["pid"])
            os.kill(fields["pid"], signal.SIGKILL)

    events = Events(kill_first)
    summary = label_on_devices(out, model, ["cpu", "cpu"], report=events)
    finish(out)
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
    assert (summary.rows, summary.failed) == (398, 2)
    assert read_failed(out) == read_failed(tmp_path / "whole")
    assert len(events.of("start")) == len(events.of("summary")) == 1
    (warning,) = events.of("warning")
    assert warning["message"].startswith("the process for cpu has died of signal SIGKILL; the others do the shards")
    assert {fields["pid"] for fields in events.of("shard")} == {each["pid"] for each in events.of("process")} - {
        *killed
    }
    # the labels that it had journalled are not made again, and what is said of rows adds up
    assert sum(fields["rows"] for fields in events.of("batch") if fields["restored"] and fields["rows"] > 0) > 0
    assert sum(fields["rows"] for fields in events.of("batch")) == 398
    assert sum(fields["failed"] for fields in events.of("prepared")) == 2
    # and there is nothing left to do, also for processes
    again = Events()
    assert label_on_devices(out, model, ["cpu", "cpu"], report=again).rows_this_run == 0
    assert not again.of("process")


def test_when_all_have_died_the_same_command_resumes(job, tmp_path):
    out, model = job
    kill = Events(lambda event, fields: event == "shard" and os.kill(fields["pid"], signal.SIGKILL))
    with pytest.raises(LabellingError, match=r"shards are not labelled, since no process is left; run the same"):
        label_on_devices(out, model, ["cpu"], report=kill)
    done = len(shard_bytes(out))
    assert 0 < done < 8
    label_part(out, tiny_model())
    finish(out)
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")


def test_a_stop_keeps_what_is_finished(job):
    out, model = job
    stop = threading.Event()
    events = Events(lambda event, fields: event == "shard" and stop.set())
    with pytest.raises(Interrupted) as interrupted:
        label_on_devices(out, model, ["cpu"], (1, 2), report=events, stop=stop)
    assert "of 4 shards are written" in interrupted.value.progress
    assert 0 < len(shard_bytes(out)) < 4
    assert {name[7:12] for name in shard_bytes(out)} < {"00001", "00003", "00005", "00007"}
    assert not events.of("warning")


def test_what_the_user_must_mend_ends_all_processes(job, tmp_path):
    out, _ = job
    tiny_model(seed=2).save_pretrained(tmp_path / "other")
    with pytest.raises(LabellingError, match=r"was planned for another job: model\.weights was"):
        label_on_devices(out, str(tmp_path / "other"), ["cpu"])
    assert not shard_bytes(out)


def test_a_process_whose_parent_is_gone_stops_and_keeps_what_is_finished(job):
    out, model = job
    task = {"out": str(out), "model": model, "device": "cpu", "threads": 1, "workers": 1, "lock": True}
    command = [sys.executable, "-m", "spear_fast.labelling.device_worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as worker:
        say = lambda message: print(json.dumps(message), file=worker.stdin, flush=True)  # noqa: E731
        say(task)
        claimed = 0
        for line in worker.stdout:
            message = json.loads(line)
            if "claim" in message:
                say({"shard": claimed})
                claimed += 1
            if message.get("event") == "batch":
                break
        worker.stdin.close()
        rest = [json.loads(line) for line in worker.stdout]
        assert worker.wait(60) == 0
    assert rest[-1] == {"done": True}
    # two were claimed ahead of time, the first is not whole
    assert not shard_bytes(out)
    assert any(out.glob(".labels-00000-of-00008.parquet.journal"))


def test_the_commands(job, tmp_path, capsys, monkeypatch):
    out, model = job
    sizes = ["--max-length", "20", "--rows-per-shard", "50", "--batch-tokens", "1024", "--max-source-tokens", "40"]
    run = lambda *arguments: cli.main([str(argument) for argument in arguments])  # noqa: E731
    new = tmp_path / "new"
    assert run("label", tmp_path / "t.jsonl", "--model", model, "--out", new, *sizes, "--device", "cpu,cpu") == 3
    assert "398 utterances labelled" in capsys.readouterr().out
    manifest = json.loads((new / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["runs"][-1]["device"] == "cpu,cpu"
    assert shard_bytes(new) == shard_bytes(tmp_path / "whole")
    taken = []
    monkeypatch.setattr(devices, "label_on_devices", lambda *given, **_: taken.extend(given) or SUMMARY)
    assert run("label", "--out", out, "--shard", "1/2", "--device", "cpu,cpu") == 0
    assert taken == [str(out), model, ["cpu", "cpu"], (1, 2)]


def test_devices_of_a_list():
    import torch

    count = torch.cuda.device_count()
    assert [device.type for device in devices_of("all")] == (["cuda"] * count or ["cpu"])
    assert devices_of("cpu,cpu") == [torch.device("cpu")] * 2
    with pytest.raises(ValueError, match=f"--device cuda:{count} cannot be used here"):
        devices_of(f"cpu,cuda:{count}")


def test_a_dispatcher_gives_each_shard_to_one_worker_at_a_time():
    dispatcher = Dispatcher(range(4), most_losses=2)
    assert [dispatcher.claim("a"), dispatcher.claim("b"), dispatcher.claim("a")] == [0, 1, 2]
    dispatcher.done("a", 0)
    assert dispatcher.left == 3
    assert dispatcher.release("a") == [2]
    assert dispatcher.release("a") == []
    assert [dispatcher.claim("b"), dispatcher.claim("b"), dispatcher.claim("b")] == [2, 3, None]
    for shard in (1, 3):
        dispatcher.done("b", shard)
    assert dispatcher.left == 1
    with pytest.raises(LabellingError, match="2 workers died while they were at shard 2"):
        dispatcher.release("b")


def test_claims_are_made_as_somebody_iterates():
    numbers = iter([2, 0, None, 1])
    asked = []
    claims = Claims(plan_shards(3, 3, 1), lambda: asked.append(1) or next(numbers))
    first, second = iter(claims), iter(claims)
    assert next(first).index == next(second).index == 2
    assert len(asked) == 1
    assert [shard.index for shard in second] == [0]
    assert [shard.index for shard in first] == [0]
    assert len(asked) == 3
