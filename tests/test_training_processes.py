"""Two processes on one machine train as one does over the whole batch."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from reference import load_reference
from training_jobs import model, pairs, settings
from training_processes import (
    ALL_DROPPED,
    STEPS,
    gathered,
    in_two_processes,
    labelled,
    spoiled,
    stepped_schedule,
    trained,
)

from spear_fast import SemanticToTextTrainer
from spear_fast.losses.gather import all_gather, all_gather_rows


def test_rows_are_gathered_with_their_gradients(tmp_path):
    results = in_two_processes(gathered, tmp_path)
    weights = torch.arange(7.0)[:, None].expand(-1, 2)
    for rank, (joined, gradient, wide, sizes, empty) in enumerate(results):
        assert joined[:, 0].tolist() == [0, 2, 4, 0, 2, 4, 6]
        # both processes' losses reach each row; the mean over processes, which comes later, makes one of the two
        assert torch.equal(gradient, 2 * 2 * weights[3 * rank : 3 + 4 * rank])
        assert wide.tolist() == [[0, 1, 1]] * 2
        assert sizes.tolist() == [1, 2]
        assert empty.tolist() == [[1.0] * 3] * 2
    alone = torch.ones(2, 2)
    assert all_gather_rows(alone) is alone
    assert all_gather(alone) == (alone, None)


def test_the_reference_cannot_gather_across_processes():
    load_reference()
    names = vars(sys.modules["spear_tts_pytorch.distributed"])
    assert "exists" not in names
    assert "pad_dim_to" not in names


def test_training_and_going_on(tmp_path):
    first, second = in_two_processes(trained, tmp_path)
    alone = SemanticToTextTrainer(
        model(**ALL_DROPPED).double(), dataset=pairs(), **settings(tmp_path / "alone", batch_size=4, **STEPS)
    )
    logs = []
    alone.train(logs.append)
    rates = [1e-5, *(1e-2 * 0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3))]
    for one, result in enumerate((first, second)):
        assert [log["lr"] for log in result["logs"]] == pytest.approx(rates), "no faster with more processes"
        assert result["rows"] == 2
        assert result["began"] == 3
        assert result["resumed"], f"process {one} went on elsewhere"
        assert result["files"] == [f"semantic.text.{step}.pt" for step in (0, 2, 3)]
        for name, tensor in alone.model.state_dict().items():
            torch.testing.assert_close(result["state"][name], tensor, rtol=1e-6, atol=1e-8)
    assert first["draw"] != second["draw"], "both would drop and delete the same"
    assert [log["valid_loss"] for log in logs[:1]] == pytest.approx([first["logs"][0]["valid_loss"]], rel=1e-5)


def test_what_is_no_number_in_one_process_changes_no_weights_in_any(tmp_path):
    first, second = in_two_processes(spoiled, tmp_path)
    for changed, state in (first, second):
        assert changed == [True, False, True]
        for name, tensor in state.items():
            assert torch.equal(tensor, first[1][name]), f"{name} differs between processes"


def test_the_reference_s_schedule_runs_faster_with_more_processes(tmp_path):
    assert in_two_processes(stepped_schedule, tmp_path) == [6, 6]


def test_processes_share_the_rows_to_label(tmp_path):
    assert in_two_processes(labelled, tmp_path) == [[0, 2, 4], [1, 3]]
    assert {path.name for path in (tmp_path / "rows").glob("*.pt")} == {f"{index}.pt" for index in range(5)}
