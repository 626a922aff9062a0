"""The reference's folder of .pt rows, both ways."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from labelling_jobs import read_failed, read_rows, tiny_model
from reference import load_reference

from spear_fast.labelling import export_rows, import_rows
from spear_fast.labelling.errors import LabellingError
from spear_fast.labelling.rows_pt import RowFormat, natural_order

SPEECH_EOS, TEXT_EOS = 30, 20
FORMAT = RowFormat(num_speech_ids=SPEECH_EOS, num_text_ids=TEXT_EOS)


def save(folder, name, ids, dtype=torch.int64):
    folder.mkdir(exist_ok=True)
    torch.save(torch.tensor(ids, dtype=dtype), folder / f"{name}.pt")


def pairs(out):
    return {row["id"]: (row["source"], row["target"], row["finished"], row["flags"]) for row in read_rows(out)}


def test_rows_as_the_reference_writes_them_are_mended(tmp_path):
    folder = tmp_path / "rows"
    save(folder, "0", [3, 4, SPEECH_EOS, -1, 5, 6, TEXT_EOS])
    # speech shorter than others of its batch: pads equal the delimiter
    save(folder, "1", [3, SPEECH_EOS, -1, -1, -1, 5, TEXT_EOS])
    # the reference went on after the end of the text, and left pads where it did not
    save(folder, "2", [7, SPEECH_EOS, -1, 5, TEXT_EOS, 9, 9])
    save(folder, "3", [7, SPEECH_EOS, -1, 5, TEXT_EOS, 0, 0])
    save(folder, "4", [7, SPEECH_EOS, -1, 5, 6, 7])
    save(folder, "5", [0, 7, -1, TEXT_EOS])
    save(folder, "10", [7, SPEECH_EOS, SPEECH_EOS, -1, 5, TEXT_EOS, TEXT_EOS], torch.int32)
    totals = import_rows(folder, tmp_path / "out", FORMAT)
    assert pairs(tmp_path / "out") == {
        "0": ([3, 4], [5, 6], True, []),
        "1": ([3], [5], True, []),
        "2": ([7], [5], True, []),
        "3": ([7], [5], True, []),
        "4": ([7], [5, 6, 7], False, ["truncated"]),
        "5": ([0, 7], [], True, ["empty"]),
        "10": ([7], [5], True, []),
    }
    assert [row["id"] for row in read_rows(tmp_path / "out")] == ["0", "1", "2", "3", "4", "5", "10"]
    assert (totals.rows, totals.failed, totals.unfinished) == (7, 0, 1)


class Code:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def test_bad_rows_are_set_aside_and_none_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "rows"
    save(folder, "1-good", [1, -1, 2])
    save(folder, "2-none", [1, 2])
    save(folder, "3-speech", [31, -1, 2])
    save(folder, "4-text", [1, -1, 99])
    save(folder, "5-empty", [SPEECH_EOS, -1, 2])
    save(folder, "6-float", [1.0, -1.0, 2.0], torch.float32)
    save(folder, "7-shape", [[1, -1, 2]])
    torch.save(Code(), folder / "8-code.pt")
    (folder / "9-cut.pt").write_bytes((folder / "1-good.pt").read_bytes()[:300])
    totals = import_rows(folder, tmp_path / "out", FORMAT)
    reasons = {failed["id"][0]: failed["reason"] for failed in read_failed(tmp_path / "out")}
    assert (totals.rows, totals.failed) == (1, 8)
    assert list(reasons) == [*"23456789"]
    assert "no delimiter -1" in reasons["2"]
    assert "speech ids must be from 0 to 29, got 31" in reasons["3"]
    assert "text ids must be from 0 to 19, got 99" in reasons["4"]
    assert "no speech ids" in reasons["5"]
    assert "got torch.float32 [3]" in reasons["6"]
    assert "got torch.int64 [1, 3]" in reasons["7"]
    assert "could run code" in reasons["8"]
    assert "truncated" in reasons["9"]
    assert not (tmp_path / "was-run").exists()
    # again: nothing twice
    assert import_rows(folder, tmp_path / "out", FORMAT) == totals
    assert len(read_failed(tmp_path / "out")) == 8


def test_the_reference_reads_what_is_exported(tmp_path):
    generator = np.random.default_rng(0)
    expected = []
    for number in range(12):
        source = generator.integers(0, SPEECH_EOS, generator.integers(1, 20)).tolist()
        target = generator.integers(1, TEXT_EOS, generator.integers(0, 9)).tolist()
        save(tmp_path / "rows", str(number), [*source, SPEECH_EOS, -1, *target, TEXT_EOS])
        expected.append((source, target))
    import_rows(tmp_path / "rows", tmp_path / "labels", FORMAT, rows_per_shard=5)
    assert export_rows(tmp_path / "labels", tmp_path / "again") == 12
    load_reference()
    from spear_tts_pytorch.data import GeneratedAudioTextDataset

    dataset = GeneratedAudioTextDataset(str(tmp_path / "again"))
    assert len(dataset) == 12
    for path, (source, target) in zip(dataset.paths, dataset, strict=True):
        assert (source.tolist(), target.tolist()) == expected[int(path.stem)]
        assert source.dtype == torch.int64
    index = (tmp_path / "again" / "ids.csv").read_text().splitlines()
    assert index[:3] == ["file,id", "0.pt,0", "1.pt,1"]


def test_an_export_can_be_imported_again(tmp_path):
    save(tmp_path / "rows", "a", [3, 4, SPEECH_EOS, -1, 5, 6, TEXT_EOS])
    import_rows(tmp_path / "rows", tmp_path / "labels", FORMAT)
    export_rows(tmp_path / "labels", tmp_path / "again")
    import_rows(tmp_path / "again", tmp_path / "twice", FORMAT)
    (row,) = read_rows(tmp_path / "twice")
    # what the file no longer tells is that the label had ended
    assert (row["source"], row["target"], row["finished"]) == ([3, 4], [5, 6], False)


def test_the_format_of_a_model(tmp_path):
    model = tiny_model(autoset_text_eos_id=False, text_pad_id=7)
    row_format = RowFormat.of_model(model)
    assert row_format == RowFormat(num_speech_ids=30, num_text_ids=20, text_eos=False, text_pad_id=7)
    source, target, _ = row_format.split(np.array([1, 30, -1, 7, 3, 7, 0]))
    assert (source.tolist(), target.tolist()) == ([1], [3, 0])


def test_export_does_not_overwrite_and_leaves_nothing_half(tmp_path, monkeypatch):
    save(tmp_path / "rows", "a", [3, -1, 5])
    import_rows(tmp_path / "rows", tmp_path / "labels", FORMAT)
    with pytest.raises(LabellingError, match="exists already"):
        export_rows(tmp_path / "labels", tmp_path / "rows")

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data: full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(LabellingError, match="cannot write"):
        export_rows(tmp_path / "labels", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels", "rows"]


@pytest.mark.parametrize("where", ["missing", "file", "empty"])
def test_a_folder_without_rows_is_an_error(tmp_path, where):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabellingError, match=r"not a folder|no \.pt row"):
        import_rows(tmp_path / where, tmp_path / "out", FORMAT)
    with pytest.raises(LabellingError, match="no labels in"):
        export_rows(tmp_path / where, tmp_path / "out")


def test_another_format_on_the_same_folder_is_an_error(tmp_path):
    save(tmp_path / "rows", "a", [3, -1, 5])
    import_rows(tmp_path / "rows", tmp_path / "out", FORMAT)
    with pytest.raises(LabellingError, match=r"rows\.num_text_ids was 20 and is 21"):
        import_rows(tmp_path / "rows", tmp_path / "out", RowFormat(num_speech_ids=30, num_text_ids=21))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"]


def test_a_row_that_changed_since_is_noticed(tmp_path):
    for name in "abc":
        save(tmp_path / "rows", name, [3, -1, 5])
    (tmp_path / "rows" / "c.pt").write_bytes(b"")
    import_rows(tmp_path / "rows", tmp_path / "out", FORMAT)
    save(tmp_path / "rows", "c", [3, -1, 5])
    import_rows(tmp_path / "rows", tmp_path / "out", FORMAT)
    save(tmp_path / "rows", "b", [3, 4, -1, *[5] * 20])
    with pytest.raises(LabellingError, match=r"the source of 1 row has changed .*'b'"):
        import_rows(tmp_path / "rows", tmp_path / "out", FORMAT)
    import_rows(tmp_path / "rows", tmp_path / "out", FORMAT, relabel_changed=True)
    assert pairs(tmp_path / "out")["b"][0] == [3, 4]


def test_an_export_takes_away_nothing_of_the_users(tmp_path):
    save(tmp_path / "rows", "a", [3, -1, 5])
    import_rows(tmp_path / "rows", tmp_path / "labels", FORMAT)
    (tmp_path / ".new.tmp").mkdir()
    (tmp_path / ".new.tmp" / "mine").write_text("precious")
    export_rows(tmp_path / "labels", tmp_path / "new")
    assert (tmp_path / ".new.tmp" / "mine").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.tmp", "labels", "new", "rows"]


def test_natural_order():
    names = ["10", "2", "a10", "a2", "1", "b"]
    assert sorted(names, key=natural_order) == ["1", "2", "10", "a2", "a10", "b"]
