"""The benchmark of streams: times of all clients, and nothing where a stream is not the result."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import latency, pages, rows
from benchmarks.machine import CPU
from spear_fast import cli
from spear_fast.decoding.streaming import TokenStream


def test_every_client_is_timed(tmp_path, capsys):
    given = ["--set", "tiny", "--methods", "greedy", "sample", "--requests", "1", "3", "--rounds", "2"]
    assert cli.main(["bench", "latency", *given, "--device", "cpu", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    found = rows.read(file)
    assert [(row["variant"], row["requests"]) for row in found] == [
        (method, number) for method in ("greedy", "sample") for number in (1, 3)
    ]
    for row in found:
        assert 0 < row["first"]["p50"] <= row["first"]["p95"] <= row["whole"]["p95"]
        assert 0 < row["gap"]["p50"] <= row["gap"]["p95"]
        # twelve tokens: the first, eleven gaps, and what comes after the last
        assert row["first"]["p50"] < row["whole"]["p50"]
        assert row["tokens_per_second"] > 0
        json.dumps(row)
    table = pages.tables(tmp_path)
    assert "3 clients" in table
    assert "first token p50" in capsys.readouterr().out


def test_nothing_is_reported_where_a_stream_is_not_the_result(monkeypatch):
    real = TokenStream.after

    def wrong(self, position):
        tokens, ended = real(self, position)
        return [token + 1 for token in tokens], ended

    monkeypatch.setattr(TokenStream, "after", wrong)
    with pytest.raises(RuntimeError, match="not the result"):
        latency.measure(latency.CASES["speak tiny"], "greedy", [1], 1, device=CPU, dtype=torch.float32)
