"""What changes a label's meaning is obeyed or refused, never dropped: segments, kinds of files, loops, sources."""

from __future__ import annotations

import base64
import glob
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from labelling_jobs import chirp, random_rows, read_failed, read_rows, shard_bytes, tiny_model, write_audio, write_lines

from spear_fast.labelling import LabellingError, LabelOptions, label
from spear_fast.labelling.labeller import is_repetitive
from spear_fast.labelling.sources import open_sources

OPTIONS = LabelOptions(max_length=6, rows_per_shard=4)


class Warnings:
    """Keeps what a job warns of."""

    def __init__(self):
        self.messages = []

    def __call__(self, event, **fields):
        if event == "warning":
            self.messages.append(fields["message"])

    def close(self):
        pass


def speech_model():
    return tiny_model(speech=True)


def test_a_segment_of_a_manifest_is_labelled_and_nothing_else(tmp_path):
    path = write_audio(tmp_path / "a.wav", 6.0)
    whole, _ = soundfile.read(path, dtype="float32")
    rows = [{"id": f"s{index}", "audio": "a.wav", "offset": 2 * index, "duration": 2.0} for index in range(3)]
    rows += [{"id": "rest", "audio": "a.wav", "offset": 4.5}, {"id": "whole", "audio": "a.wav", "duration": None}]
    rows += [
        {"id": "past", "audio": "a.wav", "offset": 5, "duration": 3},
        {"id": "text", "audio": "a.wav", "offset": "x"},
    ]
    rows += [{"id": "negative", "audio": "a.wav", "offset": -1}, {"id": "none", "audio": "a.wav", "duration": 0}]
    rows += [{"id": "other", "audio": "a.wav", "start": 1.5}, {"id": "true", "audio": "a.wav", "duration": True}]
    label([write_lines(tmp_path / "l.jsonl", rows)], speech_model(), tmp_path / "out", OPTIONS)
    encode = speech_model().wav2vec.encode
    found = {row["id"]: row["source"] for row in read_rows(tmp_path / "out")}
    assert found == {
        **{f"s{index}": encode(whole[32000 * index : 32000 * (index + 1)]).tolist() for index in range(3)},
        "rest": encode(whole[72000:]).tolist(),
        "whole": encode(whole).tolist(),
    }
    failed = {row["id"]: row["reason"] for row in read_failed(tmp_path / "out")}
    assert list(failed) == ["past", "text", "negative", "none", "other", "true"]
    assert "from 5 s to 8 s is not in the file, which is 6 s long" in failed["past"]
    assert "'offset' must be a number of seconds" in failed["text"]
    assert "'start' is not understood" in failed["other"]


def test_segments_in_csv_and_manifests_of_nemo(tmp_path):
    write_audio(tmp_path / "a.wav", 3.0)
    (tmp_path / "s.csv").write_text("id, audio, offset, duration\nx, a.wav, 1, 1.5\ny, a.wav,,\n")
    nemo = [{"audio_filepath": "a.wav", "duration": 1.0, "text": "t"}]
    nemo += [{"audio_filepath": "a.wav", "offset": 1.0, "duration": 1.0}]
    listing = open_sources([tmp_path / "s.csv", write_lines(tmp_path / "n.jsonl", nemo)])
    assert [(item.id, item.offset, item.duration) for item in listing.items(0, 4)] == [
        *[("x", 1.0, 1.5), ("y", 0.0, None)],
        *[("a", 0.0, 1.0), ("a@1.0", 1.0, 1.0)],
    ]


def test_addresses_are_refused_as_such(tmp_path):
    rows = [{"id": "a", "audio": "https://example.org/a.wav"}, {"id": "b", "audio": "s3://bucket/b.wav"}]
    (item, other) = open_sources([write_lines(tmp_path / "l.jsonl", rows)]).items(0, 2)
    assert item.problem == "https://example.org/a.wav is a URL; download the file and give its path."
    assert "s3://bucket/b.wav is a URL" in other.problem
    with pytest.raises(LabellingError, match=r"file:///tmp/x\.wav is a URL; download"):
        open_sources(["file:///tmp/x.wav"])


