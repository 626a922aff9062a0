"""The demo labels the committed recordings right, and any other that is dropped in."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RECORDINGS = EXAMPLES / "espeak" / "recordings"


def run(*arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / "demo.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rate(printed: str, voices: str) -> float:
    found = re.search(rf"{voices}: ([\d.]+)% of characters wrong", printed)
    assert found, printed
    return float(found.group(1))


def test_the_committed_recordings_are_labelled_right():
    printed = run()
    truth = [json.loads(line) for line in (RECORDINGS / "truth.jsonl").read_text().splitlines()]
    assert len(truth) == 20
    assert len(list(RECORDINGS.glob("*.flac"))) == 20
    assert sum(not row["seen"] for row in truth) >= 5
    for row in truth:
        assert f"  truth  {row['text']}" in printed
    # the aims of the whole test split, which REPORT.md has: of 13 and 7 recordings one wrong word is 1 to 3 %
    assert rate(printed, "known voices") <= 2
    assert rate(printed, "unseen voice") <= 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = sorted(RECORDINGS.glob("known-*.flac"))[0]
    samples, sample_rate = soundfile.read(source)
    soundfile.write(tmp_path / "mine.wav", samples, sample_rate)
    shutil.copyfile(source, tmp_path / source.name)
    return tmp_path


def test_a_recording_dropped_in_is_labelled_from_its_sound(folder):
    printed = run("--recordings", str(folder)).splitlines()
    labels = {line.split()[0]: printed[index + 1] for index, line in enumerate(printed) if ", confidence " in line}
    assert len(labels) == 2
    mine = next(label for name, label in labels.items() if name.startswith("mine"))
    # the same sound under another name and format: the same label, and no truth to copy it from
    assert len(set(labels.values())) == 1
    assert len(mine.split()) >= 4
