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

from spear_fast import speech
from spear_fast.labelling.errors import Interrupted, LabellingError, reason_of
from spear_fast.labelling.items import Item, content_of
from spear_fast.labelling.sources import Rows
from spear_fast.speech import MelKMeansTokenizer

# Hz: a sound of the longest permitted duration may take so many frames a second of memory
HIGHEST_RATE = 384_000
# of sound that may be read for a tokenizer that does not tell how many tokens it makes of a second
UNKNOWN_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Utterance:
    """A row ready to be labelled. tokens: `[n]`, int64, n >= 1. seconds: of audio, None when nobody knows.

    origin: the file that it comes from. content: what stands for its tokens or audio, see `content_of`.
    """

    index: int
    id: str
    tokens: np.ndarray
    seconds: float | None
    origin: str = ""
    content: bytes = b""

    def failed(self, error: BaseException) -> Failure:
        """Returns the failure of a row that turned out not to be labelled after all."""
        return Failure(self.index, self.id, self.origin, reason_of(error))


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


def device_of(module: Any) -> torch.device:
    """Returns where a module's weights are, the CPU for one without."""
    tensors = (*module.parameters(), *module.buffers()) if isinstance(module, torch.nn.Module) else ()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


class SpeechTokens:
    """One interface to the model's speech tokenizer, ours or any module called as `wav2vec(wave)`."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._device = device_of(module)
        self._lock = threading.Lock()
        self.sample_rate = int(getattr(module, "sample_rate", None) or module.target_sample_hz)
        self.tokens_per_second: float | None = getattr(module, "tokens_per_second", None)

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Returns the token ids of one utterance, `[n]`, int64. samples: `[m]`, float32, mono, at `sample_rate`."""
        if isinstance(self._module, MelKMeansTokenizer):
            return self._module.encode(samples)
        # a foreign module may not be safe to call from several threads
        with self._lock, torch.no_grad():
            ids = self._module(torch.from_numpy(samples)[None].to(self._device))
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

    def windows(self, listing: Rows, bounds: Iterable[tuple[int, int]]) -> Iterator[Window]:
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

    def _prepare(self, pool: ThreadPoolExecutor, listing: Rows, start: int, stop: int) -> Window:
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
        except (Interrupted, ImportError):
            raise
        except Exception as error:  # whatever is wrong with a row concerns that row alone
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
        seconds = len(item.tokens) / rate if rate else None
        return Utterance(index, item.id, item.tokens, seconds, item.origin, content_of(item) or b"")

    def _from_audio(self, index: int, item: Item, path: Path) -> Utterance:
        # one that is not installed ends the job
        import soundfile  # noqa: F401

        if self.tokenizer is None:
            raise LabellingError("the model has no speech tokenizer; give token files, or a model folder that has one.")
        if not path.is_file():
            what = "is no regular file but a folder, a pipe or a device" if path.exists() else "does not exist"
            raise LabellingError(f"there is no file {path}: it {what}; check the source.")
        content = content_of(item) or b""
        most_seconds = self._check_duration(path, item, self.tokenizer)
        audio = speech.read_audio(
            path,
            self.tokenizer.sample_rate,
            offset=item.offset,
            duration=item.duration,
            most_frames=int(most_seconds * HIGHEST_RATE),
        )
        tokens = self.tokenizer.encode(audio.samples)
        if not len(tokens):
            raise LabellingError(f"the audio is too short: {audio.seconds:.3f} s give no token.")
        self._check(tokens)
        return Utterance(index, item.id, tokens, audio.seconds, item.origin, content)

    def _check_duration(self, path: Path, item: Item, tokenizer: SpeechTokens) -> float:
        """Refuses a recording that is far too long before it is decoded; returns how many seconds may be read."""
        if tokenizer.tokens_per_second is None:
            return UNKNOWN_SECONDS
        most = 1.01 * self.max_source_tokens + 16
        whole = speech.audio_seconds(path)
        known = [seconds for seconds in (item.duration, whole and whole - item.offset) if seconds is not None]
        tokens = min(known, default=0.0) * tokenizer.tokens_per_second
        if tokens > most:
            raise self._too_long(f"about {tokens:.0f} tokens ({tokens / tokenizer.tokens_per_second:.0f} s)")
        return most / tokenizer.tokens_per_second

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
