"""Rows that come one by one, from any thread: their labels are those of a job, and one bad row is one row."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from labelling_jobs import random_rows, read_failed, read_rows, tiny_model, write_lines

from spear_fast.labelling import LabellingError, LabelOptions, label
from spear_fast.labelling.items import Item
from spear_fast.labelling.label_files import LabelRow
from spear_fast.labelling.row_labeller import RowLabeller

OPTIONS = LabelOptions(max_length=12, batch_tokens=1024, max_source_tokens=40)


def items_of(rows):
    return [Item(row["id"], "t.jsonl", tokens=np.array(row["tokens"], dtype=np.int64)) for row in rows]


def test_labels_are_those_of_a_job_whichever_thread_gives_the_rows(tmp_path):
    rows, model = random_rows(120), tiny_model(text=True)
    rows[11]["tokens"] = [1] * 41
    label([write_lines(tmp_path / "t.jsonl", rows)], model, tmp_path / "out", OPTIONS)
    wanted = {row["id"]: row for row in read_rows(tmp_path / "out")}
    with RowLabeller(model, OPTIONS) as labeller, ThreadPoolExecutor(3) as threads:
        outcomes = [future.result(60) for future in threads.map(labeller.submit, items_of(rows))]
    assert [outcome.id for outcome in outcomes] == [row["id"] for row in rows]
    for outcome in outcomes:
        if outcome.id == "u11":
            (failed,) = read_failed(tmp_path / "out")
            assert outcome.reason == failed["reason"]
            continue
        assert isinstance(outcome, LabelRow)
        row = wanted.pop(outcome.id)
        assert outcome.target.tolist() == row["target"]
        assert (outcome.text, outcome.finished, list(outcome.flags)) == (row["text"], row["finished"], row["flags"])
        assert np.float32(outcome.score) == np.float32(row["score"])
    assert not wanted


def test_rows_of_several_batches_are_in_the_engine_together(monkeypatch):
    """Each batch waits for its own rows alone: a slot that is free takes one of the next batch."""
    rows = items_of(random_rows(16))
    with RowLabeller(tiny_model(), OPTIONS) as labeller:
        assert labeller.slots == 4
        together = []
        step = labeller._labeller.step

        def watched():
            together.append(labeller._labeller.busy)
            return step()

        monkeypatch.setattr(labeller._labeller, "step", watched)
        batches = [[labeller.submit(item) for item in rows[start : start + 2]] for start in range(0, 16, 2)]
        for batch in batches:
            assert all(isinstance(future.result(60), LabelRow) for future in batch)
    assert max(together) >= 4


def test_close_completes_every_row_and_what_ends_the_engine_fails_all():
    labeller = RowLabeller(tiny_model(), OPTIONS)
    futures = [labeller.submit(item) for item in items_of(random_rows(300))]
    labeller.close()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="the labeller is closed"):
        labeller.submit(items_of(random_rows(1))[0])
    before = threading.active_count()
    with RowLabeller(tiny_model(), OPTIONS) as broken:

        def fail():
            raise LabellingError("memory has run out")

        broken._labeller.step = fail
        with pytest.raises(LabellingError, match="memory has run out"):
            broken.submit(items_of(random_rows(1))[0]).result(60)
    assert threading.active_count() == before
