"""The benchmarks: what is wrong is never timed, the work of a shape is counted right, rows say what they were of."""

from __future__ import annotations

import json
import re

import pytest
import torch
from ops_matrix import device_of

from benchmarks import compare, machine, op, plots, rows
from benchmarks.checked import Gate, computed
from benchmarks.machine import CPU
from benchmarks.operations import all_cases, chosen_cases
from benchmarks.timing import Variant, quantiles, sampled
from spear_fast import cli
from spear_fast.ops import providers

TINY = chosen_cases("tiny")
SETTINGS = op.Settings(CPU, torch.float32, seconds=0.0, quick=True)


def case_of(name):
    return next(case for case in TINY if case.op == name)


def really_chosen(case):
    """Returns the provider that the op itself took, by its own memory, when it was called."""
    memory = providers.chosen(case.op)
    memory.clear()
    getattr(torch.ops.spear_fast, case.op).default(*case.inputs(torch.float32, CPU))
    (function,) = memory.values()
    return next(name for name in providers.names(case.op) if providers.get(case.op, name).function is function)


def test_every_op_has_cases_of_every_set():
    gradients = {case.op for case in all_cases() if case.gradients}
    # a whole decoding step is measured by `bench step`, not as an op
    for name in set(providers.ops()) - {"decode_step"}:
        forward = name.removesuffix("_backward")
        if forward != name:
            assert forward in gradients
        else:
            assert {kind for case in all_cases() if case.op == name for kind in case.sets} == {"tiny", "cpu", "gpu"}


def test_titles_are_unique():
    titles = [(case.title, case.mode) for case in all_cases()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.title} {case.mode}")
def test_every_candidate_of_a_case_gives_the_right_numbers(case):
    if case.op not in providers.ops():
        pytest.skip(f"{case.op} is not an op yet")
    found, reasons = op.measured(case, SETTINGS)
    assert not [reason for reason in reasons if "wrong" in reason]
    # forward, warm and cold, of every provider for the CPU and every baseline that is for it
    assert {row["cache"] for row in found} == {"warm", "cold"}
    assert {row["variant"] for row in found if row["kind"] == "provider"} >= {"reference"}
    assert {row["baseline"] for row in found} <= set(case.against)
    assert all(row["p20"] <= row["p50"] <= row["p80"] and row["percent_of_roofline"] >= 0 for row in found)
    assert [row["variant"] for row in found if row["automatic"]] == [really_chosen(case)] * 2
    assert len({row["key"] for row in found}) == len(found)
    json.dumps(found)


def test_what_is_wrong_is_not_timed():
    case = case_of("decode_cross_attention")
    right = providers.get(case.op, "reference").function

    def wrong(*arguments):
        out, *others = right(*arguments) if isinstance(right(*arguments), tuple) else (right(*arguments),)
        return (out * 1.001, *others) if others else out * 1.001

    providers.register(providers.Provider(case.op, "wrong", wrong))
    try:
        found, reasons = op.measured(case, SETTINGS)
    finally:
        providers._providers[case.op].pop()
    assert "wrong" not in {row["variant"] for row in found}
    assert [reason for reason in reasons if re.search(r"wrong: wrong: result 0 is off by .*, allowed", reason)]


def test_the_gate_takes_each_provider_and_refuses_another_result():
    case = case_of("decode_self_attention")
    arguments = case.inputs(torch.float32, CPU)
    gate = Gate.of(case, arguments)
    for name in providers.names(case.op):
        if device_of(providers.get(case.op, name)) == CPU and providers.get(case.op, name).missing() is None:
            assert gate.error(computed(case, name, arguments))["max_error"] < 1e-5
    with pytest.raises(AssertionError, match="off by"):
        gate.error([gate.plain[0] + 1])


def test_bytes_are_those_of_the_inputs_and_results():
    """Of cases that read every byte of their inputs once, the formula is the sum of their sizes."""
    for case in all_cases():
        if case.mode != "forward" or "tiny" not in case.sets or case.op not in ("rms_norm", "geglu", "rotary"):
            continue
        if case.op not in providers.ops():
            continue
        arguments = case.inputs(torch.float32, CPU)
        tensors = [a for a in arguments if isinstance(a, torch.Tensor) and a.dim() > 0]
        moved = sum(tensor.nbytes for tensor in (*tensors, *computed(case, "reference", arguments)))
        small = sum(tensor.nbytes for tensor in tensors if tensor.dim() == 1)
        assert moved - small <= case.bytes(4) <= moved, case.title


