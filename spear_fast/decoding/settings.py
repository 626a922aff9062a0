"""Decoding options as the selection ops read them: a row of numbers for each utterance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spear_fast.decoding.options import DecodingOptions
from spear_fast.ops.selection_settings import EarlyStopping, Method, Real, Whole

EARLY_STOPPING = {True: EarlyStopping.AT_ONCE, False: EarlyStopping.AT_BOUND, "never": EarlyStopping.NEVER}


@dataclass(frozen=True)
class Settings:
    """reals: `[utterances, len(Real)]` float64. wholes: `[utterances, len(Whole)]` int32.

    prefix: `[utterances, longest]` int32.
    """

    reals: Tensor
    wholes: Tensor
    prefix: Tensor

    @classmethod
    def of(cls, options: Sequence[DecodingOptions], eos_id: int | None) -> Settings:
        """Returns the settings of requests, each with options of its own."""
        longest = max(len(each.prefix) for each in options)
        prefixes = [[*each.prefix, *(0 for _ in range(longest - len(each.prefix)))] for each in options]
        return cls(
            reals=torch.tensor([_reals(each) for each in options], dtype=torch.float64),
            wholes=torch.tensor([_wholes(each, eos_id) for each in options], dtype=torch.int32),
            prefix=torch.tensor(prefixes, dtype=torch.int32).view(len(options), longest),
        )


def first_scores(wholes: Tensor, beams: int) -> Tensor:
    """Returns the scores `[utterances, beams]` before the first step, float64.

    The hypotheses of a beam start out the same, so that only one may have descendants.
    """
    scores = torch.zeros(len(wholes), beams, dtype=torch.float64)
    scores[:, 1:].masked_fill_((wholes[:, Whole.METHOD] == Method.BEAM)[:, None], -torch.inf)
    return scores


def _reals(options: DecodingOptions) -> list[float]:
    columns = {
        Real.TEMPERATURE: 0.0 if options.method == "greedy" else options.temperature,
        Real.GUIDANCE: options.cond_scale,
        Real.LENGTH_PENALTY: options.length_penalty,
        Real.REPETITION_PENALTY: options.repetition_penalty,
        Real.PATIENCE: options.patience,
        Real.TOP_P: 1.0 if options.top_p is None else options.top_p,
    }
    return [columns[column] for column in Real]


def _wholes(options: DecodingOptions, eos_id: int | None) -> list[int]:
    columns = {
        Whole.METHOD: Method.BEAM if options.method == "beam" else Method.SAMPLE,
        Whole.BEAM_SIZE: options.hypotheses,
        Whole.MAX_LENGTH: options.max_length,
        Whole.MIN_LENGTH: options.min_length,
        Whole.EOS_ID: -1 if eos_id is None else eos_id,
        Whole.NO_REPEAT_NGRAM_SIZE: options.no_repeat_ngram_size,
        Whole.EARLY_STOPPING: EARLY_STOPPING[options.early_stopping],
        Whole.PREFIX_LENGTH: len(options.prefix),
        Whole.TOP_K: options.top_k or 0,
    }
    return [int(columns[column]) for column in Whole]


def new_seed(options: DecodingOptions) -> int:
    """Returns the seed of a request's draws: from its generator, else from torch's own; 0 where nothing is drawn."""
    if options.deterministic or options.method == "beam":
        return 0
    generator = options.generator
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
