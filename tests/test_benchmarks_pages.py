"""README's tables: of the committed rows, a part for each device that has any, and what was missed is in them."""

from __future__ import annotations

import pytest
import torch

from benchmarks import generate, op, pages, picture, plots, predict, rows
from benchmarks.cases import CASES, step_cases
from benchmarks.machine import CPU, environment
from benchmarks.operations import chosen_cases

SETTINGS = op.Settings(CPU, torch.float32, seconds=0.0, quick=True)


def case_of(name):
    return next(case for case in chosen_cases("tiny") if case.op == name)


def test_pages_and_picture_are_of_the_committed_rows():
    for path, text in pages.pages().items():
        assert path.read_text() == text, f"{path.name} and benchmarks/results differ; run make pages"
    assert picture.digest(*pages.best()) in picture.PATH.read_text(), "the picture is not of the rows; run make pages"
    assert pages.main(["--check"]) == 0


def test_the_summary_has_the_engine_beside_each_peer(tmp_path):
    case, common = CASES["b1-beam4"], {"benchmark": "generate", "p50": 0.5, "dtype": "float32", "device": "a"}
    shape, times = case.shape(), {"reference": {"p50": 12.34}, "ctranslate2 float32": {"p50": 1.26}}
    times["ctranslate2 int8_float32"] = {"p50": 1.5}
    variants = ("spear_fast engine", "spear_fast engine int8", "spear_fast", "reference")
    rows.append(tmp_path / "a.jsonl", [{**common, "variant": name, "case": "b1-beam4", "shape": shape, "times": times,
                                        "threads": 2, "tokens_per_second": 128.0} for name in variants])  # fmt: skip
    rows.append(tmp_path / "b.jsonl", [{**common, "variant": "spear_fast engine", "case": "b1-beam4", "shape": shape,
                                        "device": "b", "threads": 2, "tokens_per_second": 1.0,
                                        "times": {}}])  # fmt: skip
    header, _, exact, int8 = lines_of(pages.summary(tmp_path), "speech tokens to text, a")
    assert header[1:] == ["time", "tokens/s", "× spear-tts-pytorch", "× transformers", "× CTranslate2"]
    assert exact[1:] == ["500 ms", "128", "12.3", "", "1.3"]
    assert exact[0] == "1 utterance of 250 tokens, 64 out, float32"
    assert int8[0] == "1 utterance of 250 tokens, 64 out, int8"
    assert int8[1:] == ["500 ms", "128", "12.3", "", "1.5"]


def test_predictions_stand_beside_what_was_measured(tmp_path):
    """Of GPUs alone, the newest row of each step, named with its device."""
    common = {"benchmark": "step", "dtype": "bfloat16", "case": "step 512x6 128x5", "variant": "spear_fast engine"}
    measured = {"device": "H", "driver": "1", "p50": 8e-4, "percent_of_roofline": 75.0, "time": "2026-01-02"}
    rows.append(tmp_path / "h.jsonl", [{**common, **measured}])
    rows.append(tmp_path / "old.jsonl", [{**common, **measured, "device": "O", "p50": 1.0, "time": "2026-01-01"}])
    rows.append(
        tmp_path / "cpu.jsonl", [{**common, "device": "c", "p50": 1.0, "percent_of_roofline": 1.0, "time": "3"}]
    )
    found = {line.split("|")[1].strip(): line for line in pages.predictions(tmp_path).splitlines()[2:]}
    assert list(found) == ["512 × 5", "128 × 5", "32 × 4", "1 × 1"]
    _, _, foreseen, measured_at, _, other, _ = (cell.strip() for cell in found["128 × 5"].split("|"))
    assert measured_at == "800 µs, 75 % (H)"
    assert other == "not yet"
    case = next(case for case in step_cases() if case.name == "step 512x6 128x5")
    wanted = predict.seconds(predict.predicted(case, 100))
    assert foreseen.startswith(f"{1e6 * wanted:.3g} µs, ")
    assert found["1 × 1"].count("not yet") == 2


def test_the_picture_carries_what_it_shows(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"benchmark": "generate", "case": "b8-beam4", "variant": "spear_fast engine", "tokens_per_second": 100.0}
    picture.draw("a", [row], tmp_path / "one.svg")
    picture.draw("a", [row], tmp_path / "two.svg")
    one, two = ((tmp_path / f"{name}.svg").read_text() for name in ("one", "two"))
    assert one == two
    assert picture.digest("a", [row]) in one
    assert picture.digest("a", [{**row, "tokens_per_second": 101.0}]) not in one


def test_tables_are_of_devices_with_rows_and_name_what_was_missed(tmp_path):
    found, _ = op.measured(case_of("append_kv"), SETTINGS)
    missed = [
        {**row, "wanted": {"times": 9e9}, "reached": False} if row["automatic"] else row
        for row in found
    ]  # fmt: skip
    rows.append(tmp_path / "a.jsonl", missed)
    text = pages.written(f"before {pages.BEGIN} old {pages.END} after", pages.tables(tmp_path), "page")
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert "old" not in text
    assert f"### {found[0]['device']}" in text
    assert "9e+09 ×: **missed**" in text
    assert pages.tables(tmp_path / "nothing") == ""
    # a file without rows, and rows that no table is of, make no device
    (tmp_path / "empty.jsonl").write_text("")
    rows.append(tmp_path / "other.jsonl", [{**found[0], "device": "another", "benchmark": "something else"}])
    assert pages.tables(tmp_path).count("### ") == 1
    with pytest.raises(ValueError, match="must hold"):
        pages.written("no markers", "", "page")


