"""Decoding options as the selection ops read them: a row of numbers for each utterance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spear_fast.decoding.options import DecodingOptions
from spear_fast.ops.selection_params import EarlyStopping, FloatParam, IntParam, SelectionMethod

EARLY_STOPPING = {True: EarlyStopping.AT_ONCE, False: EarlyStopping.AT_BOUND, "never": EarlyStopping.NEVER}


@dataclass(frozen=True)
class Settings:
    """float_params: `[utterances, len(FloatParam)]` float64. int_params: `[utterances, len(IntParam)]` int32.

    prefix: `[utterances, longest]` int32.
    """

    float_params: Tensor
    int_params: Tensor
    prefix: Tensor

    @classmethod
    def of(cls, options: Sequence[DecodingOptions], eos_id: int | None) -> Settings:
        """Returns the settings of requests, each with options of its own."""
        longest = max(len(each.prefix) for each in options)
        prefixes = [[*each.prefix, *(0 for _ in range(longest - len(each.prefix)))] for each in options]
        return cls(
            float_params=torch.tensor([_float_params(each) for each in options], dtype=torch.float64),
            int_params=torch.tensor([_int_params(each, eos_id) for each in options], dtype=torch.int32),
            prefix=torch.tensor(prefixes, dtype=torch.int32).view(len(options), longest),
        )


def first_scores(int_params: Tensor, beams: int) -> Tensor:
    """Returns the scores `[utterances, beams]` before the first step, float64.

    The hypotheses of a beam start out the same, so that only one may have descendants.
    """
    scores = torch.zeros(len(int_params), beams, dtype=torch.float64)
    scores[:, 1:].masked_fill_((int_params[:, IntParam.METHOD] == SelectionMethod.BEAM)[:, None], -torch.inf)
    return scores


def _float_params(options: DecodingOptions) -> list[float]:
    columns = {
        FloatParam.TEMPERATURE: 0.0 if options.method == "greedy" else options.temperature,
        FloatParam.GUIDANCE: options.cond_scale,
        FloatParam.LENGTH_PENALTY: options.length_penalty,
        FloatParam.REPETITION_PENALTY: options.repetition_penalty,
        FloatParam.PATIENCE: options.patience,
        FloatParam.TOP_P: 1.0 if options.top_p is None else options.top_p,
    }
    return [columns[column] for column in FloatParam]


def _int_params(options: DecodingOptions, eos_id: int | None) -> list[int]:
    columns = {
        IntParam.METHOD: SelectionMethod.BEAM if options.method == "beam" else SelectionMethod.SAMPLE,
        IntParam.BEAM_SIZE: options.hypotheses,
        IntParam.MAX_LENGTH: options.max_length,
        IntParam.MIN_LENGTH: options.min_length,
        IntParam.EOS_ID: -1 if eos_id is None else eos_id,
        IntParam.NO_REPEAT_NGRAM_SIZE: options.no_repeat_ngram_size,
        IntParam.EARLY_STOPPING: EARLY_STOPPING[options.early_stopping],
        IntParam.PREFIX_LENGTH: len(options.prefix),
        IntParam.TOP_K: options.top_k or 0,
    }
    return [int(columns[column]) for column in IntParam]


def new_seed(options: DecodingOptions) -> int:
    """Returns the seed of a request's draws: from its generator, else from torch's own; 0 where nothing is drawn."""
    if options.deterministic or options.method == "beam":
        return 0
    generator = options.generator
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
