"""The benchmark of single steps: the kernels of a step are all there and no others, and a wrong engine is not timed."""

from __future__ import annotations

import json

import pytest
import torch
from spear_fast.kernels.audit import nvcc
from test_decoding_launches import LAYER, STEP

from benchmarks import generate, predict, predict_selection, rows, step
from benchmarks.cases import step_cases
from benchmarks.machine import CPU
from benchmarks.variants import Generation
from spear_fast import cli
from spear_fast.decoding.runner import interval

CASES = {case.name: case for case in step_cases()}


@pytest.fixture
def timed(monkeypatch):
    """Lets the longer run take half a second more, whatever the machine does meanwhile."""
    monkeypatch.setattr(step, "interleaved", lambda runs, rounds: {"shorter": [1.0] * rounds, "longer": [1.5] * rounds})


def measured(name):
    return step.measure(CASES[name], 2, device=CPU, dtype=torch.float32, quick=True)


def test_a_steps_kernels_are_counted_apart_from_the_encoders(timed, monkeypatch):
    monkeypatch.setattr(step, "NAMED", 1000)
    row = measured("step tiny 2x3")
    kernels = {each["name"]: each["calls"] for each in row["kernels"]}
    layers = CASES["step tiny 2x3"].target_layers
    for op in ("decode_self_attention", "decode_cross_attention"):
        assert kernels[f"spear_fast::{op}"] == layers
    assert kernels["spear_fast::beam_step"] == 1
    assert "spear_fast::attention" not in kernels
    assert row["p50"] == pytest.approx(0.5 / row["steps"])
    work = CASES["step tiny 2x3"].step(row["generated"], 4)
    assert row["floor"] == pytest.approx(work.floor(row["limit"]["gbs"], row["limit"]["gflops"]), rel=0.05)
    assert row["busy_us"] >= sum(each["us"] for each in row["kernels"][:5])
    assert "spear_fast::beam_step" in step.report(row)
    json.dumps(row)


def test_a_step_is_timed_where_nobody_may_look_into_it(timed, monkeypatch, capsys):
    def forbidden(run, device):
        raise RuntimeError("no permission")

    monkeypatch.setattr(step, "profiled", forbidden)
    row = measured("step tiny 2x3")
    assert (row["kernels"], row["busy_us"], row["p50"] > 0) == ([], 0, True)
    assert "step tiny 2x3: no kernels: no permission" in capsys.readouterr().out


def test_steps_behind_an_end_that_nobody_has_looked_at_count_too():
    for device in (CPU, torch.device("cuda")):
        looks = [0]
        while looks[-1] < 200:
            looks.append(looks[-1] + interval(device, looks[-1]))
        for tokens in (1, 4, 79, 80, 81, 120):
            assert step.made(device, tokens) == min(look for look in looks if look >= tokens)
    assert step.made(CPU, 80) == 80
    assert step.made(torch.device("cuda"), 120) > 120


def test_steps_that_took_no_time_are_no_measurement(monkeypatch):
    monkeypatch.setattr(step, "interleaved", lambda runs, rounds: {"shorter": [1.0] * rounds, "longer": [0.9] * rounds})
    with pytest.raises(RuntimeError, match="20 further steps took no time"):
        measured("step tiny 2x3")


def test_what_two_runs_share_is_none_of_a_step():
    shorter = {"encode": (4, 1.0), "attend": (20, 2.0), "once": (1, 5.0)}
    longer = {"encode": (4, 1.2), "attend": (60, 6.0), "once": (1, 1.0), "new": (10, 0.5)}
    found = step.between(shorter, longer, 10)
    assert [(kernel.name, kernel.calls, kernel.seconds) for kernel in found] == [
        ("attend", 4, pytest.approx(0.4)),
        ("new", 1, pytest.approx(0.05)),
    ]


def test_names_of_kernels_are_short():
    name = "void at::native::(anonymous namespace)::softmax<float, 4>(float*)"
    assert step.short(name) == "softmax<float, 4>(float*)"
    assert len(step.short("x" * 500)) == step.LONGEST_NAME


