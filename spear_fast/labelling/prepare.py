"""Rows to source tokens: audio is read and tokenized; what cannot be labelled is set aside with a reason."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear_fast.labelling.errors import Interrupted, LabellingError, reason_of
from spear_fast.labelling.items import Item
from spear_fast.labelling.sources import Listing


@dataclass(frozen=True, slots=True)
class Utterance:
    """A row ready to be labelled. tokens: `[n]`, int64, n >= 1. seconds: of audio, None when nobody knows."""

    index: int
    id: str
    tokens: np.ndarray
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that cannot be labelled, with the reason in one sentence."""

    index: int
    id: str
    source: str
    reason: str

    def as_record(self) -> dict[str, str]:
        return {"id": self.id, "source": self.source, "reason": self.reason}


@dataclass(slots=True)
class Window:
    """Consecutive rows after tokenizing; `elapsed` is the wall time that took, in seconds."""

    utterances: list[Utterance] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    audio_seconds: float = 0.0
    elapsed: float = 0.0


class SpeechTokens:
    """One interface to the model's speech tokenizer, ours or any module called as `wav2vec(wave)`."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._lock = threading.Lock()
        self.sample_rate = int(getattr(module, "sample_rate", None) or module.target_sample_hz)
        self.tokens_per_second: float | None = getattr(module, "tokens_per_second", None)

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Returns the token ids of one utterance, `[n]`, int64. samples: `[m]`, float32, mono, at `sample_rate`."""
        if hasattr(self._module, "encode"):
            return np.asarray(self._module.encode(samples), dtype=np.int64)
        # a foreign module may not be safe to call from several threads
        with self._lock, torch.no_grad():
            ids = self._module(torch.from_numpy(samples)[None])
        return ids.reshape(-1).cpu().numpy().astype(np.int64)


class Preparer:
    """Tokenizes windows of rows with a few threads, one window ahead of whoever takes them."""

    def __init__(
        self, model: Any, *, max_source_tokens: int, workers: int, stop: threading.Event | None = None
    ) -> None:
        self.vocabulary = int(model.num_semantic_token_ids)
        self.max_source_tokens = max_source_tokens
        tokenizer = getattr(model, "wav2vec", None)
        self.tokenizer = None if tokenizer is None else SpeechTokens(tokenizer)
        self._workers = workers
        self._stop = stop or threading.Event()

    def windows(self, listing: Listing, bounds: Iterable[tuple[int, int]]) -> Iterator[Window]:
        """Yields the rows `start` to `stop - 1` for each of `bounds`; the next window is prepared meanwhile."""
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(self._workers) as pool:
            waiting = None
            try:
                for start, stop in bounds:
                    following = ahead.submit(self._prepare, pool, listing, start, stop)
                    if waiting is not None:
                        yield waiting.result()
                    waiting = following
                if waiting is not None:
                    yield waiting.result()
            finally:
                ahead.shutdown(wait=False, cancel_futures=True)
                pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, pool: ThreadPoolExecutor, listing: Listing, start: int, stop: int) -> Window:
        began = time.perf_counter()
        window = Window()
        rows = enumerate(listing.items(start, stop), start)
        # only rows of one window are in flight, and audio lives no longer than its own call
        for row in list(pool.map(lambda numbered: self.row(*numbered), rows)):
            if isinstance(row, Failure):
                window.failures.append(row)
                continue
            window.utterances.append(row)
            window.audio_seconds += row.seconds or 0.0
        window.elapsed = time.perf_counter() - began
        return window

    def row(self, index: int, item: Item) -> Utterance | Failure:
        """Returns the row ready to be labelled, or why it cannot be. Raises Interrupted when the job is to stop."""
        if self._stop.is_set():
            raise Interrupted("")
        try:
            return self._utterance(index, item)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            return Failure(index, item.id, item.origin, reason_of(error))

    def _utterance(self, index: int, item: Item) -> Utterance:
        if item.problem is not None:
            raise LabellingError(item.problem)
        if item.audio is not None:
            return self._from_audio(index, item, item.audio)
        if item.tokens is None:
            raise LabellingError("the row has neither audio nor tokens; give one of them.")
        self._check(item.tokens)
        rate = self.tokenizer.tokens_per_second if self.tokenizer else None
        return Utterance(index, item.id, item.tokens, len(item.tokens) / rate if rate else None)

    def _from_audio(self, index: int, item: Item, path: Path) -> Utterance:
        from spear_fast.speech import read_audio

        if self.tokenizer is None:
            raise LabellingError("the model has no speech tokenizer; give token files, or a model folder that has one.")
        if not path.is_file():
            raise LabellingError(f"there is no file {path}; check the manifest.")
        self._check_duration(path, self.tokenizer)
        audio = read_audio(path, self.tokenizer.sample_rate)
        tokens = self.tokenizer.encode(audio.samples)
        if not len(tokens):
            raise LabellingError(f"the audio is too short: {audio.seconds:.3f} s give no token.")
        self._check(tokens)
        return Utterance(index, item.id, tokens, audio.seconds)

    def _check_duration(self, path: Path, tokenizer: SpeechTokens) -> None:
        """Refuses a recording that is far too long before it is decoded: hours of audio fill the memory."""
        import soundfile

        if tokenizer.tokens_per_second is None:
            return
        try:
            seconds = soundfile.info(str(path)).duration
        except (RuntimeError, OSError):
            # read_audio says what is wrong with it
            return
        tokens = seconds * tokenizer.tokens_per_second
        if tokens > 1.01 * self.max_source_tokens + 16:
            raise self._too_long(f"about {tokens:.0f} tokens ({seconds:.0f} s)")

    def _too_long(self, length: str) -> LabellingError:
        return LabellingError(
            f"the source is {length} long, the limit is {self.max_source_tokens}; cut it, or raise --max-source-tokens."
        )

    def _check(self, tokens: np.ndarray) -> None:
        if not len(tokens):
            raise LabellingError("the source is empty; wanted at least one token.")
        if len(tokens) > self.max_source_tokens:
            raise self._too_long(f"{len(tokens)} tokens")
        wrong = np.flatnonzero((tokens < 0) | (tokens >= self.vocabulary))
        if len(wrong):
            raise LabellingError(
                f"token ids must be from 0 to {self.vocabulary - 1}, got {tokens[wrong[0]]} at position {wrong[0]}; "
                "pads and ends of sequence do not belong here, and the ids must come from the model's own tokenizer."
            )
