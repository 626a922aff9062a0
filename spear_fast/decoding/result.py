"""What decoding returns, and how the steps' records are put together to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.decoding.options import DecodingOptions
from spear_fast.ops.selection_params import SelectionMethod


@dataclass
class DecodingResult:
    """R hypotheses for each of B utterances, best first.

    tokens: `[B, R, T]` int64, the end of sequence included where it was produced, then the pad id.
    lengths: `[B, R]` int64, tokens without the end of sequence.
    finished: `[B, R]` bool, whether the end of sequence was produced; otherwise the length limit cut it.
    scores: `[B, R]` float32, what the ranking used: `sum_logprobs / length ** length_penalty`, where length counts the
        end of sequence, plus the coverage penalty; in the reference's beam search the sum over all steps, those after
        the end included.
    sum_logprobs: `[B, R]` float32, over the tokens and the end of sequence.
    token_logprobs: `[B, R, T]` float32, 0 after the end. In beam search at its temperature, else the model's own.
    alignment: `[B, R, T, S]` float32, None unless `return_alignment` asked for it: the weights of the last
        cross-attention over the S source positions with which each token was predicted, averaged over heads; 0 after
        the end and where the source is masked. What is missing to 1 went to the learned null position.
    """

    tokens: Tensor
    lengths: Tensor
    finished: Tensor
    scores: Tensor
    sum_logprobs: Tensor
    token_logprobs: Tensor
    alignment: Tensor | None = None

    def take(self, index: Tensor) -> DecodingResult:
        """Returns the result of some utterances. index: `[b]` int64, or `[B]` bool."""
        return self._each(lambda tensor: tensor[index])

    def ranked(self, order: Tensor, longest: int) -> DecodingResult:
        """Returns the hypotheses `order` `[r]` int64 of each utterance, cut to `longest` tokens; without alignment."""
        taken = replace(self, alignment=None)._each(lambda tensor: tensor[:, order])
        return replace(taken, tokens=taken.tokens[..., :longest], token_logprobs=taken.token_logprobs[..., :longest])

    def to(self, device: torch.device | str) -> DecodingResult:
        """Returns the same on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def clone(self) -> DecodingResult:
        """Returns a copy of every tensor; made outside of inference mode these are ordinary ones."""
        return self._each(torch.clone)

    def _each(self, function: Callable[[Tensor], Tensor]) -> DecodingResult:
        tensors: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, tensor in tensors.items():
            tensors[name] = None if tensor is None else function(tensor)
        return DecodingResult(**tensors)


def join_results(results: Sequence[DecodingResult], pad_id: int) -> DecodingResult:
    """Returns one result of all utterances in order, from those of single ones; tokens are padded with `pad_id`."""
    if len(results) == 1:
        return results[0]

    def join(name: str) -> Any:
        values = [getattr(result, name) for result in results]
        if values[0] is None:
            return None
        filling = pad_id if name == "tokens" else 0
        longest = [max(sizes) for sizes in zip(*(value.shape[2:] for value in values), strict=True)]
        for i, value in enumerate(values):
            missing = [most - size for most, size in zip(longest, value.shape[2:], strict=True)]
            values[i] = F.pad(value, [side for count in reversed(missing) for side in (0, count)], value=filling)
        return torch.cat(values)

    return DecodingResult(**{field.name: join(field.name) for field in fields(DecodingResult)})