def test_a_folder_takes_all_that_libsndfile_reads_and_names_the_rest(tmp_path):
    folder = tmp_path / "speech"
    kinds = {"a.wav": "WAV", "b.aiff": "AIFF", "c.au": "AU", "d.caf": "CAF", "e.w64": "W64", "f.rf64": "RF64"}
    kinds |= {"g.sph": "NIST", "h.OGA": "OGG", "i.opus": "OGG", "j.snd": "AU", "k.aifc": "AIFF"}
    folder.mkdir()
    for name, kind in kinds.items():
        subtype = {"i.opus": "OPUS", "h.OGA": "VORBIS"}.get(name, "PCM_16")
        soundfile.write(folder / name, chirp(0.5, 48000), 48000, format=kind, subtype=subtype)
    for name in ("x.m4a", "y.m4a", "notes.txt", "README"):
        (folder / name).write_bytes(b"?")
    seen = Warnings()
    summary = label([folder], speech_model(), tmp_path / "out", OPTIONS, report=seen)
    assert [row["id"] for row in read_rows(tmp_path / "out")] == [*"abcdefghijk"]
    assert summary.failed == 0
    assert seen.messages == ["passed over files that are no audio: .m4a (2), .txt (1), no suffix (1)."]


def test_a_folder_of_token_files_is_all_of_them(tmp_path):
    for name in ("b/2", "a/1"):
        path = tmp_path / "tokens" / f"{name}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"id": [f"{name}-x", f"{name}-y"], "tokens": [[1], [2]]}), path)
    label([tmp_path / "tokens"], tiny_model(), tmp_path / "out", OPTIONS)
    assert [row["id"] for row in read_rows(tmp_path / "out")] == ["a/1-x", "a/1-y", "b/2-x", "b/2-y"]


@pytest.mark.parametrize("period", [17, 24, 33, 40])
def test_a_loop_of_a_whole_sentence_is_repetitive(period):
    sentence = np.random.default_rng(period).permutation(250)[:period]
    assert is_repetitive(np.concatenate((np.arange(7), np.tile(sentence, 12))))
    assert is_repetitive(np.tile(sentence, 5))
    assert not is_repetitive(np.tile(sentence, 4))
    sentence = np.frombuffer(b"thank you for watching the video. ", np.uint8)
    assert is_repetitive(np.tile(sentence, 12).astype(np.int64))


def test_tokens_that_changed_since_are_noticed_on_resume(tmp_path):
    rows = random_rows(12)
    path, out = write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out"
    label([path], tiny_model(), out, OPTIONS)
    before = shard_bytes(out)
    write_lines(path, [*rows[:5], {**rows[5], "tokens": [1, 2, 3]}, *rows[6:]])
    with pytest.raises(LabellingError, match=r"the source of 1 row has changed .*'u5'\. Put it back, add --rel"):
        label([path], tiny_model(), out, OPTIONS)
    assert shard_bytes(out) == before
    assert label([path], tiny_model(), out, OPTIONS, relabel_changed=True).rows == 12
    changed = [name for name, content in shard_bytes(out).items() if content != before[name]]
    assert changed == ["labels-00001-of-00003.parquet"]
    assert read_rows(out)[5]["source"] == [1, 2, 3]
    label([path], tiny_model(), out, OPTIONS)


def test_audio_that_changed_since_is_noticed_on_resume(tmp_path):
    for name in "abcde":
        write_audio(tmp_path / "speech" / f"{name}.wav", 0.5)
    (tmp_path / "speech" / "f.wav").write_bytes(b"")
    source, out = [tmp_path / "speech"], tmp_path / "out"
    label(source, speech_model(), out, OPTIONS)
    # labelled and gone, or failed and mended, is no other source
    (tmp_path / "speech" / "a.wav").rename(tmp_path / "a.wav")
    (tmp_path / "speech" / "a.wav").symlink_to("nowhere")
    write_audio(tmp_path / "speech" / "f.wav", 0.4)
    assert label(source, speech_model(), out, OPTIONS).rows_this_run == 0
    write_audio(tmp_path / "speech" / "b.wav", 0.6)
    os.utime(tmp_path / "speech" / "d.wav", (1, 1))
    with pytest.raises(LabellingError, match=r"of 2 rows has changed .*'b', 'd'"):
        label(source, speech_model(), out, OPTIONS)


def test_added_rows_are_told_where_to_go(tmp_path):
    path, out = write_lines(tmp_path / "t.jsonl", random_rows(8)), tmp_path / "out"
    label([path], tiny_model(), out, OPTIONS)
    write_lines(path, random_rows(9))
    with pytest.raises(
        LabellingError, match=r"rows was 8 and is 9\. Label rows that were added into a folder of their"
    ):
        label([path], tiny_model(), out, OPTIONS)


def rewrite(path, **changes):
    """Writes a shard's rows again with another record."""
    table = pq.read_table(path)
    record = json.loads(pq.read_metadata(path).metadata[b"spear_fast"])
    record = {name: value for name, value in {**record, **changes}.items() if value is not None}
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({b"spear_fast": json.dumps(record)})


