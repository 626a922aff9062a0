"""The simulation of a large job: what can be worked out by hand comes out, and what shards cost is measured."""

from __future__ import annotations

import pytest

from benchmarks import rows, scale
from benchmarks.simulation import Cluster, Faults, Way, simulate

FOUR = Cluster(nodes=2, gpus=2, start=10.0)


def test_without_faults_the_time_is_what_can_be_worked_out():
    # 9 shards of 5 s on 4 GPUs: three in turn
    outcome = simulate(9, 5.0, FOUR, Faults(), Way(), seed=1)
    assert outcome.seconds == pytest.approx(10 + 15)
    assert outcome.perfect == pytest.approx(45 / 4)
    # two parts of 5 and 4 shards for 4 GPUs, each a process: the other two have nothing to do
    assert simulate(9, 5.0, FOUR, Faults(), Way(parts=2), seed=1).seconds == pytest.approx(10 + 25)
    # four parts for two GPUs: everyone begins twice
    two = Cluster(nodes=1, gpus=2, start=10.0)
    assert simulate(8, 5.0, two, Faults(), Way(parts=4), seed=1).seconds == pytest.approx(2 * (10 + 10))


def test_a_lost_node_leaves_its_work_to_the_rest():
    alone = Cluster(nodes=2, gpus=1, start=2.0)
    faults = Faults(lost=1, lost_at=1.0)
    # two units of 10 s: at 10 s one GPU goes with 8 of 10 s done; the other ends at 12 and resumes it
    kept = simulate(2, 10.0, alone, faults, Way(parts=2), seed=1)
    assert kept.seconds == pytest.approx(12 + 2 + 2)
    again = simulate(2, 10.0, alone, faults, Way(parts=2, journal=False), seed=1)
    assert again.seconds == pytest.approx(12 + 2 + 10)
    assert kept.perfect == again.perfect == pytest.approx(10)


@pytest.mark.parametrize("way", scale.WAYS.values(), ids=scale.WAYS)
def test_no_way_is_faster_than_no_gpu_ever_idle_and_seeds_decide(way):
    outcomes = [simulate(300, 60.0, scale.CLUSTER, scale.ALL, way, seed) for seed in (1, 1, 2)]
    assert outcomes[0] == outcomes[1] != outcomes[2]
    assert all(outcome.seconds >= outcome.perfect for outcome in outcomes)


def test_faults_are_those_of_the_seed_whatever_the_shards():
    perfect = {simulate(count, 24000 / count, scale.CLUSTER, scale.ALL, Way(), 3).perfect for count in (100, 1000)}
    assert max(perfect) == pytest.approx(min(perfect))


def test_what_a_shard_costs_is_measured_and_the_table_is_of_it(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="has no row of what a shard costs"):
        scale.tables(tmp_path)
    row = scale.measured(1, quick=True)
    assert row["start_seconds"] > 0
    assert row["row_seconds"] > 0
    rows.append(tmp_path / "a.jsonl", [row, {**row, "start_seconds": 5.0, "shard_seconds": 3.0, "time": "9"}])
    monkeypatch.setattr(scale, "SEEDS", range(1))
    assert scale.main(["--out", str(tmp_path), "--rate", "2000"]) == 0
    text = capsys.readouterr().out
    assert "at 2,000 times real time" in text
    # 4,096 utterances of 20 s at 2,000 times real time, and what the last row says
    assert f"| 4,096 | 2,637 | {4096 * (0.01 + row['row_seconds']) + 3:.0f} s |" in text