def test_beam_search_stands_beside_greedy_decoding_of_as_many_rows(timed):
    greedy, beam = measured("step tiny 6x1"), measured("step tiny 2x3")
    found = step.beside_greedy({**beam, "per_row": 2.0}, [{**greedy, "per_row": 1.8}])
    assert (found["times_greedy"], found["wanted"], found["reached"]) == (0.9, {"times_greedy": 0.833}, True)
    assert not step.beside_greedy({**beam, "per_row": 3.0}, [{**greedy, "per_row": 1.8}])["reached"]
    other = {**greedy, "shape": {**greedy["shape"], "batch": 7}}
    assert step.beside_greedy(beam, [other, beam]) == beam


def test_a_wrong_engine_is_not_timed_and_the_others_are(timed, monkeypatch, tmp_path, capsys):
    right = Generation.by_engine

    def wrong(self, rows=None, slots=None):
        decode = right(self, rows, slots)
        return lambda *most: [tokens + (self.case.beam > 1) for tokens in decode(*most)]

    monkeypatch.setattr(Generation, "by_engine", wrong)
    generate._check_engine.cache_clear()
    options = ["--set", "tiny", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(["bench", "step", *options]) == 1
    generate._check_engine.cache_clear()
    assert "step tiny 2x3: RuntimeError: 0.00% of the engine's tokens are right" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.jsonl")
    assert [row["case"] for row in rows.read(file)] == ["step tiny 6x1"]


def test_a_prediction_has_the_launches_that_are_dispatched_and_is_never_below_the_roofline():
    for case in CASES.values():
        kernels = predict.predicted(case, 100)
        # the ceiling that test_decoding_launches holds
        assert sum(kernel.launches for kernel in kernels) == LAYER * case.target_layers + STEP
        work, total = case.step(100), predict.seconds(kernels)
        assert total > work.floor(predict.H100.gbs, predict.H100.gflops)
        # the work that the shape needs, and no more than activations, norms and the bias besides
        assert work.bytes < sum(kernel.bytes for kernel in kernels)
        assert work.flops <= sum(kernel.flops for kernel in kernels) < 1.05 * work.flops


def test_beams_are_selected_in_six_microseconds():
    """By the model, at 128 utterances of 5 beams; what more utterances add is nothing until blocks must wait."""
    found = {
        name: next(each for each in predict.predicted(CASES[f"step {name}"], 100) if each.name == "beam_step")
        for name in ("512x6 32x4", "512x6 128x5", "512x6 512x5")
    }
    seconds = {name: kernel.seconds(predict.H100) for name, kernel in found.items()}
    assert 4e-6 < seconds["512x6 32x4"] < seconds["512x6 128x5"] < 6e-6
    assert found["512x6 128x5"].waits(predict.H100) > found["512x6 128x5"].work(predict.H100)
    # more utterances than blocks that all multiprocessors hold
    assert found["512x6 512x5"].waits(predict.H100) == 2 * found["512x6 128x5"].waits(predict.H100)
    held = [row for row in nvcc.KERNELS if row.name == "beam_step"]
    assert {nvcc.threads_of(kernel) for kernel in held} == {32 * predict_selection.WARPS}


def test_few_rows_are_bound_by_launches_and_many_by_bytes(capsys):
    assert step.main(["--predict", "--cases", "step 512x6 1x1", "step 1024x12 512x5"]) == 0
    few, many = capsys.readouterr().out.split("step 1024x12 512x5,")
    assert "predicted for one H100 and not measured" in few
    assert "59 launches" in few
    assert "| rms_norm | 1 |" in few.replace("  ", " ")
    share = [float(text.partition(" launches, ")[2].partition(" %")[0]) for text in (few, many)]
    assert share[0] > 80
    assert share[1] < 5


def test_fewer_bytes_of_a_source_are_predicted_for_it_alone(capsys):
    case = CASES["step 512x6 512x5"]
    exact, held = predict.predicted(case, 100), predict.predicted(case, 100, source_size=1)
    for one, other in zip(exact, held, strict=True):
        saved = case.step(100).cross / 2 if one.name == "decode_cross_attention" else 0
        assert one.bytes - other.bytes == pytest.approx(saved)
        assert (one.launches, one.flops) == (other.launches, other.flops)
    assert step.main(["--predict", "--kv-dtype", "fp8", "--cases", "step 512x6 512x5"]) == 0
    assert "bfloat16, keys and values of the source in fp8, after" in capsys.readouterr().out