def test_a_folder_of_an_earlier_version_resumes(tmp_path):
    path, out = write_lines(tmp_path / "t.jsonl", random_rows(12)), tmp_path / "out"
    label([path], tiny_model(), out, OPTIONS)
    rows = read_rows(out)
    for shard in (out / "data").glob("*.parquet"):
        rewrite(shard, digest=None, index=None, contents=None)
    seen = Warnings()
    assert label([path], tiny_model(), out, OPTIONS, report=seen).rows_this_run == 0
    assert seen.messages == []
    assert read_rows(out) == rows


@pytest.mark.parametrize("how", ["flipped", "copied", "rows"])
def test_a_shard_that_is_not_what_was_written_is_labelled_again(tmp_path, how):
    path, out = write_lines(tmp_path / "t.jsonl", random_rows(12)), tmp_path / "out"
    label([path], tiny_model(), out, OPTIONS)
    before = shard_bytes(out)
    first, second = (out / "data" / f"labels-0000{index}-of-00003.parquet" for index in range(2))
    if how == "copied":
        shutil.copy(second, first)
    elif how == "rows":
        rewrite(first, digest=None, totals={"rows": 3})
    else:
        content = bytearray(before[first.name])
        content[100] ^= 1
        first.write_bytes(content)
    seen = Warnings()
    label([path], tiny_model(), out, OPTIONS, report=seen)
    assert seen.messages == [f"{first.name} is damaged or of another job and is labelled again."]
    assert shard_bytes(out) == before


def test_what_stands_for_the_source_is_in_the_footer(tmp_path):
    path, out = write_lines(tmp_path / "t.jsonl", random_rows(4)), tmp_path / "out"
    label([path], tiny_model(), out, OPTIONS)
    record = json.loads(pq.read_metadata(out / "data" / "labels-00000-of-00001.parquet").metadata[b"spear_fast"])
    assert record["index"] == 0
    assert len(base64.b64decode(record["contents"])) == 4 * 8


def test_a_folder_that_is_moved_away_under_a_job_is_noticed(tmp_path):
    path, out = write_lines(tmp_path / "t.jsonl", random_rows(12)), tmp_path / "out"

    def move(event, **fields):
        if event == "shard" and not (tmp_path / "moved").exists():
            out.rename(tmp_path / "moved")
            out.mkdir()

    move.close = lambda: None
    options = LabelOptions(max_length=6, rows_per_shard=4, batch_tokens=256)
    with pytest.raises(LabellingError, match=r"no longer holds labels-00000-of-00003\.parquet.*moved or emptied"):
        label([path], tiny_model(), out, options, report=move)


@pytest.mark.parametrize("name", [".lock", ".probe.tmp", ".labels-00000-of-00001.parquet.journal", "failed.jsonl"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    rows = [*random_rows(3), {"id": "bad", "tokens": []}]
    path, out = write_lines(tmp_path / "t.jsonl", rows), tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine").write_text("precious")
    (out / name).symlink_to(tmp_path / "mine")
    if name == "failed.jsonl":
        # written anew at the start, which takes the link away
        label([path], tiny_model(), out, OPTIONS)
        assert [row["id"] for row in read_failed(out)] == ["bad"]
    else:
        with pytest.raises(LabellingError, match=r"it is a link; remove it"):
            label([path], tiny_model(), out, OPTIONS)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_parquet_file_that_shrinks_under_the_job_is_an_error_and_not_its_end(tmp_path):
    rows = random_rows(40_000, longest=30)
    path = tmp_path / "t.parquet"
    table = pa.table({"id": [row["id"] for row in rows], "tokens": [row["tokens"] for row in rows]})
    pq.write_table(table, path, row_group_size=2000)
    code = (
        "import sys, os; from spear_fast.labelling.sources import open_sources;"
        "listing = open_sources([sys.argv[1]]); items = listing.items(0, len(listing)); next(items);"
        "os.truncate(sys.argv[1], 5000)\n"
        "try: [None for _ in items]\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "has changed while it was read; run the command again" in run.stdout


def test_readers_take_the_files_of_labels_as_the_card_says(tmp_path, monkeypatch):
    path, out = write_lines(tmp_path / "t.jsonl", random_rows(12)), tmp_path / "out"
    label([path], tiny_model(), out, OPTIONS)
    monkeypatch.chdir(out)
    lines = [line.strip() for line in (out / "README.md").read_text().splitlines() if "sorted(glob" in line]
    assert len(lines) == 2
    for line in lines:
        assert len(eval(line, {"pandas": pandas, "pyarrow": pa, "glob": glob})) == 12
