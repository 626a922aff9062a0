"""The first minutes on a GPU, rehearsed on the CPU: every item says what it found, and one that fails stops nothing."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import proof
from benchmarks.machine import CPU
from spear_fast.ops import providers


def records(folder):
    return [json.loads(line) for line in (folder / "proof.ndjson").read_text().splitlines()]


def test_a_rehearsal_proves_what_a_cpu_can(tmp_path, capsys):
    assert proof.main(["--dry-run", "--out", str(tmp_path)]) == 0
    found = records(tmp_path)
    assert all(record["ok"] for record in found)
    names = [record["item"] for record in found]
    for op in ("append_kv", "decode_self_attention", "decode_cross_attention", "beam_step", "attention", "rms_norm"):
        assert any(name.startswith(f"op {op} ") for name in names), op
    (step,) = (record for record in found if record["item"].startswith("step "))
    assert step["us"] > 0
    assert step["predicted_us"] > 0
    assert step["finite"]
    assert {"steps as graphs and without", "whatever is beside", "versions"} <= set(names)
    assert any(record.get("max_error") is not None for record in found)
    assert "predicted" in capsys.readouterr().out


def test_what_is_wrong_is_said_and_the_next_item_begins(tmp_path, monkeypatch):
    own = providers.get("geglu", "cpu")
    wrong = own.function

    def off(*arguments):
        return wrong(*arguments) + 0.1

    rehearsal = proof.Proof(CPU, dry=True)
    items = [item for item in rehearsal.items() if item.name.startswith(("op geglu", "op cross_entropy"))]
    object.__setattr__(own, "function", off)
    try:
        failed = proof.prove(iter(items), tmp_path / "proof.ndjson", device=CPU, skip=0, until=time.monotonic() + 60)
    finally:
        object.__setattr__(own, "function", wrong)
    found = records(tmp_path)
    assert failed == sum(not record["ok"] for record in found) >= 1
    bad = next(record for record in found if not record["ok"])
    assert bad["item"].startswith("op geglu tiny forward cpu")
    assert "AssertionError" in bad["error"]
    assert "assert_within" in bad["traceback"]
    assert bad["seed"] == proof.SEED
    assert found[-1]["ok"], "what comes after it is looked at"


def test_a_lost_device_is_noted_and_the_rest_is_left_to_a_fresh_process(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    items = [proof.Item("good", dict), proof.Item("bad", broken), proof.Item("next", dict)]
    monkeypatch.setattr(proof, "device_lost", lambda device: True)
    out = tmp_path / "proof.ndjson"
    assert proof.prove(iter(items), out, device=CPU, skip=0, until=time.monotonic() + 60) is None
    assert [record["item"] for record in records(tmp_path)] == ["good", "bad", "device lost"]
    assert records(tmp_path)[-1]["number"] == 1
    assert proof.prove(iter(items), out, device=CPU, skip=2, until=time.monotonic() + 60) == 0
    assert records(tmp_path)[-1]["item"] == "next"


def test_nothing_is_begun_when_the_time_is_over(tmp_path):
    items = [proof.Item("late", dict)]
    assert proof.prove(iter(items), tmp_path / "proof.ndjson", device=CPU, skip=0, until=time.monotonic() - 1) == 0
    assert records(tmp_path) == [{"item": "late", "ok": None, "reason": "not begun"}]


def test_other_tokens_by_graphs_and_other_bits_in_other_orders_are_failures(monkeypatch):
    rehearsal = proof.Proof(CPU, dry=True)
    case = proof.CASES["tiny"]
    answers = iter(([torch.tensor([1, 2])], [torch.tensor([1, 3])]))
    monkeypatch.setattr(proof.Generation, "by_engine", lambda self: lambda most: next(answers))
    with pytest.raises(AssertionError, match="1 of 1 utterances"):
        rehearsal.graph_and_eager(case)
    real, count = torch.equal, iter(range(1000))
    monkeypatch.setattr(torch, "equal", lambda a, b: real(a, b) and next(count) != 1)
    with pytest.raises(AssertionError, match="differ by what is decoded beside"):
        rehearsal.whatever_is_beside(case)