def test_samples_restore_and_turn():
    state, seen = torch.zeros(()), []

    def restore():
        state.zero_()

    def call():
        seen.append(float(state))
        state.add_(1)

    found = sampled([Variant("it", [call], restore), Variant("other", [lambda: None])], CPU, 0.0, rounds=(3, 3))
    # the warming calls too: what moves a state on at each call would run out of its buffers
    assert seen == [0.0] * 5
    assert [len(samples) for samples in found.values()] == [3, 3]
    assert quantiles([1.0, 2.0, 3.0, 4.0]) == pytest.approx({"p20": 1.6, "p50": 2.5, "p80": 3.4})


def test_the_last_row_of_an_identity_counts(tmp_path):
    common = dict(benchmark="op", device="d", threads=1, case="c", variant="v", commit="a")
    file = tmp_path / "rows.jsonl"
    rows.append(file, [rows.finished({**common, "p50": 1}), rows.finished({**common, "variant": "w", "p50": 2})])
    rows.append(file, [rows.finished({**common, "commit": "b", "p50": 3})])
    assert [(row["variant"], row["p50"]) for row in rows.read(file)] == [("v", 3), ("w", 2)]
    assert len({json.loads(line)["key"] for line in file.read_text().splitlines()}) == 3


def test_the_command_line_runs_an_op_benchmark(tmp_path, capsys):
    options = ["--ops", "append_kv", "--set", "tiny", "--seconds", "0", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["bench", "op", *options]) == 0
    assert "append_kv tiny" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.jsonl")
    assert {row["op"] for row in rows.read(file)} == {"append_kv"}
    assert cli.main(["bench", "op", "--ops", "nothing"]) == 2
    assert "no case of the set" in capsys.readouterr().err


def test_without_a_checkout_the_command_says_where_to_run_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "spear_fast" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "op"]) == 2
    assert "bench runs from a checkout" in capsys.readouterr().err


def test_ratios_take_the_fastest_round_and_what_both_sides_have():
    def row(case, seconds):
        return dict(case=case, mode="forward", dtype="float32", cache="warm", what="", p50=seconds)

    found = compare.ratios([row("a", 2.0), row("a", 1.0), row("b", 1.0)], [row("a", 3.0), row("a", 4.0)])
    assert found == [("a, forward, float32, warm", 1.0, 3.0, 3.0)]


def test_comparing_providers_fails_below_the_ratio(capsys):
    options = ["--ops", "append_kv", "--set", "tiny", "--seconds", "0", "--device", "cpu"]
    sides = ["--providers", "reference", "reference"]
    assert cli.main(["bench", "compare", *options, *sides, "--fail-below", "0.99"]) == 0
    assert "median ratio 1.00, worst 1.00" in capsys.readouterr().out
    assert cli.main(["bench", "compare", *options, *sides, "--fail-below", "1.01"]) == 1
    assert cli.main(["bench", "compare", *options]) == 2
    assert "compare wants two providers, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_comparing_commits_builds_the_other_one(capsys, monkeypatch):
    # one variant is enough, and takes half as long
    monkeypatch.setenv("SPEAR_FAST_MARCH", "native")
    options = ["--ops", "decode_cross_attention", "--set", "tiny", "--seconds", "0", "--device", "cpu"]
    assert cli.main(["bench", "compare", "--commits", "HEAD", "--rounds", "1", *options]) == 0
    assert "decode_cross_attention tiny 2x3 s12, forward, float32, warm, automatic" in capsys.readouterr().out


def test_plots_are_drawn_of_rows(tmp_path):
    pytest.importorskip("matplotlib")
    found, _ = op.measured(case_of("append_kv"), SETTINGS)
    paths = plots.draw(found, tmp_path)
    assert [path.name.rpartition("-")[2] for path in paths] == ["roofline.png", "ops.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_spread_cases_take_every_op_in_turn():
    cases = op.spread(chosen_cases("gpu"))
    assert sorted(case.title + case.mode for case in cases) == sorted(c.title + c.mode for c in chosen_cases("gpu"))
    first = [case.op for case in cases[: len({case.op for case in cases})]]
    assert len(set(first)) == len(first)
    # of each op in the order that they have without it
    for name in set(first):
        assert [c.title for c in cases if c.op == name] == [c.title for c in chosen_cases("gpu") if c.op == name]


def test_a_copy_without_history_is_told_what_it_is_of(monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda *command: "")
    monkeypatch.setenv("SPEAR_FAST_COMMIT", "abc123")
    assert machine.commit.__wrapped__() == "abc123"
    monkeypatch.delenv("SPEAR_FAST_COMMIT")
    assert machine.commit.__wrapped__() == "unknown"
