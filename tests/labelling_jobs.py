"""Tiny models, sources and readers for the tests of labelling and of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models

from spear_fast.model import TextToSemantic
from spear_fast.speech import MelKMeansTokenizer

NUM_SPEECH_IDS = 30
NUM_TEXT_IDS = 20


def tiny_model(*, seed: int = 1, text: bool = False, speech: bool = False, **changes: Any) -> TextToSemantic:
    """Returns a random model whose labels end by themselves now and then. text, speech: with a tokenizer for each."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(dim=32, source_depth=1, target_depth=1, heads=2, dim_head=16)
    sizes.update(num_text_token_ids=NUM_TEXT_IDS, num_semantic_token_ids=NUM_SPEECH_IDS)
    if speech:
        sizes["wav2vec"] = MelKMeansTokenizer(torch.randn(NUM_SPEECH_IDS, 2 * 13), num_ceps=13, frames_per_token=3)
    model = TextToSemantic(**{**sizes, **changes})
    with torch.no_grad():
        # the source decides, and the end-of-sequence comes up, but not at once
        model.token_emb["text"].weight.mul_(0.05)
        if model.autoset_eos_id["text"]:
            model.token_emb["text"].weight[NUM_TEXT_IDS].mul_(2)
    if text:
        model.attach_tokenizer(letters_tokenizer())
    return model.eval()


def letters_tokenizer() -> Tokenizer:
    """Returns a tokenizer of the letters a, b, … with id 0 for padding."""
    letters = {"<pad>": 0, **{chr(ord("a") + index): index + 1 for index in range(NUM_TEXT_IDS - 1)}}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def random_rows(count: int, *, seed: int = 0, longest: int = 40) -> list[dict[str, Any]]:
    """Returns rows of `id` and `tokens` of many lengths."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    return [
        {"id": f"u{index}", "tokens": generator.integers(0, NUM_SPEECH_IDS, length).tolist()}
        for index, length in enumerate(lengths)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Returns all rows of a folder of labels in file order."""
    return [row for path in sorted((out / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def read_failed(out: Path) -> list[dict[str, str]]:
    path = out / "failed.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def shard_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "data").glob("*.parquet")}


def chirp(seconds: float, rate: int, *, seed: int = 0) -> np.ndarray:
    """Returns a sum of gliding tones below 4 kHz, `[n]`, float32: the same sound at whatever rate."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    sound = np.zeros_like(time)
    for start, glide, phase in zip(
        generator.uniform(100, 2000, 5), generator.uniform(-80, 400, 5), generator.uniform(0, 6, 5), strict=True
    ):
        sound += np.sin(2 * np.pi * (start * time + glide * time**2 / 2) + phase)
    return (0.1 * sound).astype(np.float32)


def write_audio(path: Path, seconds: float = 1.0, rate: int = 16000, *, channels: int = 1, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = chirp(seconds, rate, seed=seed)
    soundfile.write(path, np.repeat(sound[:, None], channels, axis=1), rate)
    return path
