"""Audio files as mono float32 at the rate that is asked for; anything else is an error, never a silent misreading."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from spear_fast.speech.containers import shortcoming, unfinished_at

# what libsndfile reads, but for formats without a header and those of other sciences
AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".mp3", ".oga", ".opus", ".wave", ".bwf", ".rf64", ".w64", ".aif", ".aiff", ".aifc"),
    *(".au", ".snd", ".caf", ".sph", ".nist", ".mp1", ".mp2", ".voc", ".svx", ".8svx", ".ircam", ".sf", ".avr"),
)
# samples of all channels that are read at once
BLOCK_SAMPLES = 1 << 18
# frames times channels that may be read for each frame that may be kept
SAMPLES_PER_FRAME = 4
# libsndfile's way of saying that a header does not tell the length
UNKNOWN_FRAMES = 1 << 62
# a segment may end so much after the file, and a decoder may give so much less than a header says: both are rounded
SLACK_SECONDS = 0.1
# channels whose mean holds less than this share of their energy cancel each other out
CANCELLED_SHARE = 1e-3

Samples = npt.NDArray[np.float32]


class AudioError(ValueError):
    """An audio file that cannot be used, in one sentence."""


@dataclass(frozen=True)
class Audio:
    """samples: `[n]`, float32, mono, nominally in -1..1. sample_rate: Hz. seconds: as read, before resampling."""

    samples: Samples
    sample_rate: int
    seconds: float


def audio_seconds(path: str | Path) -> float | None:
    """Returns how long a file is by its header, in seconds; None when that does not tell. Raises AudioError."""
    path = _existing(path)
    with _opened(path) as sound:
        return None if sound.frames >= UNKNOWN_FRAMES else sound.frames / sound.samplerate


def read_audio(
    path: str | Path,
    sample_rate: int,
    *,
    offset: float = 0.0,
    duration: float | None = None,
    most_frames: int | None = None,
) -> Audio:
    """Returns the file's sound, its channels averaged, resampled to `sample_rate` Hz.

    Reads what libsndfile does: wav, flac, ogg, mp3 and more. Where the channels cancel each other out (opposite
    phases), the loudest is taken alone. A WAV whose recorder was killed before it wrote a length is read to its end.

    offset, duration: seconds, of the segment to read; by default all.
    most_frames: how many frames (samples of one channel) may be read; of all channels together four times as many.

    Raises AudioError for a file that is missing, unreadable, corrupt, empty, cut short (as far as its format tells),
    longer than `most_frames`, shorter than the segment, or holds NaN or infinite samples.
    """
    path = _existing(path)
    missing = shortcoming(path)
    if missing:
        raise AudioError(f"{path} {missing}.")
    with _opened(path) as sound:
        rate = sound.samplerate
        start, wanted = _segment(path, sound, offset, duration)
        _check_size(path, sound, wanted, most_frames)
        mono, loudest = _read(path, sound, start, wanted, most_frames)
        if loudest is not None:
            mono, _ = _read(path, sound, start, wanted, most_frames, channel=loudest)
    if wanted is not None and len(mono) < wanted - SLACK_SECONDS * rate:
        raise AudioError(
            f"{path} is cut short: its header promises {wanted / rate:.1f} s of sound from {offset:g} s on, "
            f"{len(mono) / rate:.1f} s could be decoded; copy it again."
        )
    if not len(mono):
        raise AudioError(f"{path} holds no samples; record it again or leave it out.")
    if not np.isfinite(mono).all():
        raise AudioError(f"{path} holds NaN or infinite samples; export it again.")
    return Audio(resample(mono, rate, sample_rate), sample_rate, len(mono) / rate)


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """Returns `samples` `[n]` at `wanted` Hz instead of `rate` Hz, by soxr's high-quality filter."""
    if rate == wanted:
        return samples
    import soxr

    return np.asarray(soxr.resample(samples, rate, wanted), dtype=np.float32)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise AudioError(f"there is no audio file {path}; check the path.")
    if not path.is_file():
        raise AudioError(f"there is no audio file {path}: it is a folder, a pipe or a device; give a regular file.")
    return path