def lines_of(text, header):
    """Returns the cells of the lines of the table that begins with a column of this name."""
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith(f"| {header} ")]
    assert len(tables) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[0]]


def test_the_table_of_ops_says_who_computes_how_fast_and_what_was_aimed_at(tmp_path):
    found, _ = op.measured(case_of("rms_norm"), SETTINGS)
    (row,) = (row for row in found if row["automatic"] and row["cache"] == "cold")
    rows.append(tmp_path / "a.jsonl", [{**each, "device": device} for device in ("one", "two") for each in found])
    one, two = pages.tables(tmp_path).split("### two")
    assert one.startswith("### one")
    for part in (one, two):
        header, _, line = lines_of(part, "op, shape")
        cells = dict(zip(header, line, strict=True))
        assert cells["by"] == row["variant"]
        assert cells["time"] == rows.seconds(row["p50"])
        assert cells["of the roofline"].startswith(f"{row['percent_of_roofline']:.0f} %")
        assert cells["as fast as"] == f"{row['times_baseline']['p50']:.2f} × {row['baseline']}"


def test_the_tables_of_generation_say_time_peers_and_memory(tmp_path):
    case = CASES["tiny-mixed"]
    found, _ = generate.measure(case, 1, device=CPU, dtype=torch.float32, peers=False, quick=True)
    memory = {**found[0], "benchmark": "generate memory", "peak_bytes": 2_000_000, "needed_bytes": 1e6,
              "times_needed": 2.0, "wanted": {"times_needed": 1.3}, "reached": False}  # fmt: skip
    versions = {**found[0], "case": "other", "versions": {"ctranslate2": "1.2", "transformers": None}}
    rows.append(tmp_path / "a.jsonl", [*found, memory, versions])
    text = pages.tables(tmp_path)
    assert f"torch {torch.__version__}, {environment()['threads']} threads" in text
    assert "ctranslate2 1.2." in text
    assert "transformers" not in text
    header, _, *lines = lines_of(text, "generation | by | time")
    assert header[:5] == ["generation", "by", "time", "tokens/s", "of the roofline"]
    assert [line[1] for line in lines] == [*(row["variant"] for row in found), found[0]["variant"]]
    assert lines[0][0] == "128×2, B 5, S 5 to 20, beam 4, 2 to 8 tokens, float32"
    assert lines[0][2] == rows.seconds(found[0]["p50"])
    _, _, line = lines_of(text, "generation | by | most memory")
    assert line[1:] == [found[0]["variant"], "2 MB", "2.00", "at most 1.3: **missed**"]


def steps_and_jobs():
    """Returns a row of a step, and rows of the labelling job by the engine and by a peer."""
    shape = dict(CASES["tiny"].shape())
    common = {"dtype": "bfloat16", "variant": "spear_fast engine", "shape": shape, **environment()}
    step = {**common, "benchmark": "step", "case": "step tiny", "p50": 1e-3, "generated": 100,
            "percent_of_roofline": 61.2,
            "bound": "bandwidth", "kernels": [{"name": "attend", "calls": 2, "us": 700.4}], "busy_us": 800.0,
            "times_greedy": 1.31, "wanted": {"percent": 60.0, "times_greedy": 0.833}, "reached": True}  # fmt: skip
    job = {**common, "benchmark": "label", "case": "label tiny", "batch": 512, "p50": 4.0, "times_real_time": 2560.0,
           "hours_for_60000": 23.44, "percent_of_roofline": 70.0, "measured_tokens": shape["tokens"],
           "wanted": {"times_real_time": 1500.0}, "reached": True}  # fmt: skip
    peer = {**job, "variant": "reference", "mode": "batch 4", "batch": 4, "measured_tokens": 4, "engine_times": 150.0,
            "wanted": {"engine_times": 200.0}, "reached": False}  # fmt: skip
    return [step, job, peer]


def test_plots_of_steps_and_of_labelling(tmp_path):
    pytest.importorskip("matplotlib")
    paths = plots.draw(steps_and_jobs(), tmp_path)
    assert [path.name.rpartition("-")[2] for path in paths] == ["step.png", "label.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_the_tables_of_steps_and_of_labelling(tmp_path):
    rows.append(tmp_path / "a.jsonl", steps_and_jobs())
    text = pages.tables(tmp_path)
    _, _, line = lines_of(text, "decoding step")
    assert line == ["64×2, B 2, S 20, beam 4, after 100 tokens, bfloat16", "1000", "61 % (bandwidth)", "1.31",
                    "`attend` 700", "200", "60 %, 0.833 × greedy: reached"]  # fmt: skip
    _, _, ours, theirs = lines_of(text, "job")
    assert ours[1:] == ["spear_fast engine", "512", "4 s", "2560", "23.44", "70 %", "", "times real time 1500: reached"]
    assert theirs[2:4] == ["4", "4 s, from 4 tokens"]
    assert theirs[-2:] == ["150", "engine times 200: **missed**"]


def test_rows_of_earlier_versions_are_read(tmp_path):
    step, *_ = steps_and_jobs()
    old = {("percent_of_limit" if name == "percent_of_roofline" else name): value for name, value in step.items()}
    rows.append(tmp_path / "a.jsonl", [{**old, "bound": "products"}])
    assert rows.read(tmp_path / "a.jsonl") == [{**step, "bound": "matmuls"}]
