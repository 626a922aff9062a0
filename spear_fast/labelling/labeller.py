"""Utterances in, their labels out as they are done: encode, beam search, strip, decode to text, flag."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from spear_fast.decoding import DecodingResult, Engine, Request
from spear_fast.labelling.errors import LabellingError
from spear_fast.labelling.options import LabelOptions
from spear_fast.labelling.plan import places
from spear_fast.labelling.prepare import Utterance

# a loop: a run of at most this many tokens, said at least so often, over at least so many tokens
LOOP_PERIOD = 16
LOOP_TIMES = 4
LOOP_TOKENS = 12

FLAGS = {
    "truncated": "the label hit `--max-length` before its end (`finished` is false)",
    "repetitive": f"a run of up to {LOOP_PERIOD} tokens is said {LOOP_TIMES} or more times in a row, over at least "
    f"{LOOP_TOKENS} tokens",
    "empty": "the label holds no token",
}


@dataclass(frozen=True, slots=True)
class Label:
    """What the model says of one utterance.

    target: `[n]`, int64, without pads and end-of-sequence. score: what the search ranked by. mean_logprob: in nats per
    generated token, the end-of-sequence included. generated: how many those are.
    """

    target: np.ndarray
    text: str | None
    score: float
    mean_logprob: float
    finished: bool
    generated: int
    flags: tuple[str, ...]


class Labeller:
    """Labels utterances as they come, many side by side, with one model packed once.

    An utterance that is done gives its place to the next one at once. Each gets the same label, to the bit, whatever is
    decoded beside it (`Engine(deterministic=True)`): a job that is stopped or killed goes on with what is left, across
    the edges of shards, and decodes again only what was in its places. Were labels to depend on who is in a batch, each
    shard would have to be decoded by itself, and after a kill again from its beginning. On a CPU it costs up to 2 % of
    the time (four rounds of 96 utterances of 50 to 500 tokens, on one core; dim 512, six layers a side, 32 places, beam
    4): sources are encoded one by one. On a GPU, or without the extension, a step also works on all places, free ones
    too.

    Only where a GPU's memory runs out is it not so: the engine goes on with half the places, and products of another
    number of rows round differently, which decides between labels that are equally likely but for that; `places` tells.

    rows: of the whole job; a small one needs fewer places.
    """

    def __init__(self, model: Any, options: LabelOptions, rows: int) -> None:
        self.model = model
        self._options, self._rows = options, rows
        self._decoding = options.decoding()
        self._ends = [model.eos_id["speech"]] if model.autoset_eos_id["speech"] else []
        self._finished: deque[Request] = deque()
        self.seconds = 0.0

    @cached_property
    def _engine(self) -> Engine:
        # a job that turns out to be done needs none
        return _engine(self.model, self._options, places(self._options.batch_tokens, self._rows))

    @property
    def places(self) -> int:
        """Utterances that are decoded side by side."""
        return self._engine.config.slots

    @property
    def busy(self) -> int:
        """Utterances that were given and are not done."""
        return self._engine.waiting + self._engine.in_flight

    def submit(self, utterance: Utterance, tag: Any) -> None:
        """Gives an utterance, which `proceed` returns with its tag when it is done."""
        source = np.concatenate((utterance.tokens, np.array(self._ends, dtype=np.int64)))
        self._engine.submit(torch.from_numpy(source), self._decoding, tag=tag, callback=self._finished.append)

    def proceed(self) -> list[tuple[Any, DecodingResult]]:
        """Decodes on, and returns tags and results of what is done now; `seconds` grows by what that took.

        Raises LabellingError when not even one utterance fits into memory.
        """
        began = time.perf_counter()
        self._engine.step()
        self.seconds += time.perf_counter() - began
        done = [self._finished.popleft() for _ in range(len(self._finished))]
        try:
            return [(ticket.tag, ticket.result()) for ticket in done]
        except MemoryError as error:
            raise LabellingError(
                "not even one utterance fits into the device's memory; lower --max-source-tokens, --max-length or "
                "--beam-size, and give another --out folder."
            ) from error

    def labels(self, results: Sequence[DecodingResult]) -> list[Label]:
        """Returns the labels of results, each of one utterance. Raises LabellingError when scores are not finite."""
        pad_id = self.model.pad_id["text"]
        targets = [result.tokens[0, 0, : result.lengths[0, 0]].numpy() for result in results]
        targets = [target[target != pad_id] for target in targets]
        texts = self._texts(targets)
        return [_label(target, text, result) for target, text, result in zip(targets, texts, results, strict=True)]

    def close(self) -> None:
        """Takes back what is not done, and frees the buffers."""
        if "_engine" in self.__dict__:
            self._engine.close()

    def _texts(self, targets: list[np.ndarray]) -> Sequence[str | None]:
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            return [None] * len(targets)
        return tokenizer.decode_batch([target.tolist() for target in targets])


def _engine(model: Any, options: LabelOptions, wanted: int) -> Engine:
    """Returns an engine with the wanted places, or with a half, a quarter, … of them where memory has no room for more.

    Halves, since another number of places rounds differently: what else takes a little memory does not change labels.
    """
    while True:
        try:
            return model.engine(
                source_type="speech",
                target_type="text",
                slots=wanted,
                beams=options.beam_size,
                max_length=options.max_length,
                # and the end of sequence
                max_source=options.max_source_tokens + 1,
                deterministic=True,
                weights="int8" if options.dtype == "int8" else "exact",
            )
        except ValueError as error:
            if wanted == 1:
                raise LabellingError(str(error)) from error
            wanted //= 2


def _label(target: np.ndarray, text: str | None, result: DecodingResult) -> Label:
    finished, length = bool(result.finished[0, 0]), int(result.lengths[0, 0])
    score, total = float(result.scores[0, 0]), float(result.sum_logprobs[0, 0])
    generated = length + int(finished)
    mean = total / max(generated, 1)
    if not np.isfinite(score) or not np.isfinite(mean):
        raise LabellingError(
            f"the model's scores are not finite (score {score}, log-probability {total}); its weights overflow, use "
            "--dtype float32 or another checkpoint."
        )
    flags = [
        name
        for name, holds in (
            ("truncated", not finished),
            ("repetitive", is_repetitive(target)),
            ("empty", not len(target)),
        )
        if holds
    ]
    return Label(target, text, score, mean, finished, generated, tuple(flags))


def is_repetitive(target: np.ndarray) -> bool:
    """Returns whether the label holds a loop: some run of tokens over and over. target: `[n]`, integer."""
    for period in range(1, LOOP_PERIOD + 1):
        needed = max(LOOP_TOKENS, LOOP_TIMES * period) - period
        if len(target) < needed + period:
            return False
        same = np.concatenate(([0], (target[period:] == target[:-period]).astype(np.int8), [0]))
        edges = np.flatnonzero(np.diff(same))
        if len(edges) and np.max(edges[1::2] - edges[::2]) >= needed:
            return True
    return False
