"""The labelling job: rates are of whole clips, peers are extrapolated, what would not fit is left out."""

from __future__ import annotations

import pytest
import torch

from benchmarks import label, rows
from benchmarks.cases import ENGINE, REFERENCE, REPAIRED, TRANSFORMERS_STATIC, labelling
from benchmarks.extrapolate import Extrapolated, that_fit
from benchmarks.machine import CPU
from benchmarks.variants import Generation
from spear_fast import cli
from spear_fast.labelling.items import Item
from spear_fast.labelling.options import LabelOptions
from spear_fast.labelling.row_labeller import RowLabeller


def test_a_clip_lasts_twenty_seconds_for_a_thousand_ids():
    case = labelling("1024x12")
    assert (case.source, case.tokens, case.beam, case.batch, case.ends) == (1000, 300, 5, 512, None)
    assert label.real_time(case, 512, 4.0) == {"times_real_time": 2560.0, "hours_for_60000": 23.44}


def test_what_is_left_goes_on_like_the_last_half():
    found = Extrapolated(4, 16, (3.0, 5.0), (100.0, 140.0))
    assert found.at(16) == (5.0, 140.0)
    assert found.at(300) == pytest.approx((5 + 284 * 2 / 8, 140 + 284 * 40 / 8))
    # noise makes nothing shorter
    assert Extrapolated(4, 16, (5.0, 4.0)).at(300)[0] == 4.0


def test_the_largest_batch_is_that_which_would_still_fit_at_the_end():
    def measure(batch):
        if batch > 64:
            raise torch.OutOfMemoryError
        return Extrapolated(batch, 16, (1.0, 1.0), (batch * 9.0, batch * 10.0))

    # ten bytes for each of a batch after 16 tokens, and an eighth more with every token
    assert [found.batch for found in that_fit(measure, 16, 1e9, (4, 16, 64, 256))] == [4, 16, 64]
    assert [found.batch for found in that_fit(measure, 300, 16 * 45.5, (4, 16, 64, 256))] == [4, 16]
    assert list(that_fit(measure, 300, 16 * 45.5, (64,))) == []


def test_the_job_is_measured_beside_the_reference_as_it_is_and_repaired(tmp_path, capsys):
    options = ["--set", "tiny", "--peers", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["bench", "label", *options]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    found = {(row["variant"], row.get("mode")): row for row in rows.read(file)}
    for name in (REFERENCE, REPAIRED):
        first, largest = found[name, "batch 4"], found[name, "largest batch"]
        assert (first["batch"], largest["batch"]) == (4, 16)
        assert first["engine_times"] == pytest.approx(
            found[ENGINE, None]["times_real_time"] / first["times_real_time"], rel=0.01
        )
        assert first["versions"] == {"spear-tts-pytorch": "0.4.8"}
    said = capsys.readouterr().out
    assert "GPU-hours for 60,000 h" in said
    assert ((TRANSFORMERS_STATIC, "batch 4") in found) != (f"not timed: label tiny: {TRANSFORMERS_STATIC}" in said)


def test_clips_are_labelled_as_by_the_command():
    (case,) = label.cases("tiny")
    generation = Generation(case, CPU, torch.float32, reference=False)
    found = label.labelled(generation)()
    assert len(found) == case.batch
    assert all(1 <= each.generated <= case.tokens for each in found)
    options = LabelOptions(beam_size=case.beam, max_length=case.tokens, max_source_tokens=case.source)
    with RowLabeller(generation.ours, options) as rows_of:
        items = [Item(str(i), "", tokens=source.numpy()) for i, source in enumerate(generation.sources)]
        wanted = [future.result().target.tolist() for future in [rows_of.submit(item) for item in items]]
    assert sorted(each.target.tolist() for each in found) == sorted(wanted)


def test_peers_alone_stand_beside_the_row_that_is_there(tmp_path, monkeypatch):
    options = ["--set", "tiny", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["bench", "label", *options]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    (own,) = rows.read(file)
    calls = []
    measure = label.ours
    monkeypatch.setattr(label, "ours", lambda *arguments, **options: calls.append(1) or measure(*arguments, **options))
    monkeypatch.setattr(label, "PEERS", {REFERENCE: 4})
    assert cli.main(["bench", "label", "--peers-only", *options]) == 0
    assert not calls
    peer = rows.read(file)[-1]
    assert peer["engine_times"] == pytest.approx(own["times_real_time"] / peer["times_real_time"], rel=0.01)
    # of another commit it says nothing
    monkeypatch.setattr(label, "commit", lambda: "another")
    assert cli.main(["bench", "label", "--peers-only", *options]) == 0
    assert calls


def test_the_repaired_reference_gives_the_same_tokens():
    case = label.cases("tiny")[0]
    tokens = []
    for name in (REFERENCE, REPAIRED):
        torch.manual_seed(0)
        tokens.append(label.peer(name, case, CPU, torch.float32)(4, 6))
    assert torch.equal(*tokens)
    assert tokens[0].shape == (4, 6)
