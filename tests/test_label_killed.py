"""A job killed with SIGKILL at random moments loses no row, doubles none, and labels each as it would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from killed_jobs import OPTIONS
from labelling_jobs import random_rows, read_failed, read_rows, shard_bytes, tiny_model, write_lines

from spear_fast.labelling import label

KILLS = 30


@pytest.mark.timeout(600)
def test_killed_at_random_moments_nothing_is_lost_or_doubled(tmp_path):
    rows = random_rows(120)
    for index in (5, 31, 77, 119):
        rows[index]["tokens"] = [1] * 41
    tokens = write_lines(tmp_path / "tokens.jsonl", rows)
    label([tokens], tiny_model(), tmp_path / "whole", OPTIONS)

    script = Path(__file__).with_name("killed_jobs.py")
    command = [sys.executable, str(script), str(tokens), str(tmp_path), str(KILLS), "17"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["kills"] >= KILLS
    # the kills fell into the work and not all before it
    assert len({line.split(", ")[-1] for line in report["progress"]}) > 5

    for number in range(report["jobs"]):
        out = tmp_path / f"job{number}"
        assert Counter(row["id"] for row in read_rows(out)) == Counter(
            row["id"] for index, row in enumerate(rows) if index not in (5, 31, 77, 119)
        )
        assert read_rows(out) == read_rows(tmp_path / "whole")
        assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
        assert read_failed(out) == read_failed(tmp_path / "whole")
        assert [row["id"] for row in read_failed(out)] == ["u5", "u31", "u77", "u119"]
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["complete"]
        assert manifest["totals"] == json.loads((tmp_path / "whole" / "manifest.json").read_text())["totals"]
        assert not [path.name for path in out.iterdir() if path.name.endswith((".tmp", ".journal"))]
