"""The recipe's data: who says what, and its tokens."""

from __future__ import annotations

import json
import multiprocessing
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from corpus import sentences
from speak import SAMPLE_RATE, TRAINING_VOICES, UNSEEN_VOICE, Utterance, drawn, speak

from spear_fast.speech import MelKMeansTokenizer

NUM_SENTENCES = 24300
NUM_TEST_SENTENCES = 300
CODEBOOK_SIZE = 256
LABELLED_MINUTES = 15
# three throats for each training voice
STRETCHES = (0.95, 1.0, 1.05)


@dataclass
class Example:
    utterance: Utterance
    tokens: npt.NDArray[np.int64]
    seconds: float


@dataclass
class Data:
    """training: by training voices. known, unseen: the test sentences, by training voices and by the voice left out."""

    training: list[Example]
    known: list[Example]
    unseen: list[Example]

    def labelled(self) -> list[Example]:
        """Returns the first of the training examples that make up `LABELLED_MINUTES`."""
        chosen, seconds = [], 0.0
        for example in self.training:
            if seconds >= LABELLED_MINUTES * 60:
                break
            chosen.append(example)
            seconds += example.seconds
        return chosen


def planned(seed: int = 0) -> dict[str, list[Utterance]]:
    """Returns every utterance of each part; training and test share no sentence."""
    texts = sentences(NUM_SENTENCES, seed)
    rng = random.Random(seed + 1)
    test, training = texts[:NUM_TEST_SENTENCES], texts[NUM_TEST_SENTENCES:]
    spoken = [
        drawn(f"train-{index:05d}", text, rng.choice(TRAINING_VOICES), rng, stretches=STRETCHES)
        for index, text in enumerate(training)
    ]
    known = [
        drawn(f"known-{i:04d}", text, TRAINING_VOICES[i % len(TRAINING_VOICES)], rng) for i, text in enumerate(test)
    ]
    unseen = [drawn(f"unseen-{i:04d}", text, UNSEEN_VOICE, rng) for i, text in enumerate(test)]
    return {"training": spoken, "known": known, "unseen": unseen}


def _features(utterance: Utterance) -> tuple[npt.NDArray[np.float16], float]:
    samples = speak(utterance)
    # centres play no part in features
    tokenizer = MelKMeansTokenizer(torch.zeros(1, 26), sample_rate=SAMPLE_RATE)
    return tokenizer.features_of(samples).astype(np.float16), len(samples) / SAMPLE_RATE


def prepare(work: Path) -> None:
    """Speaks everything, fits the speech tokenizer on training voices, and writes tokens and test recordings."""
    parts = planned()
    (work / "recordings").mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool() as pool:
        spoken = {name: pool.map(_features, utterances, chunksize=16) for name, utterances in parts.items()}
        tests = [*parts["known"], *parts["unseen"]]
        pool.starmap(record, [(utterance, work / "recordings") for utterance in tests], chunksize=16)
    rng = np.random.default_rng(0)
    sample = np.concatenate([features for features, _ in spoken["training"][::4]]).astype(np.float32)
    sample = sample[rng.permutation(len(sample))[:200_000]]
    tokenizer = MelKMeansTokenizer.fit(sample, CODEBOOK_SIZE, sample_rate=SAMPLE_RATE)
    (work / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(work / "tokenizer")
    with (work / "data.jsonl.tmp").open("w", encoding="utf-8") as out:
        for name, utterances in parts.items():
            for utterance, (features, seconds) in zip(utterances, spoken[name], strict=True):
                ids = tokenizer.quantise(features.astype(np.float32)).tolist()
                row = {"part": name, **asdict(utterance), "seconds": round(seconds, 3), "tokens": ids}
                out.write(json.dumps(row) + "\n")
    (work / "data.jsonl.tmp").rename(work / "data.jsonl")


def record(utterance: Utterance, folder: Path) -> Path:
    """Writes an utterance as 16-bit flac and returns its path."""
    path = folder / f"{utterance.id}.flac"
    soundfile.write(path, speak(utterance), SAMPLE_RATE, subtype="PCM_16")
    return path


def load(work: Path) -> Data:
    """Returns what `prepare` wrote."""
    data = Data([], [], [])
    with (work / "data.jsonl").open(encoding="utf-8") as rows:
        for line in rows:
            row = json.loads(line)
            part, tokens, seconds = row.pop("part"), row.pop("tokens"), row.pop("seconds")
            getattr(data, part).append(Example(Utterance(**row), np.array(tokens, dtype=np.int64), seconds))
    return data
