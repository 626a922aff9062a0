"""What decoding returns, and how the steps' records are put together to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.decoding.decoder import Decoder
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.state import DecodeState


@dataclass
class DecodingResult:
    """R hypotheses for each of B utterances, best first.

    tokens: `[B, R, T]` int64, the end of sequence included where it was produced, then the pad id.
    lengths: `[B, R]` int64, tokens without the end of sequence.
    finished: `[B, R]` bool, whether the end of sequence was produced; otherwise the length limit cut it.
    scores: `[B, R]` float32, what the ranking used: `sum_logprobs / length ** length_penalty`, where length counts the
        end of sequence, plus the coverage penalty; in the reference's beam search the sum over all steps, those behind
        the end included.
    sum_logprobs: `[B, R]` float32, over the tokens and the end of sequence.
    token_logprobs: `[B, R, T]` float32, 0 behind the end. In beam search at its temperature, else the model's own.
    alignment: `[B, R, T, S]` float32, None unless `return_alignment` asked for it: the weights of the last
        cross-attention over the S source positions with which each token was predicted, averaged over heads; 0 behind
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


def joined(results: Sequence[DecodingResult], pad_id: int) -> DecodingResult:
    """Returns one result of all utterances in order, from those of single ones; tokens are padded with `pad_id`."""
    places = torch.arange(len(results), device=results[0].tokens.device)
    return join_results([(places[i : i + 1], result) for i, result in enumerate(results)], pad_id)


def join_results(parts: list[tuple[Tensor, DecodingResult]], pad_id: int) -> DecodingResult:
    """Returns one result from those of disjoint sets of utterances, each with their places `[b]` int64 in the whole."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([places for places, _ in parts]).argsort()

    def join(name: str) -> Any:
        values = [getattr(part, name) for _, part in parts]
        if values[0] is None:
            return None
        filling = pad_id if name == "tokens" else 0
        longest = [max(sizes) for sizes in zip(*(value.shape[2:] for value in values), strict=True)]
        for i, value in enumerate(values):
            missing = [most - size for most, size in zip(longest, value.shape[2:], strict=True)]
            values[i] = F.pad(value, [side for count in reversed(missing) for side in (0, count)], value=filling)
        return torch.cat(values)[order]

    return DecodingResult(**{field.name: join(field.name) for field in fields(DecodingResult)})


def walked_back(
    row: dict[str, np.ndarray],
    history: dict[str, np.ndarray],
    options: DecodingOptions,
    *,
    eos_id: int | None,
    pad_id: int,
) -> DecodingResult:
    """Returns the hypotheses of one utterance, best first, from what `ops.beam_step` or `ops.sample_step` wrote.

    row: `[K]` each. history: `[T, K]` each. All of them where they are to be ranked again, else those asked for.
    """
    count = options.hypotheses if options.coverage_penalty else options.num_return_sequences
    if options.method == "beam":
        scores = row["pool_scores"][:count]
        taken = scores > -np.inf
        slots, ends = row["pool_beams"][:count], np.where(taken, row["pool_ends"][:count], 0)
        finished, last = row["pool_finished"][:count] & taken, row["pool_last_logprobs"][:count]
    else:
        used = options.hypotheses
        finished = row["finished"][:used] & np.isfinite(row["scores"][:used])
        generated = row["lengths"][:used]
        scores = row["scores"][:used] / np.maximum(generated, 1) ** options.length_penalty
        order = np.argsort(-scores, kind="stable")[:count]
        slots, scores, finished = order, scores[order], finished[order]
        ends, last = generated[order] - finished, None
    widths = ends + finished
    longest = int(widths.max())
    tokens = np.full((len(ends), longest), pad_id, dtype=np.int64)
    logprobs = np.zeros((len(ends), longest), dtype=history["logprobs"].dtype)
    walked = (ends if last is not None else widths).tolist()
    # a device waits meanwhile: numbers of Python are much faster to walk along than arrays
    parents = history["parents"][: max(walked)].tolist()
    for i, slot in enumerate(slots.tolist()):
        path = [0] * walked[i]
        for step in reversed(range(walked[i])):
            path[step] = slot
            slot = parents[step][slot]
        steps = np.arange(walked[i])
        tokens[i, : walked[i]], logprobs[i, : walked[i]] = (
            history[name][steps, np.array(path, dtype=np.int64)] for name in ("tokens", "logprobs")
        )
    if last is not None:
        ended = np.flatnonzero(finished)
        tokens[ended, ends[ended]] = -1 if eos_id is None else eos_id
        logprobs[ended, ends[ended]] = last[ended]
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


def gather_result(decoder: Decoder, state: DecodeState, options: DecodingOptions) -> DecodingResult:
    """Returns the result of a lockstep state that is done, or that has made all the steps that it may."""
    if options.method == "beam":
        return _reference_result(decoder, state, options.num_return_sequences)
    ends, finished = state.generated, state.finished & ~state.scores.isnan()
    tokens, logprobs = trace(state, ends, torch.arange(state.beams, device=ends.device).expand_as(ends))
    scores = state.scores / ends.clamp(min=1).to(state.scores.dtype) ** options.length_penalty
    return _result(decoder, tokens, logprobs, ends - finished.long(), finished, scores)


def trace(state: DecodeState, ends: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Returns tokens `[B, R, T]` int64 and their log-probabilities of hypotheses, walked back along their parents.

    ends: `[B, R]` int64, tokens of each hypothesis. slots: `[B, R]` int64, its place after the last of them.
    What lies behind an end is unspecified.
    """
    steps = int(ends.max()) if ends.numel() else 0
    tokens = torch.zeros(steps, *ends.shape, dtype=torch.int64, device=ends.device)
    logprobs = torch.zeros(steps, *ends.shape, dtype=state.logprobs.dtype, device=ends.device)
    for i in reversed(range(steps)):
        tokens[i] = state.tokens[i].gather(1, slots)
        logprobs[i] = state.logprobs[i].gather(1, slots)
        slots = torch.where(i < ends, state.parents[i].gather(1, slots).long(), slots)
    return tokens.permute(1, 2, 0), logprobs.permute(1, 2, 0)


def _reference_result(decoder: Decoder, state: DecodeState, count: int) -> DecodingResult:
    # the batch may have run on past its stop: what came behind never counts
    steps = torch.where(state.stop < 0, state.generated.max(), state.stop)
    slots = torch.arange(count, device=steps.device).expand(state.batch, count)
    tokens, logprobs = trace(state, steps.expand_as(slots), slots)
    length = torch.full_like(slots, tokens.shape[-1])
    finished = torch.zeros_like(slots, dtype=torch.bool)
    if decoder.eos_id is not None:
        ended = tokens == decoder.eos_id
        finished = ended.any(dim=-1)
        length = torch.where(finished, ended.byte().argmax(dim=-1), length)
    return _result(decoder, tokens, logprobs, length, finished, logprobs.sum(dim=-1))


def _result(
    decoder: Decoder, tokens: Tensor, logprobs: Tensor, lengths: Tensor, finished: Tensor, scores: Tensor
) -> DecodingResult:
    """Returns the result with everything behind each end wiped out."""
    behind = torch.arange(tokens.shape[-1], device=tokens.device) >= (lengths + finished.long())[..., None]
    logprobs = logprobs.masked_fill(behind, 0)
    return DecodingResult(
        tokens=tokens.masked_fill(behind, decoder.pad_id),
        lengths=lengths,
        finished=finished,
        scores=scores.float(),
        sum_logprobs=logprobs.sum(dim=-1).float(),
        token_logprobs=logprobs.float(),
    )
