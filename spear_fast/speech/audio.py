"""Audio files as mono float32 at the rate that is asked for; anything else is an error, never a silent misreading."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
PIPED_LENGTH = 0x7FFFF000

Samples = npt.NDArray[np.float32]


class AudioError(ValueError):
    """An audio file that cannot be used, in one sentence."""


@dataclass(frozen=True)
class Audio:
    """samples: `[n]`, float32, mono, nominally in -1..1. sample_rate: Hz. seconds: of the file, before resampling."""

    samples: Samples
    sample_rate: int
    seconds: float


def read_audio(path: str | Path, sample_rate: int) -> Audio:
    """Returns the file's sound, its channels averaged, resampled to `sample_rate` Hz.

    Reads what libsndfile does: wav, flac, ogg, mp3 and more. Raises AudioError for a file that is missing, unreadable,
    corrupt, empty, cut short (as far as its format tells: wav and flac do), or holds NaN or infinite samples.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise AudioError(
            f"reading audio needs the package soundfile ({error}); pip install 'spear-fast[label]'."
        ) from error
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"no audio file {path}; check the path.")
    missing = _bytes_missing(path)
    if missing:
        raise AudioError(f"{path} is cut short: its header promises {missing} more bytes of sound; copy it again.")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        reason = str(error).rstrip(".")
        raise AudioError(f"{path} is not readable as audio ({reason}); give wav, flac, ogg or mp3.") from error
    if not len(samples):
        raise AudioError(f"{path} holds no samples; record it again or leave it out.")
    mono = samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise AudioError(f"{path} holds NaN or infinite samples; export it again.")
    return Audio(resample(mono, rate, sample_rate), sample_rate, len(mono) / rate)


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """Returns `samples` `[n]` at `wanted` Hz instead of `rate` Hz, by soxr's high-quality filter."""
    if rate == wanted:
        return samples
    import soxr

    return np.asarray(soxr.resample(samples, rate, wanted), dtype=np.float32)


def _bytes_missing(path: Path) -> int:
    """Returns how many bytes of sound a wav file's header promises past its end; libsndfile reads on without a word."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            riff, _, wave = struct.unpack("<4sI4s", file.read(12))
            if (riff, wave) != (b"RIFF", b"WAVE"):
                return 0
            while True:
                name, length = struct.unpack("<4sI", file.read(8))
                if name == b"data":
                    # programs that write into a pipe cannot know the length, and say about the largest
                    return 0 if length >= PIPED_LENGTH else max(file.tell() + length - size, 0)
                # chunks begin at even bytes
                file.seek(length + length % 2, 1)
    except (struct.error, OSError):
        return 0
