"""A bad row is one row: whatever is wrong with it goes to failed.jsonl, and all others are labelled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from labelling_jobs import letters_tokenizer, random_rows, read_failed, read_rows, tiny_model, write_audio, write_lines

from spear_fast.labelling import LabellingError, LabelOptions, import_rows, label, read_labels
from spear_fast.labelling.prepare import SpeechTokens
from spear_fast.labelling.rows_pt import RowFormat
from spear_fast.labelling.sources import open_sources

OPTIONS = LabelOptions(max_length=6, rows_per_shard=5)


def label_all(sources, out, model=None, **options):
    """Returns the ids of labelled rows, and the reasons of the failed ones by id."""
    label(sources, model or tiny_model(), out, LabelOptions(max_length=6, rows_per_shard=5, **options))
    return [row["id"] for row in read_rows(out)], {row["id"]: row["reason"] for row in read_failed(out)}


@pytest.mark.parametrize("error", [TypeError("no"), KeyError("no"), RecursionError("no"), ZeroDivisionError("no")])
def test_a_row_that_cannot_be_read_for_whatever_reason_fails_alone(tmp_path, monkeypatch, error):
    from spear_fast import speech

    for name in "abc":
        write_audio(tmp_path / "speech" / f"{name}.wav", 0.5)
    read = speech.read_audio

    def fails(path, *arguments, **options):
        if path.stem == "b":
            raise error
        return read(path, *arguments, **options)

    monkeypatch.setattr(speech, "read_audio", fails)
    done, failed = label_all([tmp_path / "speech"], tmp_path / "out", tiny_model(speech=True))
    assert done == ["a", "c"]
    assert "no" in failed["b"]


def test_a_file_of_raw_samples_is_a_failed_row(tmp_path):
    write_audio(tmp_path / "a.wav")
    (tmp_path / "b.raw").write_bytes(bytes(32000))
    os.mkfifo(tmp_path / "c.wav")
    rows = [{"id": name[0], "audio": name} for name in ("a.wav", "b.raw", "c.wav", "/dev/zero")]
    done, failed = label_all([write_lines(tmp_path / "l.jsonl", rows)], tmp_path / "out", tiny_model(speech=True))
    assert done == ["a"]
    assert "no audio of a known kind" in failed["b"]
    assert "no regular file" in failed["c"]
    assert "no regular file" in failed["/"]


def overflowing_model():
    """Returns a model of which one speech token leaves the range of float16 inside the encoder."""
    model = tiny_model()
    with torch.no_grad():
        model.token_emb["speech"].weight[29] = 65000
        model.source_transformer.layers[0][2][4].bias.fill_(600)
    return model


def test_a_row_that_overflows_half_precision_fails_alone_with_the_reason_that_holds(tmp_path):
    rows = [{"id": f"u{index}", "tokens": [1, 2, 29 if index == 13 else 3]} for index in range(20)]
    source = write_lines(tmp_path / "t.jsonl", rows)
    for _ in range(2):
        done, failed = label_all([source], tmp_path / "out", overflowing_model(), dtype="float16")
        assert done == [f"u{index}" for index in range(20) if index != 13]
        assert list(failed) == ["u13"]
        assert "leave the range of float16; use --dtype float32" in failed["u13"]
    done, failed = label_all([source], tmp_path / "exact", overflowing_model())
    assert (len(done), failed) == (20, {})


def test_weights_that_overflow_in_half_precision_are_named(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.token_emb["speech"].weight[0, 0] = 1e6
    source = write_lines(tmp_path / "t.jsonl", random_rows(3))
    with pytest.raises(LabellingError, match=r"weights \S+\.weight are not finite in float16"):
        label([source], model, tmp_path / "out", LabelOptions(dtype="float16"))


def test_a_score_out_of_range_is_put_down_to_the_length_penalty(tmp_path):
    source = write_lines(tmp_path / "t.jsonl", random_rows(20))
    done, failed = label_all([source], tmp_path / "out", length_penalty=-600.0)
    assert len(done) + len(failed) == 20
    assert failed
    assert all("--length-penalty -600 leaves no hypothesis" in reason for reason in failed.values())


def test_a_ban_that_leaves_no_token_is_named(tmp_path):
    model = tiny_model(autoset_text_eos_id=False, num_text_token_ids=3)
    source = write_lines(tmp_path / "t.jsonl", random_rows(4))
    done, failed = label_all([source], tmp_path / "out", model, no_repeat_ngram_size=1)
    assert done == []
    assert all("--no-repeat-ngram-size 1 leaves no hypothesis" in reason for reason in failed.values())


def test_a_label_that_the_tokenizer_cannot_decode_fails_alone(tmp_path):
    source = write_lines(tmp_path / "t.jsonl", random_rows(12))
    model = tiny_model(text=True)
    label([source], model, tmp_path / "whole", OPTIONS)
    wanted = read_rows(tmp_path / "whole")

    class Fussy:
        def __init__(self):
            self._tokenizer = letters_tokenizer()

        def to_str(self):
            return self._tokenizer.to_str()

        def decode_batch(self, rows):
            if wanted[4]["target"] in rows:
                raise OverflowError("this one")
            return self._tokenizer.decode_batch(rows)

    model.tokenizer = Fussy()
    done, failed = label_all([source], tmp_path / "out", model)
    same = [row["id"] for row in wanted if row["target"] == wanted[4]["target"]]
    assert sorted(failed) == sorted(same)
    assert set(failed.values()) == {"OverflowError: this one"}
    assert len(done) == 12 - len(same)


def test_lines_that_are_no_rows_fail_alone_be_they_the_first(tmp_path):
    lines = ['{"id": "a", "tok', "[" * 200_000, '{"id": "b", "tokens": [1]}', '{"id": {}, "tokens": [1]}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    done, failed = label_all([tmp_path / "t.jsonl"], tmp_path / "out")
    assert done == ["b"]
    assert failed == {
        "t.jsonl:1": "the line is not JSON.",
        "t.jsonl:2": "the line is nested too deeply.",
        "t.jsonl:4": "the row has no id.",
    }
    write_audio(tmp_path / "x.wav")
    (tmp_path / "l.jsonl").write_text('{"id": "a", "aud\n{"id": "b", "audio": "x.wav"}\n' + "[" * 200_000)
    done, failed = label_all([tmp_path / "l.jsonl"], tmp_path / "audio", tiny_model(speech=True))
    assert done == ["b"]
    assert list(failed) == ["l.jsonl:1", "l.jsonl:3"]


def test_ids_in_parquet_are_text_or_fail_alone(tmp_path):
    tokens = pa.array([[1], [2], [3]])
    for number, ids in enumerate(
        (
            pa.array([b"utt1", b"\xff\xfe", b"utt3"]),
            pa.array([b"utt1", b"\xff\xfe", b"utt3"]).cast(pa.large_binary()),
            # not checked where it is read
            pa.StringArray.from_buffers(3, *pa.array([b"utt1", b"\xff\xfe", b"utt3"]).buffers()[1:]),
        )
    ):
        pq.write_table(pa.table({"id": ids, "tokens": tokens}), tmp_path / "t.parquet")
        done, failed = label_all([tmp_path / "t.parquet"], tmp_path / f"out{number}")
        assert done == ["utt1", "utt3"]
        assert failed == {"t.parquet:2": "the id is not text in UTF-8."}


def test_other_columns_of_parquet_are_not_looked_at(tmp_path):
    ids, tokens = pa.array(["a", "b"]), pa.array([[1], [2]])
    pq.write_table(
        pa.Table.from_arrays([ids, ids, ids, tokens], ["id", "spk", "spk", "tokens"]), tmp_path / "t.parquet"
    )
    assert label_all([tmp_path / "t.parquet"], tmp_path / "out") == (["a", "b"], {})
    pq.write_table(pa.Table.from_arrays([ids, ids, tokens], ["id", "id", "tokens"]), tmp_path / "d.parquet")
    with pytest.raises(LabellingError, match="has 2 columns id; rename all but one"):
        open_sources([tmp_path / "d.parquet"])


def test_tokens_beyond_64_bits_fail_alone(tmp_path):
    tokens = pa.array([[1], [2**64 - 1]], pa.list_(pa.uint64()))
    pq.write_table(pa.table({"id": ["a", "b"], "tokens": tokens}), tmp_path / "t.parquet")
    done, failed = label_all([tmp_path / "t.parquet"], tmp_path / "out")
    assert done == ["a"]
    assert "below 2**63" in failed["b"]


def test_a_footer_that_promises_more_rows_than_there_are_is_one_sentence(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "tokens": [[1], [2]]}), path)
    listing = open_sources([path])
    (source,) = listing.sources
    source._length = 3
    with pytest.raises(LabellingError, match="holds fewer rows than it says"):
        list(source.items(0, 3))


def test_names_that_are_not_utf8_are_labelled(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    write_audio(tmp_path / "a.wav")
    os.rename(tmp_path / "a.wav", folder + b"/\xe9.wav")
    source = os.fsdecode(folder)
    # as they are a folder of labels, and a reader's
    out = Path(source) / "out"
    label([source], tiny_model(speech=True), out, OPTIONS)
    assert [row.id for row in read_labels(out)] == ["\\xe9"]
    pq.write_table(pa.table({"id": ["a"], "tokens": [[1]]}), tmp_path / "t.parquet")
    os.rename(tmp_path / "t.parquet", folder + b"/\xe9.parquet")
    assert label_all([f"{source}/\udce9.parquet"], tmp_path / "out") == (["a"], {})
    (manifest,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["identity"]["sources"]
    assert manifest["name"] == "\\xe9.parquet"


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet", "t.wav"])
def test_a_source_that_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(LabellingError, match="is a pipe or a device"):
        open_sources([tmp_path / name])
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(LabellingError, match="is a pipe or a device"):
        open_sources([tmp_path / name])


def test_a_bomb_is_a_failed_row(tmp_path):
    write_audio(tmp_path / "speech" / "a.wav", 0.5)
    soundfile.write(tmp_path / "speech" / "b.flac", np.zeros((400_000, 8), np.float32), 192_000)
    soundfile.write(tmp_path / "speech" / "c.wav", np.zeros(3_000_000, np.float32), 2**31 - 1, subtype="PCM_U8")
    loud = np.full(16000, 1e30, np.float32) * np.linspace(-1, 1, 16000, dtype=np.float32)
    soundfile.write(tmp_path / "speech" / "d.wav", loud, 16000, subtype="FLOAT")
    options = dict(max_source_tokens=32)
    done, failed = label_all([tmp_path / "speech"], tmp_path / "out", tiny_model(speech=True), **options)
    assert done == ["a"]
    assert "400000 frames of 8 channels" in failed["b"] or "about" in failed["b"]
    assert "at 2147483647 Hz" in failed["c"]
    assert "not finite" in failed["d"]


def test_rows_of_the_reference_that_lie_about_their_size_fail_alone(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    torch.save(torch.tensor([3, -1, 5]), folder / "1.pt")
    torch.save(torch.zeros(1, dtype=torch.int64).expand(2**40), folder / "2.pt")
    torch.save(torch.zeros(4, dtype=torch.int64, device="meta"), folder / "3.pt")
    torch.save(torch.tensor([3, -1, 5]).to_sparse(), folder / "4.pt")
    os.mkfifo(folder / "5.pt")
    (folder / "6.pt").mkdir()
    totals = import_rows(folder, tmp_path / "out", RowFormat(num_speech_ids=30, num_text_ids=20))
    assert (totals.rows, totals.failed) == (1, 5)
    failed = {row["id"]: row["reason"] for row in read_failed(tmp_path / "out")}
    assert "says that it holds 1099511627776 numbers, and holds fewer" in failed["2"]
    assert "no regular file" in failed["5"]


class OnAnotherDevice(torch.nn.Module):
    """A speech tokenizer with weights on a device that is not the CPU, and an `encode` of its own."""

    target_sample_hz = 8000

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))

    def encode(self, wave):
        raise AssertionError("its interface is the call")

    def forward(self, wave):
        assert (wave.device.type, list(wave.shape)) == ("meta", [1, 80])
        return torch.tensor([[1, 2]])


def test_a_foreign_speech_tokenizer_gets_audio_on_its_own_device():
    assert SpeechTokens(OnAnotherDevice()).encode(np.zeros(80, np.float32)).tolist() == [1, 2]
