"""Utterances in, their labels out as they are done: encode, beam search, strip, decode to text, flag."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear_fast.decoding import DecodingResult, Engine, Request
from spear_fast.labelling.errors import LabellingError, reason_of
from spear_fast.labelling.options import LabelOptions
from spear_fast.labelling.prepare import Utterance
from spear_fast.labelling.shards import slots_for

# a loop: a run of at most LOOP_PERIOD tokens that comes LOOP_TIMES in a row, over at least LOOP_TOKENS tokens; or one
# of any length that comes LONG_LOOP_TIMES
LOOP_PERIOD = 16
LOOP_TIMES = 4
LOOP_TOKENS = 12
LONG_LOOP_TIMES = 5

# options that may leave a row without any hypothesis, and their values that do nothing
NEUTRAL = {"no_repeat_ngram_size": 0, "length_penalty": 1.0, "repetition_penalty": 1.0, "coverage_penalty": 0.0}

FLAGS = {
    "truncated": "the label hit `--max-length` before its end (`finished` is false)",
    "repetitive": f"a run of up to {LOOP_PERIOD} tokens comes {LOOP_TIMES} or more times in a row, over at least "
    f"{LOOP_TOKENS} tokens, or a longer one {LONG_LOOP_TIMES} times",
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

    An utterance that is done gives its slot to the next one at once. Each gets the same label, to the bit, whatever is
    decoded beside it (`Engine(deterministic=True)`): a job that is stopped or killed resumes with what is left, across
    the edges of shards, and decodes again only what was in its slots. Were labels to depend on who is in a batch, each
    shard would have to be decoded by itself, and after a kill again from its beginning. On a CPU it costs up to 2 % of
    the time (four rounds of 96 utterances of 50 to 500 tokens, on one core; dim 512, six layers a side, 32 slots, beam
    4): sources are encoded one by one. A GPU encodes groups filled up to one size; there, or without the extension, a
    step also works on all slots, free ones too.

    Only where a GPU's memory runs out is it not so: the engine continues with half the slots, and matmuls of another
    number of rows round differently, which decides between labels that are equally likely but for that; `slots` tells.

    rows: of the whole job; a small one needs fewer slots.
    """

    def __init__(self, model: Any, options: LabelOptions, rows: int) -> None:
        self.model = model
        self._options, self._rows = options, rows
        self._ends = [model.eos_id["speech"]] if model.autoset_eos_id["speech"] else []
        self._finished: deque[Request] = deque()
        self.seconds = 0.0

    @cached_property
    def _engine(self) -> Engine:
        # a job that turns out to be done needs none
        return _engine(self.model, self._options, slots_for(self._options.batch_tokens, self._rows))

    @property
    def slots(self) -> int:
        """Utterances that are decoded side by side."""
        return self._engine.config.slots

    @property
    def busy(self) -> int:
        """Utterances that were given and have not been returned."""
        return self._engine.waiting + self._engine.in_flight + len(self._finished)

    def submit(self, utterance: Utterance, tag: Any) -> None:
        """Gives an utterance, which `step` returns with its tag when it is done."""
        self._engine.submit(self._source(utterance), self._options.decoding, tag=tag, callback=self._finished.append)

    def step(self) -> list[tuple[Any, DecodingResult | ValueError]]:
        """Makes a step, and returns tags and results of what is done now; `seconds` grows by what that took.

        A request that the engine refused comes with its error instead. Raises LabellingError when not even one
        utterance fits into memory, and what else is no fault of a single row.
        """
        began = time.perf_counter()
        self._engine.step()
        self.seconds += time.perf_counter() - began
        done: list[tuple[Any, DecodingResult | ValueError]] = []
        while self._finished:
            request = self._finished.popleft()
            try:
                done.append((request.tag, request.result()))
            except ValueError as error:
                done.append((request.tag, error))
            except MemoryError as error:
                raise LabellingError(
                    f"{reason_of(error).rstrip('.')}; lower --max-source-tokens, --max-length or --beam-size, and give "
                    "another --out folder."
                ) from error
        return done

    def labels(self, results: Sequence[tuple[Utterance, DecodingResult]]) -> list[Label | Exception]:
        """Returns the labels of results, each of one utterance, or why one has none."""
        pad_id = self.model.pad_id["text"]
        targets = [result.tokens[0, 0, : result.lengths[0, 0]].numpy() for _, result in results]
        targets = [target[target != pad_id] for target in targets]
        labels: list[Label | Exception] = []
        for (utterance, result), target, text in zip(results, targets, self._texts(targets), strict=True):
            if isinstance(text, Exception):
                labels.append(text)
                continue
            labels.append(self._not_finite(utterance, result) or _label(target, text, result))
        return labels

    def close(self) -> None:
        """Takes back what is not done, and frees the buffers."""
        if "_engine" in self.__dict__:
            self._engine.close()

    def _source(self, utterance: Utterance) -> torch.Tensor:
        return torch.from_numpy(np.concatenate((utterance.tokens, np.array(self._ends, dtype=np.int64))))

    def _texts(self, targets: list[np.ndarray]) -> Sequence[str | Exception | None]:
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            return [None] * len(targets)
        try:
            return tokenizer.decode_batch([target.tolist() for target in targets])
        except Exception as error:  # whatever is wrong with a row concerns that row alone
            if len(targets) == 1:
                return [error]
            return [self._texts([target])[0] for target in targets]

    def _not_finite(self, utterance: Utterance, result: DecodingResult) -> Exception | None:
        """Returns why a result has scores that are no numbers; None when they are."""
        score, total = float(result.scores[0, 0]), float(result.sum_logprobs[0, 0])
        if np.isfinite(score) and np.isfinite(total):
            return None
        decoding = self._options.decoding
        for name, neutral in NEUTRAL.items():
            value = getattr(decoding, name)
            if value == neutral:
                continue
            milder: Any = {name: neutral}
            without = self._engine.submit(self._source(utterance), replace(decoding, **milder)).result()
            if np.isfinite(float(without.scores[0, 0])):
                return LabellingError(
                    f"--{name.replace('_', '-')} {value:g} leaves no hypothesis with a finite score; give a milder "
                    f"value ({neutral:g} is none)."
                )
        return LabellingError(
            "the model's scores are not finite for this row: its activations leave the range of "
            f"{self._options.dtype}; use --dtype float32 or bfloat16, or another checkpoint."
        )


