"""Audio in, labels out: every format and rate is read as what it is, and what cannot be read is a failed row."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
from labelling_jobs import chirp, read_failed, read_rows, tiny_model, write_audio, write_lines
from scipy.signal import resample_poly

from spear_fast.labelling import LabellingError, LabelOptions, label
from spear_fast.labelling.prepare import SpeechTokens
from spear_fast.speech import read_audio

OPTIONS = LabelOptions(max_length=6)


def label_folder(folder, out, model=None, **options):
    model = model or tiny_model(speech=True)
    summary = label([folder], model, out, LabelOptions(max_length=6, **options), workers=3)
    return summary, {row["id"]: row for row in read_rows(out)}


def same_share(first, second):
    length = min(len(first), len(second))
    assert abs(len(first) - len(second)) <= 1
    return np.mean(np.array(first[:length]) == np.array(second[:length]))


def test_files_are_labelled_as_their_tokens_would_be(tmp_path):
    model = tiny_model(speech=True)
    for number in range(9):
        write_audio(tmp_path / "speech" / f"{number % 3}" / f"{number}.wav", 0.3 + 0.13 * number, seed=number)
    summary, rows = label_folder(tmp_path / "speech", tmp_path / "audio", model)
    assert sorted(rows) == sorted(f"{number % 3}/{number}" for number in range(9))
    tokens = []
    for identifier, row in rows.items():
        samples = read_audio(tmp_path / "speech" / f"{identifier}.wav", 16000).samples
        assert row["source"] == model.wav2vec.encode(samples).tolist()
        tokens.append({"id": identifier, "tokens": row["source"]})
    label([write_lines(tmp_path / "t.jsonl", tokens)], model, tmp_path / "tokens", OPTIONS)
    assert read_rows(tmp_path / "tokens") == list(rows.values())
    assert summary.hours == pytest.approx(sum(0.3 + 0.13 * number for number in range(9)) / 3600, rel=1e-3)
    assert summary.tokenizing_speed > 0
    assert summary.labelling_speed > 0


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_44100_hz_stereo_of_every_format_says_the_same_as_16_khz_mono(tmp_path, suffix):
    generator = np.random.default_rng(0)
    # sound in every band: silence would be tokenized by its rounding noise
    sound = chirp(3.0, 44100) + 0.05 * generator.standard_normal(3 * 44100) * np.linspace(0.1, 1, 3 * 44100)
    (tmp_path / "speech").mkdir()
    soundfile.write(tmp_path / "speech" / "plain.wav", resample_poly(sound, 160, 441), 16000)
    # what the two channels do not share cancels out
    side = 0.1 * np.sin(np.arange(len(sound)))
    soundfile.write(tmp_path / "speech" / f"other.{suffix}", np.stack((sound + side, sound - side), axis=1), 44100)
    _, rows = label_folder(tmp_path / "speech", tmp_path / "out")
    plain, other = rows["plain"]["source"], rows["other"]["source"]
    assert len(set(plain)) > 8
    # another resampler, or a lossy format, moves a few frames across a boundary; misread it would be 2.75 times as long
    assert same_share(plain, other) > (0.85 if suffix in ("wav", "flac") else 0.6)


def test_unreadable_files_are_failed_rows_with_their_reasons(tmp_path):
    folder = tmp_path / "speech"
    write_audio(folder / "good.wav")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "noise.mp3").write_bytes(bytes(range(256)) * 20)
    whole = write_audio(tmp_path / "whole.flac", 2.0).read_bytes()
    (folder / "cut.flac").write_bytes(whole[:40])
    soundfile.write(folder / "silent.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(folder / "short.wav", np.zeros(100, np.float32), 16000)
    bad = chirp(1.0, 16000)
    bad[500] = np.nan
    soundfile.write(folder / "nan.wav", bad, 16000, subtype="FLOAT")
    write_audio(folder / "long.wav", 5.0)
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    for _ in range(2):
        summary, rows = label_folder(folder, tmp_path / "out", max_source_tokens=60)
        assert list(rows) == ["good"]
        failed = {row["id"]: row for row in read_failed(tmp_path / "out")}
        assert list(failed) == ["cut", "empty", "long", "loop", "nan", "noise", "short", "silent"]
        assert len(read_failed(tmp_path / "out")) == summary.failed == 8
    for name in ("cut", "empty", "noise"):
        assert "not readable as audio" in failed[name]["reason"]
    assert "no samples" in failed["silent"]["reason"]
    assert "too short" in failed["short"]["reason"]
    assert "NaN or infinite samples" in failed["nan"]["reason"]
    assert "the limit is 60; cut it, or raise --max-source-tokens" in failed["long"]["reason"]
    assert "there is no file" in failed["loop"]["reason"]
    assert failed["nan"]["source"] == str(folder / "nan.wav")


def test_a_manifest_gives_ids_and_may_name_what_is_not_there(tmp_path):
    write_audio(tmp_path / "a" / "x.flac")
    rows = [{"id": "first", "audio": "a/x.flac"}, {"id": "second", "audio": "a/gone.flac"}]
    label([write_lines(tmp_path / "m.jsonl", rows)], tiny_model(speech=True), tmp_path / "out", OPTIONS)
    assert [row["id"] for row in read_rows(tmp_path / "out")] == ["first"]
    (failed,) = read_failed(tmp_path / "out")
    assert failed["id"] == "second"
    assert "there is no file" in failed["reason"]


def test_audio_needs_a_speech_tokenizer(tmp_path):
    write_audio(tmp_path / "a.wav")
    with pytest.raises(LabellingError, match="no speech tokenizer"):
        label([tmp_path / "a.wav"], tiny_model(), tmp_path / "out", OPTIONS)


def test_a_missing_package_stops_the_job_instead_of_failing_every_row(tmp_path, monkeypatch):
    import sys

    write_audio(tmp_path / "a.wav")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ModuleNotFoundError, match="soundfile"):
        label([tmp_path / "a.wav"], tiny_model(speech=True), tmp_path / "out", OPTIONS)


def test_very_long_recordings_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    import spear_fast.speech

    write_audio(tmp_path / "speech" / "hour.wav", 30.0)
    monkeypatch.setattr(spear_fast.speech, "read_audio", lambda *_: pytest.fail("the audio was read"))
    summary, _ = label_folder(tmp_path / "speech", tmp_path / "out", max_source_tokens=100)
    assert summary.failed == 1
    assert "about 1000 tokens (30 s) long" in read_failed(tmp_path / "out")[0]["reason"]


class Foreign(torch.nn.Module):
    """A speech tokenizer with nothing but the interface of audiolm-pytorch's."""

    codebook_size = 30
    target_sample_hz = 8000

    def forward(self, wave, flatten=True):
        return (wave[:, ::400].abs() * 100).long().clamp(max=29)


def test_a_foreign_speech_tokenizer_gets_audio_at_its_own_rate():
    tokens = SpeechTokens(Foreign())
    assert (tokens.sample_rate, tokens.tokens_per_second) == (8000, None)
    samples = np.linspace(0, 0.2, 4000, dtype=np.float32)
    assert tokens.encode(samples).tolist() == (samples[::400] * 100).astype(int).tolist()
