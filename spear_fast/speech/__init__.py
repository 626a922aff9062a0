"""From sound to semantic tokens: reading audio files and a small speech tokenizer."""

from spear_fast.speech.audio import Audio, AudioError, audio_seconds, read_audio
from spear_fast.speech.tokenizer import MelKMeansTokenizer

__all__ = ["Audio", "AudioError", "MelKMeansTokenizer", "audio_seconds", "read_audio"]
