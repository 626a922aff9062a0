"""The examples run, and what they print is right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from reference import load_reference

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TRUTH = {
    Path(row["audio"]).stem: row["text"]
    for row in map(json.loads, (EXAMPLES / "espeak" / "recordings" / "truth.jsonl").read_text().splitlines())
}


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_label(tmp_path):
    first, *rows = run("label.py", tmp_path / "labels")
    assert first == "20 utterances, 0 failed"
    labels = {line.split("  ")[0]: line.split("  ")[2] for line in rows}
    assert labels.keys() == TRUTH.keys()
    assert sum(labels[name] == TRUTH[name] for name in TRUTH) >= 17
    # again: the job is done, and its labels are there
    assert run("label.py", tmp_path / "labels")[1:] == rows


def test_generate():
    greedy, *beam, drawn = run("generate.py")
    assert greedy.split(" ", 1)[1] == TRUTH["known-0000"]
    assert drawn.startswith("drawn ")
    scores = [float(re.search(r"\((.*)\)", line)[1]) for line in beam]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert TRUTH["known-0000"] in beam[0]


def test_engine_async():
    *callers, refused = run("engine_async.py")
    assert [line.split(":")[0] for line in callers] == [f"caller {number}" for number in range(8)]
    assert callers[5] == "caller 5: cancelled"
    assert all(re.search(r": \d+ tokens, score -?\d", line) for i, line in enumerate(callers) if i != 5)
    assert refused.startswith("refused: source ids must lie in 0..100, got 1000")


def test_text_to_speech_tokens():
    said, ids = run("text_to_speech_tokens.py", "she drove home")
    assert int(said.split()[0]) == len(ids.split())
    assert all(0 <= int(token) < 256 for token in ids.split())
    assert run("text_to_speech_tokens.py", "she drove home") == [said, ids]


def test_accelerate_reference_says_what_it_needs():
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, str(EXAMPLES / "accelerate_reference.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode in (0, 2)
    if done.returncode:
        assert "this example needs spear-tts-pytorch 0.4.8" in done.stderr
        assert "Traceback" not in done.stderr


def test_accelerate_reference(monkeypatch, capsys):
    # with the tests' stand-ins for what the reference imports and no Python of today has
    monkeypatch.setitem(sys.modules, "spear_tts_pytorch", load_reference())
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import accelerate_reference

    assert accelerate_reference.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["spear-tts-pytorch", "spear_fast"]
    assert lines[2] == "the same tokens: True"


def outputs_of(cells):
    """Returns what the cells print and return, without warnings.

    A kernel sends what a cell prints whenever it comes to it, in one message or in several: they are joined.
    """
    found = []
    for cell in cells:
        printed = [output["text"] for output in cell.get("outputs", ()) if output.get("name") == "stdout"]
        if printed:
            found.append("".join(printed))
        found += [output["data"]["text/plain"] for output in cell.get("outputs", ()) if "data" in output]
    return found


def test_messages_of_a_notebook_are_joined():
    def prints(*texts, name="stdout"):
        return [{"output_type": "stream", "name": name, "text": text} for text in texts]

    value = {"output_type": "execute_result", "data": {"text/plain": "3"}}
    split, whole = prints("seen", " 1\nun", "seen 2\n"), prints("seen 1\nunseen 2\n")
    for outputs in (split, whole):
        cells = [{"outputs": [*outputs, *prints("a warning", name="stderr"), value]}, {}]
        assert outputs_of(cells) == ["seen 1\nunseen 2\n", "3"]


def test_the_notebook_gives_what_it_shows():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    shown = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbformat.validate(shown)
    notebook = nbformat.from_dict(json.loads(json.dumps(shown)))
    resources = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    assert len(outputs_of(shown.cells)) == 5
    number = re.compile(r"-?\d+(?:\.\d+)?")
    for again, before in zip(outputs_of(notebook.cells), outputs_of(shown.cells), strict=True):
        assert number.sub("#", again) == number.sub("#", before)
        # another processor rounds otherwise
        for new, old in zip(map(float, number.findall(again)), map(float, number.findall(before)), strict=True):
            assert new == pytest.approx(old, abs=0.02 if abs(old) < 1 else 1)
