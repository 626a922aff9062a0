"""The arguments of the selection ops after the logits, in their schemas' order; csrc/cuda has the same names."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# the first fields of both: what is asked of each utterance, never written
PARAMETERS = 3


class BeamState(NamedTuple):
    """The arguments of `beam_step` after the logits: parameters, then the buffers it writes; see there for shapes."""

    float_params: Tensor
    int_params: Tensor
    prefix: Tensor
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


class SampleState(NamedTuple):
    """The arguments of `sample_step` after the logits: parameters and seeds, then the buffers that it writes."""

    float_params: Tensor
    int_params: Tensor
    prefix: Tensor
    seeds: Tensor
    inputs: Tensor
    scores: Tensor
    lengths: Tensor
    ancestors: Tensor
    tokens: Tensor
    parents: Tensor
    logprobs: Tensor
    finished: Tensor
    done: Tensor
