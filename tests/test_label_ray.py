"""Labelling on a Ray cluster: a worker killed in mid-shard costs no row, and the files are those of one process."""

from __future__ import annotations

import os
import signal

import numpy as np
import pyarrow as pa
import pytest
from labelling_jobs import random_rows, read_failed, read_rows, shard_bytes, tiny_model, write_lines

from spear_fast import cli
from spear_fast.labelling import LabellingError, LabelOptions, finish, label, plan

ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'spear-fast[ray]'")

OPTIONS = LabelOptions(max_length=20, rows_per_shard=50, batch_tokens=1024, max_source_tokens=40)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    # two CPUs for two actors would leave none for what reads a dataset
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture
def job(tmp_path):
    """A plan of 400 rows, of which two fail; the labels of one process are in `whole`."""
    rows = random_rows(400)
    for index in (5, 201):
        rows[index]["tokens"] = [1] * 41
    model = tiny_model(text=True)
    model.save_pretrained(tmp_path / "model")
    tokens = write_lines(tmp_path / "t.jsonl", rows)
    label([tokens], model, tmp_path / "whole", OPTIONS)
    plan([tokens], model, tmp_path / "out", OPTIONS, model_path=str(tmp_path / "model"))
    return tmp_path / "out"


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


@pytest.mark.timeout(300)
def test_an_actor_killed_in_mid_shard(job, tmp_path):
    from spear_fast.ray import label_on_ray

    pids, killed = {}, []

    def kill(event, fields):
        if event == "process":
            pids[fields["actor"]] = fields["pid"]
        if event == "batch" and not killed:
            killed.append(fields["actor"])
            os.kill(pids[fields["actor"]], signal.SIGKILL)

    events = Events(kill)
    summary = label_on_ray(job, actors=2, report=events)
    finish(job)
    assert shard_bytes(job) == shard_bytes(tmp_path / "whole")
    assert read_failed(job) == read_failed(tmp_path / "whole")
    assert (summary.rows, summary.failed) == (398, 2)
    (warning,) = events.of("warning")
    assert warning["message"].startswith(f"actor {killed[0]} has died of")
    # it went on inside the shard, and what is said of rows adds up
    assert sum(fields["rows"] for fields in events.of("batch") if fields["restored"] and fields["rows"] > 0) > 0
    assert sum(fields["rows"] for fields in events.of("batch")) == 398


@pytest.mark.timeout(300)
def test_what_the_user_must_mend_and_what_fails_again_and_again_end_the_job(job, tmp_path, monkeypatch):
    from spear_fast.labelling import on_ray

    tiny_model(seed=2).save_pretrained(tmp_path / "other")
    with pytest.raises(LabellingError, match=r"was planned for another job: model\.weights was"):
        on_ray.label_on_ray(job, str(tmp_path / "other"), actors=1)
    monkeypatch.setattr(on_ray, "MOST_DEATHS", 2)
    events = Events()
    with pytest.raises(LabellingError, match=r"^3 actors have died and no shard has been written; the last one of"):
        on_ray.label_on_ray(job, str(tmp_path / "nowhere"), actors=1, report=events)
    # each in a process of its own
    assert len({fields["pid"] for fields in events.of("process")}) == 3


@pytest.mark.timeout(300)
def test_the_command(job, tmp_path, capsys):
    sizes = ["--max-length", "20", "--rows-per-shard", "50", "--batch-tokens", "1024", "--max-source-tokens", "40"]
    run = lambda *arguments: cli.main([str(argument) for argument in arguments])  # noqa: E731
    new, model = tmp_path / "new", tmp_path / "model"
    arguments = ["--model", model, "--out", new, *sizes, "--device", "cpu", "--ray", "--ray-actors", "2"]
    assert run("label", tmp_path / "t.jsonl", *arguments) == 3
    assert "398 utterances labelled" in capsys.readouterr().out
    assert shard_bytes(new) == shard_bytes(tmp_path / "whole")
    assert run("label", "--out", job, "--ray", "--ray-actors", "2", "--shard", "0/2") == 2
    assert "--shard and --device are not for --ray" in capsys.readouterr().err
    assert run("label", "--out", job, "--ray", "--ray-actors", "2") == 3
    assert shard_bytes(job) == shard_bytes(tmp_path / "whole")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("batch_format", ["pyarrow", "numpy"])
def test_a_pipeline_of_ray_data(job, tmp_path, batch_format):
    from spear_fast.ray import Labeller

    rows = random_rows(400)
    for index in (5, 201):
        rows[index]["tokens"] = [1] * 41
    rows = [{**row, "speaker": f"s{number % 7}"} for number, row in enumerate(rows)]

    class Watched(Labeller):
        """Adds how many rows were in the engine at most so far."""

        def __init__(self, model, options):
            super().__init__(model, options)
            self._most, labeller = 0, self._rows._labeller
            step = labeller.step

            def watched():
                self._most = max(self._most, labeller.busy)
                return step()

            labeller.step = watched

        async def __call__(self, batch):
            async for table in Labeller.__call__(self, batch):
                yield table.append_column("most", pa.array([self._most] * len(table)))

    dataset = ray.data.from_items(rows, override_num_blocks=8).map_batches(
        Watched,
        fn_constructor_kwargs={"model": str(tmp_path / "model"), "options": OPTIONS},
        batch_size=2,
        batch_format=batch_format,
        compute=ray.data.ActorPoolStrategy(size=2, max_concurrent_calls_per_actor=2),
        num_cpus=1,
    )
    found = {row["id"]: row for row in dataset.take_all()}
    assert set(found) == {row["id"] for row in rows}
    assert {name for name, row in found.items() if row["failed"] is not None} == {"u5", "u201"}
    assert all(found[row["id"]]["speaker"] == row["speaker"] for row in rows)
    # batches of two rows fill the four slots
    assert max(row["most"] for row in found.values()) >= 4
    for row in read_rows(tmp_path / "whole"):
        other = found[row["id"]]
        assert list(other["target"]) == row["target"]
        assert (other["text"], np.float32(other["score"])) == (row["text"], np.float32(row["score"]))
