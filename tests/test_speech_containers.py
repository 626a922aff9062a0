"""Audio files that are not what they seem: shortened, unfinished, far too large, cancelled out, or no audio at all."""

from __future__ import annotations

import os

import numpy as np
import pytest
import soundfile
import torch

from spear_fast.speech import AudioError, MelKMeansTokenizer, audio_seconds, read_audio
from spear_fast.speech.containers import shortcoming

RATE = 16000


def noise(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))).astype(np.float32)


def refused(path, **options) -> str:
    with pytest.raises(AudioError) as caught:
        read_audio(path, RATE, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "form", "subtype"),
    [
        *[("a.wav", kind, "PCM_16") for kind in ("WAV", "WAVEX", "RF64", "NIST")],
        ("a.wav", "WAV", "IMA_ADPCM"),
        *[
            ("a.w64", "W64", "PCM_16"),
            ("a.aiff", "AIFF", "PCM_16"),
            ("a.au", "AU", "FLOAT"),
            ("a.svx", "SVX", "PCM_16"),
        ],
        *[("a.caf", "CAF", "PCM_16"), ("a.flac", "FLAC", "PCM_16")],
        *[("a.mp3", "MP3", "MPEG_LAYER_III"), ("a.ogg", "OGG", "VORBIS"), ("a.opus", "OGG", "OPUS")],
    ],
)
def test_a_file_that_was_cut_short_is_noticed_in_every_container(tmp_path, name, form, subtype):
    rate = 48000 if subtype == "OPUS" else RATE
    path = tmp_path / name
    soundfile.write(path, noise(5, rate), rate, format=form, subtype=subtype)
    assert shortcoming(path) is None
    assert read_audio(path, RATE).seconds == pytest.approx(5, abs=0.1)
    content = path.read_bytes()
    path.write_bytes(content[: int(0.6 * len(content))])
    assert any(words in refused(path) for words in ("cut short", "not readable as audio"))


def test_bytes_that_are_missing_are_counted(tmp_path):
    for form in ("RF64", "W64", "AIFF", "AU"):
        path = tmp_path / f"{form}.wav"
        soundfile.write(path, noise(1), RATE, format=form, subtype="PCM_16")
        path.write_bytes(path.read_bytes()[:-3000])
        assert "promises 3000 more bytes of sound; copy it again" in refused(path)


def test_ogg_streams_one_after_the_other_are_noticed(tmp_path):
    soundfile.write(tmp_path / "a.ogg", noise(2), RATE)
    (tmp_path / "two.ogg").write_bytes((tmp_path / "a.ogg").read_bytes() * 2)
    assert "several Ogg streams" in refused(tmp_path / "two.ogg")


