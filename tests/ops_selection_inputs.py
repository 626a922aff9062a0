"""Inputs of the selection ops: buffers as decoding makes them, and random states in the middle of searches."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from spear_fast.ops.selection_params import EarlyStopping, FloatParam, IntParam, SelectionMethod

PLAIN: dict = {"temperature": 1.0, "guidance": 1.0, "length_penalty": 1.0, "repetition_penalty": 1.0, "patience": 1.0,
         "top_p": 1.0, "method": SelectionMethod.BEAM, "max_length": 10_000, "min_length": 0, "eos_id": -1,
         "no_repeat_ngram_size": 0, "early_stopping": EarlyStopping.AT_BOUND, "top_k": 0, "prefix": ()}  # fmt: skip


@dataclass
class Buffers:
    """The tensors that the two ops write, and the seeds; see `spear_fast.ops.selection`."""

    inputs: Tensor
    scores: Tensor
    lengths: Tensor
    ancestors: Tensor
    tokens: Tensor
    parents: Tensor
    logprobs: Tensor
    pool_scores: Tensor
    pool_beams: Tensor
    pool_ends: Tensor
    pool_finished: Tensor
    pool_last_logprobs: Tensor
    ended: Tensor
    done: Tensor
    finished: Tensor
    seeds: Tensor

    def beam(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self)[:14])

    def sample(self) -> tuple[Tensor, ...]:
        common = (getattr(self, field.name) for field in fields(self)[:7])
        return (self.seeds, *common, self.finished, self.done)


def new_buffers(
    utterances: int, beams: int, capacity: int, *, guided: bool = False, precise: torch.dtype = torch.float32
) -> Buffers:
    """Buffers before the first step, of beam searches; samplers start with all scores at 0."""
    rows, pair = utterances * (1 + guided), (utterances, beams)
    history = (utterances, capacity, beams)
    scores = torch.full(pair, -torch.inf, dtype=precise)
    scores[:, 0] = 0
    own = torch.arange(beams, dtype=torch.uint8)[:, None].expand(rows, beams, capacity)
    return Buffers(
        inputs=torch.zeros(pair, dtype=torch.int64),
        scores=scores,
        lengths=torch.zeros(rows, beams, dtype=torch.int64),
        ancestors=own.contiguous(),
        tokens=torch.zeros(history, dtype=torch.int32),
        parents=torch.zeros(history, dtype=torch.uint8),
        logprobs=torch.zeros(history, dtype=precise),
        pool_scores=torch.full(pair, -torch.inf, dtype=precise),
        pool_beams=torch.zeros(pair, dtype=torch.int64),
        pool_ends=torch.zeros(pair, dtype=torch.int64),
        pool_finished=torch.zeros(pair, dtype=torch.bool),
        pool_last_logprobs=torch.zeros(pair, dtype=precise),
        ended=torch.zeros(utterances, dtype=torch.int64),
        done=torch.zeros(utterances, dtype=torch.bool),
        finished=torch.zeros(pair, dtype=torch.bool),
        seeds=torch.arange(utterances) * 0x9E3779B97F4A7C15 % 2**63,
    )


def settings_of(rows: list[dict], beams: int, precise: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Float params, int params and prefix; each row holds what differs from PLAIN and a beam of the full size."""
    longest = max([len(row.get("prefix", ())) for row in rows], default=0)
    float_params = torch.zeros(len(rows), len(FloatParam), dtype=precise)
    int_params = torch.zeros(len(rows), len(IntParam), dtype=torch.int32)
    prefix = torch.zeros(len(rows), longest, dtype=torch.int32)
    for i, row in enumerate(rows):
        values = {**PLAIN, "beam_size": beams, **row}
        given = values.pop("prefix")
        values["prefix_length"] = len(given)
        prefix[i, : len(given)] = torch.tensor(given, dtype=torch.int32)
        for name, value in values.items():
            (float_params if name.upper() in FloatParam.__members__ else int_params)[i, column_of(name)] = value
    return float_params, int_params, prefix


def column_of(name: str) -> int:
    return FloatParam[name.upper()] if name.upper() in FloatParam.__members__ else IntParam[name.upper()]


