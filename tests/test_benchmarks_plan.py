"""What planning takes is measured of a job whose shard is then read."""

from __future__ import annotations

import pyarrow.parquet as pq

from benchmarks import plan


def test_planning_is_measured_of_rows_that_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "WRITTEN", 700)
    plan.write_tokens(tmp_path / "t.parquet", 9000)
    table = pq.read_table(tmp_path / "t.parquet")
    assert len(set(table["id"].to_pylist())) == 9000
    assert {len(tokens) for tokens in table["tokens"].to_pylist()} == set(range(1, 9))
    found = plan.measured_here(tmp_path / "t.parquet", tmp_path / "out")
    assert found["plan_seconds"] > found["shard_seconds"] > 0
    assert found["grown_bytes"] >= 0
    assert pq.read_metadata(tmp_path / "out" / "all" / "plan.parquet").num_rows == 9000
