"""Where a kernel takes the device with it, a benchmark continues after its case in a process of its own."""

from __future__ import annotations

import pytest

from benchmarks import generate, label, latency, op, rows, step, train
from benchmarks.options import Where
from spear_fast import cli

MODULES = {"op": op, "generate": generate, "step": step, "train": train, "label": label, "latency": latency}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "left"),
    [
        ("op", ["--ops", "append_kv", "rotary", "--seconds", "0"], {"rotary"}),
        ("generate", ["--cases", "tiny", "tiny-mixed", "--engine-only"], {"tiny-mixed"}),
        ("step", [], {"step tiny 2x3"}),
    ],
)
def test_the_rest_runs_in_a_fresh_process(name, options, left, tmp_path, monkeypatch, capfd):
    def broken(*arguments, **keywords):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    module = MODULES[name]
    monkeypatch.setattr(module, "measured" if name == "op" else "measure", broken)
    monkeypatch.setattr(module, "device_lost", lambda device: True)
    given = [*options, "--set", "tiny", "--device", "cpu", "--limit", "100", "--out", str(tmp_path)]
    assert cli.main(["bench", name, *given]) == 1
    (file,) = tmp_path.glob("*.jsonl")
    assert {row["op"] if name == "op" else row["case"] for row in rows.read(file)} == left
    assert "a fresh process continues after case 1" in capfd.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_a_lost_device_ends_the_process_work_and_hands_over_what_is_left(name, monkeypatch):
    handed = []

    def fresh(command, arguments, skip, where):
        handed.append((command, skip, arguments, where.limit))
        return 1

    def broken(*arguments, **keywords):
        raise RuntimeError("CUDA error")

    module = MODULES[name]
    monkeypatch.setattr(module, {"op": "measured", "label": "ours"}.get(name, "measure"), broken)
    monkeypatch.setattr(module, "device_lost", lambda device: True)
    monkeypatch.setattr(module, "in_fresh_process", fresh)
    given = ["--set", "tiny", "--device", "cpu", "--limit", "50"]
    assert cli.main(["bench", name, *given]) == 1
    assert handed == [(name, 1, given, 50.0)]
    # and after the last case there is nothing to do
    assert cli.main(["bench", name, *given, "--skip", "1000"]) == 0


def test_time_that_is_over_is_seen():
    assert Where("cpu", None, None).left()
    assert Where("cpu", None, None, limit=50.0).left()
    assert not Where("cpu", None, None, limit=-1.0).left()
