"""Speaks sentences with espeak-ng: many voices, speeds and pitches, to 16 kHz."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np
import soundfile

from spear_fast.speech.audio import Samples, resample

SAMPLE_RATE = 16000

# accent + variant of espeak-ng 1.51. en-gb counts three times: espeak-ng takes no variant for it, and says nothing.
# the unseen voice was set before any error rate was known: its accent is in training, its formants are in no training
# voice (f5, for one, would have had those of f2)
TRAINING_VOICES = (
    "en-us", "en-us+m1", "en-us+f2", "en-us+m3", "en-gb", "en-gb", "en-gb", "en-gb-x-rp+m4", "en-gb-x-rp+f3",
    "en-gb-scotland+m5", "en-gb-scotland+f4", "en-029+m6", "en-029+f2", "en-gb-x-gbclan+m7", "en-gb-x-gbclan+f1",
    "en-gb-x-gbcwmd+m1",
)  # fmt: skip
UNSEEN_VOICE = "en-us+Annie"


@dataclass(frozen=True)
class Utterance:
    """text: what is said. voice, words_per_minute, pitch (0..99): espeak-ng's. stretch: of the sound, 1 leaves it."""

    id: str
    text: str
    voice: str
    words_per_minute: int
    pitch: int
    stretch: float = 1.0


def check_espeak() -> None:
    """Raises RuntimeError when espeak-ng is not installed, or speaks two voices alike, as it does with unknown ones."""
    if shutil.which("espeak-ng") is None:
        raise RuntimeError(
            "the recipe speaks its sentences with espeak-ng, which is not installed: apt-get install espeak-ng"
        )
    heard: dict[bytes, str] = {}
    for voice in sorted({*TRAINING_VOICES, UNSEEN_VOICE}):
        sound = speak(Utterance("check", "the old painter found a silver key", voice, 160, 50)).tobytes()
        if sound in heard:
            raise RuntimeError(f"espeak-ng speaks {voice} exactly as {heard[sound]}; take another voice or version.")
        heard[sound] = voice


def drawn(name: str, text: str, voice: str, rng: random.Random, *, stretches: tuple[float, ...] = (1.0,)) -> Utterance:
    """Returns an utterance with a speed and a pitch drawn from `rng`."""
    return Utterance(name, text, voice, rng.randint(140, 180), rng.randint(30, 70), rng.choice(stretches))


def speak(utterance: Utterance) -> Samples:
    """Returns the sound of an utterance, `[n]`, mono, at 16 kHz.

    A stretch resamples the sound as if it had another rate, which moves formants and pitch: another throat.
    """
    command = ["espeak-ng", "-v", utterance.voice, "-s", str(utterance.words_per_minute), "-p", str(utterance.pitch)]
    made = subprocess.run([*command, "--stdout", utterance.text], check=True, capture_output=True, timeout=60)
    # espeak-ng cannot seek in a pipe, so the header's length is a placeholder: the data begin after it
    samples, rate = soundfile.read(io.BytesIO(_mended(made.stdout)), dtype="float32")
    return np.asarray(resample(samples, round(rate * utterance.stretch), SAMPLE_RATE), dtype=np.float32)


def _mended(wav: bytes) -> bytes:
    size = len(wav)
    return wav[:4] + (size - 8).to_bytes(4, "little") + wav[8:40] + (size - 44).to_bytes(4, "little") + wav[44:]
