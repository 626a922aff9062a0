"""A batch of utterances in, their labels out: encode, beam search, strip, decode to text, flag."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spear_fast.decoding import DecodingOptions
from spear_fast.labelling.errors import LabellingError
from spear_fast.labelling.options import LabelOptions
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
    """Labels batches with one model."""

    def __init__(self, model: Any, options: LabelOptions) -> None:
        self.model = model
        self.device = torch.device(options.device)
        self._decoding = DecodingOptions(
            method="beam",
            beam_size=options.beam_size,
            beam_mode="standard",
            max_length=options.max_length,
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
        )

    @torch.no_grad()
    def __call__(self, utterances: Sequence[Utterance]) -> tuple[list[Label], float]:
        """Returns a label per utterance, in order, and the seconds it took.

        Raises LabellingError when the batch does not fit into memory or the scores are not finite.
        """
        began = time.perf_counter()
        source, mask = self._batch(utterances)
        try:
            memory, memory_mask, _ = self.model.encode(source, source_type="speech", source_mask=mask)
            result = self.model.decode(memory, memory_mask, target_type="text", options=self._decoding)
        except torch.OutOfMemoryError as error:
            raise LabellingError(
                f"a batch of {len(utterances)} utterances and {source.numel()} source tokens does not fit into the "
                "device's memory; lower --batch-tokens and give another --out folder."
            ) from error
        columns = (result.tokens, result.lengths, result.finished, result.scores, result.sum_logprobs)
        tokens, lengths, finished, scores, sums = (column[:, 0].cpu().numpy() for column in columns)
        pad_id = self.model.pad_id["text"]
        targets = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        targets = [target[target != pad_id] for target in targets]
        texts = self._texts(targets)
        labels = [
            _label(
                targets[row], texts[row], float(scores[row]), float(sums[row]), int(lengths[row]), bool(finished[row])
            )
            for row in range(len(targets))
        ]
        return labels, time.perf_counter() - began

    def _batch(self, utterances: Sequence[Utterance]) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = np.array([len(utterance.tokens) for utterance in utterances])
        mask = np.arange(lengths.max()) < lengths[:, None]
        # masked ids are never read; 0 exists in every vocabulary
        source = np.zeros(mask.shape, dtype=np.int64)
        source[mask] = np.concatenate([utterance.tokens for utterance in utterances])
        return torch.from_numpy(source).to(self.device), torch.from_numpy(mask).to(self.device)

    def _texts(self, targets: list[np.ndarray]) -> Sequence[str | None]:
        tokenizer = getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            return [None] * len(targets)
        return tokenizer.decode_batch([target.tolist() for target in targets])


def _label(target: np.ndarray, text: str | None, score: float, total: float, length: int, finished: bool) -> Label:
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
