"""The tensors of the utterances that take part in a step: data only."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from spear_fast.decoding.decoder import ProjectedMemory


@dataclass
class View:
    """U utterances of K hypotheses; what each tensor is: `ops.beam_step`. R = U, or 2 U under guidance.

    keys, values: for each layer `[R * K, kv_heads, T, head_dim]`. memory: keys and values `[U, heads, S, head_dim]`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    memory: ProjectedMemory
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
    pool_scores: Tensor
    pool_beams: Tensor
    pool_ends: Tensor
    pool_finished: Tensor
    pool_last_logprobs: Tensor
    ended: Tensor
    done: Tensor

    @property
    def batch(self) -> int:
        return self.inputs.shape[0]

    @property
    def beams(self) -> int:
        return self.inputs.shape[1]

    @property
    def guided(self) -> bool:
        return self.lengths.shape[0] > self.batch


# what is per utterance, and small
ROWS = tuple(
    field.name for field in fields(View) if field.name not in ("keys", "values", "memory", "lengths", "ancestors")
)
