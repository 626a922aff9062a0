"""`spear-fast info`, `import-pt`, `export-pt`, and what a running job shows."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import sys
import termios

import pytest
import torch
from labelling_jobs import read_rows, tiny_model

from spear_fast import __version__, cli
from spear_fast.labelling.progress import Bar, JsonEvents, Lines, clock


def test_info_names_versions_devices_and_providers(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["spear-fast"], facts["torch"]) == (__version__, torch.__version__)
    assert facts["devices"][0]["device"] == "cpu"
    assert len(facts["devices"]) == 1 + torch.cuda.device_count()
    assert "numpy" in facts["packages"]
    names = {"append_kv", "decode_self_attention", "decode_cross_attention"}
    assert names <= {row["op"] for row in facts["ops"]}

    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    for name in names:
        assert re.search(rf"^{name} .*\breference\b", text, re.MULTILINE)


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"spear-fast {__version__}\n"


def save_rows(folder, *rows):
    folder.mkdir()
    for number, row in enumerate(rows):
        torch.save(torch.tensor(row), folder / f"{number}.pt")
    return folder


@pytest.mark.parametrize("by_model", [True, False])
def test_rows_of_the_reference_come_in_and_go_out(tmp_path, capsys, by_model):
    rows = save_rows(tmp_path / "rows", [3, 4, 30, -1, 5, 20], [7, 30, -1, 6, 6, 20], [99, -1, 1])
    tiny_model().save_pretrained(tmp_path / "model")
    sizes = ["--model", str(tmp_path / "model")] if by_model else ["--num-speech-ids", "30", "--num-text-ids", "20"]
    assert cli.main(["import-pt", str(rows), "--out", str(tmp_path / "labels"), *sizes]) == 3
    assert "2 rows imported" in capsys.readouterr().out
    assert [(row["source"], row["target"]) for row in read_rows(tmp_path / "labels")] == [([3, 4], [5]), ([7], [6, 6])]
    assert cli.main(["export-pt", str(tmp_path / "labels"), "--out", str(tmp_path / "back")]) == 0
    assert "2 rows written" in capsys.readouterr().out
    assert torch.load(tmp_path / "back" / "1.pt").tolist() == [7, -1, 6, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import-pt", "{rows}", "--out", "{new}"], "needs --model, or both"),
        (["import-pt", "{rows}", "--out", "{new}", "--num-text-ids", "5"], "needs --model, or both"),
        (["import-pt", "{new}", "--out", "{new}", "--num-text-ids", "5", "--num-speech-ids", "5"], "is not a folder"),
        (["export-pt", "{rows}", "--out", "{new}"], "no labels in"),
        (["export-pt", "{new}", "--out", "{rows}"], "exists already"),
    ],
)
def test_mistakes_with_rows_are_one_sentence(tmp_path, capsys, arguments, message):
    rows = save_rows(tmp_path / "rows", [3, -1, 5])
    assert cli.main([argument.format(rows=rows, new=tmp_path / "new") for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("spear-fast: error: ")
    assert message in line


def play(reporter):
    reporter("start", rows=100, done=20, shards=4, shards_done=1, fingerprint="f")
    reporter("prepared", rows=48, failed=2, audio_seconds=480.0, seconds=2.0)
    reporter("batch", rows=10, tokens=50, source_tokens=9, audio_seconds=9.0, seconds=9.0, restored=True)
    reporter("batch", rows=38, tokens=1500, source_tokens=9, audio_seconds=300.0, seconds=10.0, restored=False)
    reporter("warning", message="careful")
    reporter.close()


RATES = "150 tokens/s, tokenizing 240x, labelling 30.0x real time"


def test_lines_for_logs():
    stream = io.StringIO()
    play(Lines(stream, every=0))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "spear-fast: 20/100 utterances are done; shards in all: 4"
    assert lines[1].startswith("spear-fast: 22/100 utterances, tokenizing 240x, ")
    assert lines[3].startswith(f"spear-fast: 70/100 utterances, {RATES}, ")
    assert lines[3].endswith(" left")
    assert lines[4] == "spear-fast: warning: careful"
    quiet = io.StringIO()
    play(Lines(quiet))
    assert len(quiet.getvalue().splitlines()) == 3


def test_a_bar_on_a_terminal():
    stream = io.StringIO()
    play(Bar(stream))
    last = stream.getvalue().split("\r")[-1]
    assert "70%" in last
    assert "70/100" in last
    assert RATES in last
    assert "careful" in stream.getvalue()


@pytest.mark.parametrize("size", [(0, 0), (24, 100)])
def test_a_bar_on_terminals_of_any_size(monkeypatch, size):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, size)
    shown = b""
    with open(follower, "w", encoding="utf-8") as stream:
        # tqdm looks at the size of standard error alone
        monkeypatch.setattr(sys, "stderr", stream)
        play(Bar())
        os.set_blocking(leader, False)
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(leader, 10_000):
                shown += chunk
    os.close(leader)
    assert b"70/100" in shown
    assert b"150 tokens/s" in shown


def test_json_events_are_lines():
    stream = io.StringIO()
    play(JsonEvents(stream))
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == [
        *("start", "prepared", "batch", "batch", "warning")
    ]


def test_durations():
    assert [clock(seconds) for seconds in (0, 59.6, 61, 3600, 360000)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "100:00:00",
    ]
