"""The command for machines with a GPU: the most important first, cut off without loss, the same on the CPU in tiny."""

from __future__ import annotations

import pytest

from benchmarks import gpu, rows
from benchmarks.machine import REPOSITORY


def test_stages_are_cut_off_and_the_next_one_runs(tmp_path):
    todo = [
        gpu.Stage("long", gpu.python("-c", "import time; print('begun', flush=True); time.sleep(60)"), 3),
        gpu.Stage("wrong", gpu.python("-c", "raise SystemExit(4)"), 20),
        gpu.Stage("absent", ["no-such-command"], 20),
        gpu.Stage("right", gpu.python("-c", "import os; assert os.environ['WORD'] == 'this'"), 20, {"WORD": "this"}),
        gpu.Stage("late", gpu.python("-c", "pass"), 20),
    ]
    records = gpu.run(todo[:4], 100, tmp_path / "log")
    assert [record["result"] for record in records] == ["cut off", "failed (4)", "not installed", "done"]
    assert "begun" in (tmp_path / "log").read_text()
    assert gpu.run(todo[4:], 4, tmp_path / "log")[0]["result"] == "not begun"


def test_the_stages_say_everything_about_a_gpu(tmp_path):
    stages = {stage.name: stage for stage in gpu.stages(tmp_path, dry=False)}
    assert tuple(stages) == gpu.NAMES
    assert {"tests/test_ops_attention.py", "tests/test_ops_values.py"} <= set(gpu.gpu_tests())
    assert all((REPOSITORY / name).is_file() for name in gpu.MEMCHECKED if name.startswith("tests/"))
    # what tells of speed is there before the time is over, even where each stage takes all that it may
    assert sum(stages[name].limit for name in ("info", "proof", "step", "label", "op")) <= gpu.BUDGET - gpu.LAST
    # `make gpu-measure` is within its own
    assert sum(stages[name].limit for name in ("step", "label", "op", "generate", "train")) <= 360


def test_a_dry_run_has_the_same_stages(tmp_path):
    """But for what wants a device: the build for it, and shapes that are of second rank."""
    real, dry = ([stage.name for stage in gpu.stages(tmp_path, dry=each)] for each in (False, True))
    assert [name for name in real if name in dry] == dry
    assert set(real) - set(dry) == {"build", "further-ops"}


def test_stages_can_be_selected(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu, "run", lambda todo, limit, log: asked.extend(stage.name for stage in todo) or [])
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--stages", "op", "step"]) == 0
    assert asked == ["step", "op"]


@pytest.mark.slow
def test_a_dry_run_leaves_rows_plots_and_a_log(tmp_path):
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--budget", "400"]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    assert {row["benchmark"] for row in rows.read(file)} == {"op", "generate", "step", "label", "train"}
    said = next(tmp_path.glob("*.log")).read_text()
    for header in (
        "| generation | by | time |",
        "| decoding step |",
        "| job | by |",
        "| op, shape |",
        "| training step |",
    ):
        assert header in said
    assert "| label-peers |" in said
    assert (tmp_path / "proof.ndjson").is_file()
    assert {path.suffix for path in tmp_path.iterdir()} >= {".jsonl", ".log", ".png"}