def backtrace(
    row: dict[str, np.ndarray],
    history: dict[str, np.ndarray],
    options: DecodingOptions,
    *,
    eos_id: int | None,
    pad_id: int,
    stop: int | None = None,
) -> DecodingResult:
    """Returns the hypotheses of one utterance, best first, from what its steps wrote.

    row: `[K]` each. history: `[T, K]` each. All hypotheses where they are to be ranked again, else those asked for.
    stop: in the reference's search, the step after which all stop.
    """
    count = options.hypotheses if options.coverage_penalty else options.num_return_sequences
    if options.kind == SelectionMethod.REFERENCE:
        return _reference_result(history, count, stop or 0, eos_id=eos_id, pad_id=pad_id)
    last = None
    if options.method == "beam":
        scores = row["pool_scores"][:count]
        taken = scores > -np.inf
        beams, ends = row["pool_beams"][:count], np.where(taken, row["pool_ends"][:count], 0)
        finished, last = row["pool_finished"][:count] & taken, row["pool_last_logprobs"][:count]
    else:
        used = options.hypotheses
        finished = np.asarray(row["finished"][:used] & np.isfinite(row["scores"][:used]))
        generated = row["lengths"][:used]
        scores = row["scores"][:used] / np.maximum(generated, 1) ** options.length_penalty
        order = np.argsort(-scores, kind="stable")[:count]
        beams, scores, finished = order, scores[order], finished[order]
        ends = generated[order] - finished
    widths = ends + finished
    # the end of a hypothesis in the pool is no step of the search
    tokens, logprobs = _follow_parents(history, beams, ends if last is not None else widths, int(widths.max()), pad_id)
    if last is not None:
        ended = np.flatnonzero(finished)
        tokens[ended, ends[ended]] = -1 if eos_id is None else eos_id
        logprobs[ended, ends[ended]] = last[ended]
    return _result(tokens, logprobs, ends, np.asarray(finished), scores)


def _follow_parents(
    history: dict[str, np.ndarray], beams: np.ndarray, steps: np.ndarray, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and log-probabilities `[hypotheses, width]`, the backtrace along parents from the beams given."""
    tokens = np.full((len(beams), width), pad_id, dtype=np.int64)
    logprobs = np.zeros((len(beams), width), dtype=history["logprobs"].dtype)
    walked = steps.tolist()
    # a device waits meanwhile: numbers of Python are much faster to walk along than arrays
    parents = history["parents"][: max(walked)].tolist()
    for i, beam in enumerate(beams.tolist()):
        path = [0] * walked[i]
        for step in reversed(range(walked[i])):
            path[step] = beam
            beam = parents[step][beam]
        index = np.arange(walked[i]), np.array(path, dtype=np.int64)
        tokens[i, : walked[i]], logprobs[i, : walked[i]] = history["tokens"][index], history["logprobs"][index]
    return tokens, logprobs


def _reference_result(
    history: dict[str, np.ndarray], count: int, stop: int, *, eos_id: int | None, pad_id: int
) -> DecodingResult:
    """Returns the first hypotheses as they stand at `stop`, cut after their first end; scores count what follows it."""
    tokens, logprobs = _follow_parents(history, np.arange(count), np.full(count, stop), stop, pad_id)
    is_end = tokens == eos_id if eos_id is not None else np.zeros_like(tokens, dtype=bool)
    finished = is_end.any(axis=1)
    ends = np.where(finished, is_end.argmax(axis=1) if stop else 0, stop)
    scores = logprobs.sum(axis=1)
    after = np.arange(stop) >= (ends + finished)[:, None]
    tokens[after], logprobs[after] = pad_id, 0
    return _result(tokens, logprobs, ends, np.asarray(finished), scores)


def _result(
    tokens: np.ndarray, logprobs: np.ndarray, ends: np.ndarray, finished: np.ndarray, scores: np.ndarray
) -> DecodingResult:
    # tensors of inference mode could not be written to by the caller
    with torch.inference_mode(False):
        return DecodingResult(
            tokens=torch.from_numpy(tokens)[None],
            lengths=torch.from_numpy(np.asarray(ends, dtype=np.int64))[None],
            finished=torch.from_numpy(np.asarray(finished, dtype=bool))[None],
            scores=torch.from_numpy(np.asarray(scores, dtype=np.float32))[None],
            sum_logprobs=torch.from_numpy(logprobs.sum(axis=1).astype(np.float32))[None],
            token_logprobs=torch.from_numpy(logprobs.astype(np.float32))[None],
        )
