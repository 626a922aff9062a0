"""Reading audio and turning it into tokens."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from spear_fast.speech import AudioError, MelKMeansTokenizer, read_audio


def tone(frequency: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def babble(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Returns a sound whose spectrum wanders, so that its tokens differ."""
    time = np.arange(int(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    partials = [
        rng.uniform(0.05, 0.2) * np.sin(2 * np.pi * (base * time + depth * np.sin(2 * np.pi * wobble * time)))
        for base, depth, wobble in zip(
            rng.uniform(150, 3500, 12), rng.uniform(5, 60, 12), rng.uniform(0.5, 4, 12), strict=True
        )
    ]
    envelope = 0.6 + 0.4 * np.sin(2 * np.pi * 3 * time)
    return (envelope * np.sum(partials, axis=0)).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer() -> MelKMeansTokenizer:
    blank = MelKMeansTokenizer(torch.zeros(1, 26))
    features = np.concatenate([blank.features_of(babble(4, seed=seed)) for seed in range(6)])
    return MelKMeansTokenizer.fit(features, 16)


@pytest.mark.parametrize(
    ("suffix", "rate"), [("wav", 16000), ("flac", 44100), ("ogg", 24000), ("mp3", 44100), ("wav", 8000)]
)
def test_every_format_keeps_the_frequency_of_a_tone(tmp_path, suffix, rate):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, tone(440, rate, 2.0), rate)
    audio = read_audio(path, 16000)
    # formats with a codec pad by some blocks
    assert audio.seconds == pytest.approx(2.0, abs=0.15)
    assert len(audio.samples) == pytest.approx(16000 * audio.seconds, abs=2)
    middle = audio.samples[8000:24000]
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 440
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.03)
    assert audio.samples.dtype == np.float32


def test_channels_are_averaged(tmp_path):
    left, right = tone(300, 16000), tone(700, 16000)
    soundfile.write(tmp_path / "stereo.wav", np.stack((left, right), axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "stereo.wav", 16000).samples, (left + right) / 2, atol=1e-6)


def test_stereo_at_44100_gives_nearly_the_tokens_of_16000(tmp_path, tokenizer):
    import soxr

    # halved: 16-bit samples past 1 would be clipped
    sound = 0.5 * babble(3, seed=9)
    soundfile.write(tmp_path / "plain.wav", sound, 16000, subtype="FLOAT")
    resampled = soxr.resample(sound, 16000, 44100)
    soundfile.write(tmp_path / "cd.wav", np.stack((resampled, resampled), axis=1), 44100, subtype="PCM_16")
    first, second = (tokenizer.encode(read_audio(tmp_path / name, 16000).samples) for name in ("plain.wav", "cd.wav"))
    assert len(first) == len(second)
    assert np.mean(first == second) > 0.97
    # read as if it were 16 kHz it would be 2.76 times as long
    assert len(first) == pytest.approx(3 * tokenizer.tokens_per_second, abs=2)


def test_bad_files_get_one_sentence(tmp_path):
    (tmp_path / "text.wav").write_text("no audio at all")
    (tmp_path / "zero.flac").write_bytes(b"")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype=np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, dtype=np.float32), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "whole.flac", tone(440, 16000), 16000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "whole.flac").read_bytes()[:30])
    soundfile.write(tmp_path / "whole.wav", tone(440, 16000), 16000)
    (tmp_path / "short.wav").write_bytes((tmp_path / "whole.wav").read_bytes()[:-2000])
    (tmp_path / "half.flac").write_bytes((tmp_path / "whole.flac").read_bytes()[:-2000])
    (tmp_path / "folder.wav").mkdir()
    wanted = {
        "short.wav": "cut short: its header promises 2000 more bytes",
        "half.flac": "not readable as audio",
        "folder.wav": "no audio file",
        "missing.wav": "no audio file",
        "text.wav": "not readable as audio",
        "zero.flac": "not readable as audio",
        "cut.flac": "not readable as audio",
        "empty.wav": "holds no samples",
        "nan.wav": "NaN or infinite",
    }
    for name, words in wanted.items():
        with pytest.raises(AudioError, match=words) as caught:
            read_audio(tmp_path / name, 16000)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_wav_written_into_a_pipe_is_read_to_its_end(tmp_path):
    soundfile.write(tmp_path / "whole.wav", tone(440, 16000), 16000)
    written = bytearray((tmp_path / "whole.wav").read_bytes())
    at = written.index(b"data") + 4
    for length in (0xFFFFFFFF, 0x7FFFF000):
        written[at : at + 4] = length.to_bytes(4, "little")
        (tmp_path / "piped.wav").write_bytes(written)
        assert read_audio(tmp_path / "piped.wav", 16000).seconds == 1.0


def test_features_weigh_alike_in_every_utterance_and_loudness_does_not_matter(tokenizer):
    sound = babble(3, seed=3)
    features = tokenizer.features_of(sound)
    assert features.shape == (99, 26)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)
    weights = 1 / (1 + 0.15 * np.arange(13))
    np.testing.assert_allclose(features.std(axis=0), np.concatenate((weights, 0.5 * weights)), atol=1e-3)
    assert np.mean(tokenizer.encode(sound) == tokenizer.encode(0.25 * sound)) > 0.95


def test_tokens_are_the_nearest_centres(tokenizer):
    features = tokenizer.features_of(babble(2, seed=4))
    distances = ((features[:, None] - tokenizer.centres.numpy()[None]) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(tokenizer.quantise(features), distances.argmin(axis=-1))
    assert len(set(tokenizer.quantise(features).tolist())) > 3


def test_a_batch_is_its_rows_and_a_silent_or_short_sound_is_no_error(tokenizer):
    wave = torch.from_numpy(np.stack((babble(1, seed=1), babble(1, seed=2))))
    ids = tokenizer(wave)
    assert ids.dtype == torch.int64
    for row, sound in zip(ids, wave, strict=True):
        np.testing.assert_array_equal(row.numpy(), tokenizer.encode(sound.numpy()))
    assert len(tokenizer.encode(np.zeros(16000, dtype=np.float32))) == 32
    assert len(tokenizer.encode(np.zeros(100, dtype=np.float32))) == 0


def test_the_sample_rate_that_is_passed_in_is_believed(tokenizer):
    wave = torch.from_numpy(babble(2, rate=24000))[None]
    assert tokenizer(wave, input_sample_hz=24000).shape[1] == pytest.approx(2 * tokenizer.tokens_per_second, abs=2)


def test_saved_and_loaded_it_is_the_same(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    loaded = MelKMeansTokenizer.load(tmp_path)
    sound = babble(2, seed=5)
    np.testing.assert_array_equal(loaded.encode(sound), tokenizer.encode(sound))
    assert loaded.fingerprint() == tokenizer.fingerprint()
    other = MelKMeansTokenizer(tokenizer.centres + 1e-3)
    assert other.fingerprint() != tokenizer.fingerprint()
    assert not tokenizer.state_dict()


def test_a_damaged_folder_gets_one_sentence(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"speech_tokenizer\.json"):
        MelKMeansTokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    weights = tmp_path / "speech_tokenizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        MelKMeansTokenizer.load(tmp_path)


def test_centres_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[codebook size, 26\]"):
        MelKMeansTokenizer(torch.zeros(4, 20))