def _engine(model: Any, options: LabelOptions, wanted: int) -> Engine:
    """Returns an engine with the wanted slots, or with a half, a quarter, … of them where memory has no room for more.

    Halves, since another number of slots rounds differently: what else takes a little memory does not change labels.
    """
    while True:
        try:
            engine = model.engine(
                source_type="speech",
                target_type="text",
                slots=wanted,
                beams=options.decoding.beam_size,
                max_length=options.decoding.max_length,
                # and the end of sequence
                max_source=options.max_source_tokens + 1,
                deterministic=True,
                weights="int8" if options.dtype == "int8" else "exact",
                kv_dtype=options.kv_dtype,
            )
        except ValueError as error:
            if wanted == 1:
                raise LabellingError(str(error)) from error
            wanted //= 2
            continue
        _check_memory(engine, options)
        return engine


def _check_memory(engine: Engine, options: LabelOptions) -> None:
    """Refuses sizes of which a single utterance takes more than the machine has: systems promise memory they lack."""
    needed, there = engine.config.slot_bytes, physical_memory()
    if not options.device.startswith("cpu") or there is None or needed <= there:
        return
    engine.close()
    raise LabellingError(
        f"one utterance of {options.max_source_tokens} source tokens, with {options.decoding.max_length} tokens and "
        f"{options.decoding.beam_size} beams, takes {needed:,} bytes, and this machine has {there:,}; lower "
        "--max-source-tokens, --max-length or --beam-size, and give another --out folder."
    )


def physical_memory() -> int | None:
    """Returns the bytes of memory that this process may have, None where the system does not tell."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (ValueError, OSError):
        # no limit, or no such group
        return total


def _label(target: np.ndarray, text: str | None, result: DecodingResult) -> Label:
    finished, length = bool(result.finished[0, 0]), int(result.lengths[0, 0])
    score, total = float(result.scores[0, 0]), float(result.sum_logprobs[0, 0])
    generated = length + int(finished)
    flags = [
        name
        for name, holds in (
            ("truncated", not finished),
            ("repetitive", is_repetitive(target)),
            ("empty", not len(target)),
        )
        if holds
    ]
    return Label(target, text, score, total / max(generated, 1), finished, generated, tuple(flags))


def is_repetitive(target: np.ndarray) -> bool:
    """Returns whether the label holds a loop: some run of tokens over and over. target: `[n]`, integer."""
    for period in range(1, max(LOOP_PERIOD, len(target) // LONG_LOOP_TIMES) + 1):
        times = LOOP_TIMES if period <= LOOP_PERIOD else LONG_LOOP_TIMES
        needed = max(LOOP_TOKENS, times * period) - period
        if len(target) < needed + period:
            return False
        equal = target[period:] == target[:-period]
        # most labels are told by this alone
        if np.count_nonzero(equal) < needed:
            continue
        edges = np.flatnonzero(np.diff(np.concatenate(([0], equal.astype(np.int8), [0]))))
        if np.max(edges[1::2] - edges[::2]) >= needed:
            return True
    return False
