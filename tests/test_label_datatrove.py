"""Labelling as a step of datatrove: killed and run again, the files are those of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from labelling_jobs import random_rows, shard_bytes, tiny_model, write_lines

from spear_fast.labelling import LabelOptions, finish, label, plan
from spear_fast.labelling.datatrove import label_shards

OPTIONS = LabelOptions(max_length=20, rows_per_shard=50, batch_tokens=1024, max_source_tokens=40)
EXAMPLE = Path(__file__).parents[1] / "examples" / "label_datatrove.py"


@pytest.fixture
def planned(tmp_path):
    """A folder that is planned, and beside it the labels of one process."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokens = write_lines(tmp_path / "t.jsonl", random_rows(900))
    label([tokens], model, tmp_path / "whole", OPTIONS)
    plan([tokens], model, tmp_path / "out", OPTIONS, model_path=str(tmp_path / "model"))
    return tmp_path / "out"


def test_a_step_labels_its_part_and_hands_data_on(planned, tmp_path):
    step = partial(label_shards, out=planned)
    data = iter([1])
    for rank in (1, 0):
        assert step(data, rank, 2) is data
        assert len(shard_bytes(planned)) == 9 * (2 - rank)
    finish(planned)
    assert shard_bytes(planned) == shard_bytes(tmp_path / "whole")


@pytest.mark.timeout(300)
def test_an_executor_that_is_killed_and_run_again(planned, tmp_path):
    pytest.importorskip("datatrove", reason="datatrove is not installed; pip install 'spear-fast[datatrove]'")
    command = [sys.executable, str(EXAMPLE), str(planned), "--tasks", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "wb") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + 120
        while not shard_bytes(planned) and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    done = len(shard_bytes(planned))
    assert 0 < done < 18, (tmp_path / "log").read_text()
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    finish(planned)
    assert shard_bytes(planned) == shard_bytes(tmp_path / "whole")