def _opened(path: Path) -> Any:
    """Returns the file as a `soundfile.SoundFile`. Raises AudioError."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise AudioError(
            f"reading audio needs the package soundfile ({error}); pip install 'spear-fast[label]'."
        ) from error
    unfinished = unfinished_at(path)
    # as bytes: a name need not be UTF-8
    file: bytes | IO[bytes] = os.fsencode(path) if unfinished is None else _finished(path, unfinished)
    try:
        return soundfile.SoundFile(file)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise _unreadable(path, error) from error


def _finished(path: Path, size_at: int) -> IO[bytes]:
    """Returns a RIFF file in memory whose header says that it lasts to its end."""
    content = bytearray(path.read_bytes())
    content[size_at : size_at + 4] = b"\xff" * 4
    return io.BytesIO(content)


def _unreadable(path: Path, error: Exception) -> AudioError:
    reason = str(error).rstrip(".")
    with path.open("rb") as file:
        beginning = file.read(512).lstrip().lower()
    if not beginning:
        reason = "it is empty"
    elif beginning.startswith((b"<!doctype", b"<html", b"<?xml")):
        reason = "its content is a web page"
    elif "not a regular file" in reason or "samplerate must be specified" in reason:
        # libsndfile looks at the suffix where the content says nothing to it
        reason = "its content is no audio of a known kind"
    return AudioError(f"{path} is not readable as audio ({reason}); give wav, flac, ogg or mp3.")


def _segment(path: Path, sound: Any, offset: float, duration: float | None) -> tuple[int, int | None]:
    """Returns the first frame of a segment and how many it has; None when only the file's end tells."""
    rate, frames = sound.samplerate, sound.frames
    start = round(offset * rate)
    wanted = None if duration is None else round(duration * rate)
    if frames >= UNKNOWN_FRAMES:
        return start, wanted
    end = frames if wanted is None else start + wanted
    if end > frames + SLACK_SECONDS * rate or (start >= frames and start):
        raise AudioError(
            f"the segment of {path} from {start / rate:g} s to {end / rate:g} s is not in the file, which is "
            f"{frames / rate:g} s long; check offset and duration, in seconds."
        )
    return start, min(end, frames) - start


def _check_size(path: Path, sound: Any, frames: int | None, most_frames: int | None) -> None:
    if frames is None or most_frames is None:
        return
    if frames > most_frames or frames * sound.channels > SAMPLES_PER_FRAME * most_frames:
        raise AudioError(
            f"{path} holds {frames} frames of {sound.channels} channels at {sound.samplerate} Hz, the limit is "
            f"{most_frames} frames and {SAMPLES_PER_FRAME * most_frames} samples in all; cut it, or export it in mono "
            "at a lower rate."
        )


def _read(
    path: Path, sound: Any, start: int, wanted: int | None, most_frames: int | None, channel: int | None = None
) -> tuple[Samples, int | None]:
    """Returns mono samples, and the loudest channel where the mean of all is next to nothing.

    channel: the one to take instead of the mean.
    """
    blocks: list[Samples] = []
    energy = np.zeros(sound.channels)
    mean_energy, frames = 0.0, 0
    for block in _blocks(path, sound, start, wanted):
        mono = block.mean(axis=1, dtype=np.float32) if channel is None else block[:, channel].copy()
        frames += len(block)
        _check_size(path, sound, frames, most_frames)
        blocks.append(mono)
        if sound.channels > 1 and channel is None:
            energy += np.einsum("ij,ij->j", block, block, dtype=np.float64)
            mean_energy += float(np.dot(mono, mono))
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    cancelled = mean_energy < CANCELLED_SHARE * energy.mean()
    return samples, int(energy.argmax()) if cancelled else None


def _blocks(path: Path, sound: Any, start: int, wanted: int | None) -> Any:
    """Yields frames `[n, channels]`, float32, from `start` on, at most `wanted` of them."""
    import soundfile

    # its read would seek, which fails where the length is not known
    sound.seekable = lambda: False
    left = UNKNOWN_FRAMES if wanted is None else wanted
    size = max(1, BLOCK_SAMPLES // sound.channels)
    try:
        if start or sound.tell():
            sound.seek(start)
        while left > 0:
            block = sound.read(min(size, left), dtype="float32", always_2d=True)
            if not len(block):
                return
            left -= len(block)
            yield block
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise _unreadable(path, error) from error