def test_a_flac_of_unknown_length_is_read_to_its_end(tmp_path):
    soundfile.write(tmp_path / "a.flac", noise(20), RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    # what an encoder into a pipe writes: no number of samples
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    (tmp_path / "piped.flac").write_bytes(content)
    assert audio_seconds(tmp_path / "piped.flac") is None
    piped, whole = (read_audio(tmp_path / name, RATE) for name in ("piped.flac", "a.flac"))
    np.testing.assert_array_equal(piped.samples, whole.samples)
    assert "the limit is 100000 frames" in refused(tmp_path / "piped.flac", most_frames=100_000)


def test_a_recording_whose_length_was_never_written_is_read_to_its_end(tmp_path):
    for form in ("WAV", "AU"):
        soundfile.write(tmp_path / "a.wav", noise(2), RATE, format=form, subtype="PCM_16")
        content = bytearray((tmp_path / "a.wav").read_bytes())
        at = content.index(b"data") + 4 if form == "WAV" else 8
        content[at : at + 4] = bytes(4)
        (tmp_path / "killed.wav").write_bytes(content)
        if form == "WAV":
            killed, whole = (read_audio(tmp_path / name, RATE) for name in ("killed.wav", "a.wav"))
            np.testing.assert_array_equal(killed.samples, whole.samples)
        else:
            assert "64000 bytes follow" in refused(tmp_path / "killed.wav")


def test_a_bomb_is_refused_by_its_header_and_read_in_blocks(tmp_path, monkeypatch):
    path = tmp_path / "bomb.flac"
    soundfile.write(path, np.zeros((192_000, 8), np.float32), 192_000)
    assert "192000 frames of 8 channels at 192000 Hz" in refused(path, most_frames=300_000)
    asked = []
    read = soundfile.SoundFile.read

    def watched(self, frames=-1, **options):
        asked.append(frames * self.channels)
        return read(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", watched)
    assert read_audio(path, RATE, most_frames=400_000).seconds == 1.0
    assert len(asked) > 5
    assert max(asked) <= 1 << 18
    # a rate that no sound has, and a size to match
    soundfile.write(tmp_path / "fast.wav", noise(1), 2**31 - 1)
    assert "at 2147483647 Hz" in refused(tmp_path / "fast.wav", most_frames=1000)


@pytest.mark.parametrize(("suffix", "channels"), [("wav", 2), ("flac", 1), ("ogg", 2), ("mp3", 1)])
def test_a_segment_is_that_part_of_the_whole(tmp_path, suffix, channels):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([noise(10, seed=seed) for seed in range(channels)], axis=1), RATE)
    whole = read_audio(path, RATE).samples
    part = read_audio(path, RATE, offset=2.5, duration=3.0)
    assert part.seconds == 3.0
    np.testing.assert_allclose(part.samples, whole[40_000:88_000], atol=1e-6)
    np.testing.assert_allclose(read_audio(path, RATE, offset=8.0).samples, whole[128_000:], atol=1e-6)
    # as rounded as durations in manifests are
    assert len(read_audio(path, RATE, offset=7.0, duration=3.05).samples) == len(whole) - 112_000
    for offset, duration in ((8.0, 5.0), (12.0, None), (0.0, 20.0)):
        assert "is not in the file, which is 10" in refused(path, offset=offset, duration=duration)


def test_channels_that_cancel_out_are_not_averaged(tmp_path):
    sound = noise(1)
    soundfile.write(tmp_path / "opposite.wav", np.stack((0.5 * sound, -0.5 * sound, 0 * sound), axis=1), RATE, "FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "opposite.wav", RATE).samples, 0.5 * sound, atol=1e-7)
    other = noise(1, seed=1)
    soundfile.write(tmp_path / "stereo.wav", np.stack((sound, other), axis=1), RATE, "FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "stereo.wav", RATE).samples, (sound + other) / 2, atol=1e-7)


def test_what_is_no_audio_is_called_so(tmp_path):
    (tmp_path / "page.mp3").write_text("\n<!DOCTYPE html><html>404</html>")
    (tmp_path / "text.mp3").write_text("hello " * 100)
    (tmp_path / "b.raw").write_bytes(bytes(32000))
    assert "its content is a web page" in refused(tmp_path / "page.mp3")
    for name in ("text.mp3", "b.raw"):
        assert "its content is no audio of a known kind" in refused(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.wav")
    assert "a pipe or a device; give a regular file" in refused(tmp_path / "pipe.wav")


def test_a_name_that_is_not_utf8_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(1), RATE)
    name = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    os.rename(tmp_path / "a.wav", name)
    assert read_audio(os.fsdecode(name), RATE).seconds == 1.0


def test_features_that_are_not_finite_are_refused():
    tokenizer = MelKMeansTokenizer(torch.zeros(4, 26))
    with pytest.raises(ValueError, match=r"not finite: its samples go up to .*e\+30"):
        tokenizer.encode(noise(1) * np.float32(1e31))


@pytest.mark.parametrize(
    "wrong",
    [
        *[dict(order_decay=float("nan")), dict(slope_weight=1e300), dict(slope_weight="1"), dict(order_decay=-1)],
        *[dict(frames_per_token=0), dict(sample_rate=16000.5), dict(num_mels=0), dict(num_mels=5), dict(num_ceps=True)],
    ],
)
def test_settings_of_a_tokenizer_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match="num_ceps" if wrong == dict(num_mels=5) else name):
        MelKMeansTokenizer(torch.zeros(4, 26), **wrong)


def test_a_saved_tokenizer_is_as_readable_as_any_file_and_a_deep_one_is_damaged(tmp_path):
    MelKMeansTokenizer(torch.zeros(4, 26)).save(tmp_path)
    modes = {(tmp_path / f"speech_tokenizer.{kind}").stat().st_mode for kind in ("json", "safetensors")}
    assert len(modes) == 1
    (tmp_path / "speech_tokenizer.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is damaged"):
        MelKMeansTokenizer.load(tmp_path)