def random_rows(
    generator: torch.Generator, utterances: int, beams: int, vocab: int, method: SelectionMethod
) -> list[dict]:
    """Settings for each utterance; about half of them plain."""

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    return [
        {
            "method": method,
            "temperature": one_of(1.0, 0.5, 1.7) if method is SelectionMethod.BEAM else one_of(1.0, 0.0, 1.7),
            "guidance": one_of(1.0, 1.0, 2.5),
            "length_penalty": one_of(1.0, 0.0, 0.6, 2.0, -1.0),
            "repetition_penalty": one_of(1.0, 1.0, 1.3, 0.8),
            "patience": one_of(1.0, 1.0, 2.0, 0.5),
            "top_p": one_of(1.0, 0.83, 0.31),
            "beam_size": one_of(beams, beams, max(1, beams - 1), 1),
            "max_length": one_of(10_000, 7, 5),
            "min_length": one_of(0, 0, 6),
            "eos_id": one_of(-1, vocab - 1, 0),
            "no_repeat_ngram_size": one_of(0, 0, 1, 2, 3),
            "early_stopping": one_of(*EarlyStopping),
            "top_k": one_of(0, 1, 3, vocab),
            "prefix": one_of((), (), tuple(i % vocab for i in range(4)), (vocab - 1,)),
        }
        for _ in range(utterances)
    ]


def random_state(
    op: str,
    utterances: int = 4,
    beams: int = 3,
    vocab: int = 11,
    capacity: int = 9,
    *,
    dtype: torch.dtype = torch.float32,
    guided: bool = False,
    filtered: bool = False,
    plain: bool = False,
    strided: bool = False,
    seed: int = 0,
) -> list:
    """Arguments of an op in the middle of searches, every utterance at another step and with settings of its own."""
    generator = torch.Generator().manual_seed(seed)
    whole = lambda high, shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    precise = torch.promote_types(dtype, torch.float32)
    pair = (utterances, beams)
    buffers = new_buffers(utterances, beams, capacity, guided=guided, precise=precise)
    steps = whole(capacity, (utterances, 1 if op == "beam_step" else beams)).expand(pair)
    buffers.lengths.copy_(steps.repeat(1 + guided, 1))
    buffers.ancestors.copy_(whole(beams, (utterances, beams, capacity)).repeat(1 + guided, 1, 1))
    # few different tokens, so that there are n-grams to be repeated
    buffers.tokens.copy_(whole(min(3, vocab), buffers.tokens.shape))
    buffers.parents.copy_(whole(beams, buffers.parents.shape))
    buffers.logprobs.copy_(-normal(*buffers.logprobs.shape).abs())
    buffers.scores.copy_((-5 * normal(*pair).abs()).sort(descending=True).values)
    dead = whole(5, pair) == 0
    dead[:, 0] = False
    buffers.scores.masked_fill_(dead & (op == "beam_step"), -torch.inf)
    filled = whole(beams + 1, (utterances,))
    filled = torch.where(whole(3, (utterances,)) == 0, filled, torch.zeros_like(filled))
    pool = (-normal(*pair).abs()).sort(descending=True).values
    buffers.pool_scores.copy_(pool.masked_fill(torch.arange(beams) >= filled[:, None], -torch.inf))
    buffers.pool_beams.copy_(whole(beams, pair))
    buffers.pool_ends.copy_(whole(capacity, pair))
    buffers.pool_finished.copy_(whole(2, pair))
    buffers.pool_last_logprobs.copy_(-normal(*pair).abs())
    buffers.ended.copy_(filled + whole(2, (utterances,)))
    buffers.done.copy_(whole(5, (utterances,)) == 0)
    buffers.finished.copy_(whole(4, pair) == 0)
    logits = [normal(utterances, beams, vocab + 5 * strided).mul(3).to(dtype)[..., :vocab] for _ in range(3)]
    method = SelectionMethod.BEAM if op == "beam_step" else SelectionMethod.SAMPLE
    rows = random_rows(generator, utterances, beams, vocab, method)
    if plain:
        rows = [{"method": method, "eos_id": vocab - 1} for _ in rows]
    settings = settings_of(rows, beams, precise)
    null_logits = logits[1] if guided else None
    if op == "beam_step":
        return [logits[0], null_logits, *settings, *buffers.beam()]
    return [logits[0], null_logits, logits[2] if filtered else None, *settings, *buffers.sample()]


MAKE = {op: functools.partial(random_state, op) for op in ("beam_step", "sample_step")}
