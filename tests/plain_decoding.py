"""Decoding written a second time, slowly and plainly, from the modules alone: what the decoding tests compare with.

Nothing here is cached, packed or batched, and nothing is imported from `spear_fast.decoding`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from reference import SMALL, randomise_
from torch import Tensor

from spear_fast.model import TextToSemantic

LogProbs = Callable[[tuple[int, ...]], list[float]]


def build_model(seed: int = 0, *, dtype: torch.dtype = torch.float64, **kwargs: Any) -> TextToSemantic:
    """A small model with every parameter random; `kwargs` override `reference.SMALL`."""
    model = TextToSemantic(**{**SMALL, "target_kv_heads": 2, **kwargs})
    return randomise_(model, seed).to(dtype).eval()


def build_memory(model: TextToSemantic, rows: int, length: int = 7, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random memory `[rows, length, dim]` and a mask of rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    dtype = model.start_token["text"].dtype
    memory = torch.randn(rows, length, model.dim, generator=generator, dtype=torch.float64).to(dtype)
    return memory, torch.arange(length) < torch.tensor([length - 3 * row % length for row in range(rows)])[:, None]


@torch.no_grad()
def all_logits(
    model: TextToSemantic, memory: Tensor, mask: Tensor, tokens: Tensor, *, kind: str = "text", cond_scale: float = 1.0
) -> Tensor:
    """Logits `[rows, length + 1, vocabulary]` after each prefix of `tokens` `[rows, length]`, computed anew."""
    embedding = model.token_emb[kind].weight
    x = torch.cat((model.start_token[kind].expand(len(tokens), 1, -1), embedding[tokens]), dim=1)

    def logits(context_mask: Tensor) -> Tensor:
        return model.target_transformer(x, context=memory, context_mask=context_mask) @ embedding.t()

    conditional = logits(mask)
    return conditional if cond_scale == 1 else torch.lerp(logits(torch.zeros_like(mask)), conditional, cond_scale)


def log_probs_of(
    model: TextToSemantic, memory: Tensor, mask: Tensor, row: int = 0, *, temperature: float = 1.0, **kwargs: Any
) -> LogProbs:
    """A function from the tokens so far to the log-probabilities of the next one, for one row; it remembers."""
    known: dict[tuple[int, ...], list[float]] = {}

    def log_probs(prefix: tuple[int, ...]) -> list[float]:
        if prefix not in known:
            tokens = torch.tensor([prefix], dtype=torch.int64).view(1, -1)
            logits = all_logits(model, memory[row : row + 1], mask[row : row + 1], tokens, **kwargs)[0, -1]
            known[prefix] = (logits / temperature).log_softmax(dim=-1).tolist()
        return known[prefix]

    return log_probs


@torch.no_grad()
def plain_alignment(model: Any, memory: Tensor, mask: Tensor, tokens: Tensor, *, kind: str = "text") -> Tensor:
    """The last cross-attention's weights `[rows, length, source]` when each of `tokens` `[rows, length]` is predicted.

    The mean over heads, without the null position; of modules of this package or of the reference.
    """
    cross, seen = model.target_transformer.layers[-1][1], []
    hook = cross.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    start = model.start_token[kind].expand(len(tokens), 1, -1)
    x = torch.cat((start, model.token_emb[kind].weight[tokens[:, :-1]]), dim=1)
    model.target_transformer(x, context=memory, context_mask=mask)
    hook.remove()
    heads = cross.heads
    query = (cross.norm(seen[0]) @ cross.to_q[0].weight.t()).unflatten(-1, (heads, -1))
    key = (memory @ cross.to_kv[0].weight.t()).unflatten(-1, (2, heads, -1))[:, :, 0]
    scores = torch.einsum("bthd,bshd->bhts", query, key).masked_fill(~mask[:, None, None], -torch.inf)
    null = torch.einsum("bthd,hd->bht", query, cross.null_kv[0, :, 0])[..., None]
    weights = (torch.cat((null, scores), dim=-1) / query.shape[-1] ** 0.5).softmax(dim=-1)
    return weights[..., 1:].mean(dim=1)


def plain_coverage(alignment: Tensor, mask: Tensor) -> float:
    """`sum over source positions of log(min(1, attention received))` of one hypothesis, `[length, source]`."""
    received = alignment.sum(dim=0)[mask]
    return sum(math.log(min(1.0, max(float(each), torch.finfo(torch.float32).tiny))) for each in received)


@dataclass(frozen=True)
class Hypothesis:
    tokens: tuple[int, ...]
    total: float
    finished: bool
    score: float


def slow_beam_search(
    log_probs: LogProbs,
    eos_id: int | None,
    *,
    beam_size: int,
    max_length: int,
    min_length: int = 0,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
) -> list[Hypothesis]:
    """The standard beam search over one row, with lists; best first."""
    running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    pool: list[Hypothesis] = []
    for length in range(1, max_length + 1):
        candidates = []
        for tokens, total in running:
            for token, log_prob in enumerate(log_probs(tokens)):
                if token != eos_id or len(tokens) >= min_length:
                    candidates.append((tokens, token, total + log_prob))
        candidates.sort(key=lambda candidate: -candidate[2])
        running = []
        for rank, (tokens, token, total) in enumerate(candidates[: 2 * beam_size]):
            if token != eos_id:
                running.append(((*tokens, token), total))
            elif rank < beam_size:
                pool.append(Hypothesis((*tokens, token), total, True, total / length**length_penalty))
        running = running[:beam_size]
        if length == max_length:
            pool += [Hypothesis(tokens, total, False, total / length**length_penalty) for tokens, total in running]
        pool = sorted(pool, key=lambda hypothesis: -hypothesis.score)[:beam_size]
        if len(pool) < beam_size:
            continue
        bound = max_length if early_stopping == "never" and length_penalty > 0 else length
        if early_stopping is True or not running or running[0][1] / bound**length_penalty <= pool[-1].score:
            break
    return pool


def every_hypothesis(
    log_probs: LogProbs, vocab: int, eos_id: int, *, max_length: int, length_penalty: float
) -> list[Hypothesis]:
    """All sequences that end, and all that reach `max_length` without an end, best first."""
    others = [token for token in range(vocab) if token != eos_id]
    found = []
    for length in range(max_length + 1):
        for tokens in itertools.product(others, repeat=length):
            total = sum(log_probs(tokens[:i])[tokens[i]] for i in range(length))
            if length == max_length:
                found.append(Hypothesis(tokens, total, False, total / length**length_penalty))
                continue
            ended = total + log_probs(tokens)[eos_id]
            found.append(Hypothesis((*tokens, eos_id), ended, True, ended / (length + 1) ** length_penalty))
    return sorted(found, key=lambda hypothesis: -hypothesis.score)


def hypotheses_of(result: Any, row: int) -> list[Hypothesis]:
    """The hypotheses of one row of a `DecodingResult`, checked against its own other fields."""
    found = []
    for i in range(result.tokens.shape[1]):
        finished, length = bool(result.finished[row, i]), int(result.lengths[row, i])
        count = length + finished
        log_probs = result.token_logprobs[row, i]
        total = float(result.sum_logprobs[row, i])
        assert math.isclose(total, float(log_probs[:count].sum()), rel_tol=1e-5, abs_tol=1e-5)
        assert not log_probs[count:].any()
        found.append(
            Hypothesis(tuple(result.tokens[row, i, :count].tolist()), total, finished, float(result.scores[row, i]))
        )
    return found


def assert_same_hypotheses(found: list[Hypothesis], wanted: list[Hypothesis], tolerance: float = 1e-5) -> None:
    assert [h.tokens for h in found] == [h.tokens for h in wanted]
    assert [h.finished for h in found] == [h.finished for h in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert math.isclose(one.score, other.score, rel_tol=tolerance, abs_tol=tolerance)
        assert math.isclose(one.total, other.total, rel_tol=tolerance, abs_tol=tolerance)
