"""`beam_step` by csrc/cuda/beam_step.cu: its launch, and its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_fast.ops.cuda import runtime
from spear_fast.ops.cuda.runtime import SCALARS, Launch

SOURCE, STRUCT = "beam_step.cu", "BeamStep"
# as in the source
THREADS = 256
# in the order of the op's arguments behind the logits; the struct's fields have the same names
STATE = (
    "real_settings whole_settings prefix inputs scores lengths ancestors tokens parents logprobs pool_scores "
    "pool_slots pool_ends pool_finished pool_last_logprobs ended done"
).split()


def beam_step(logits: Tensor, null_logits: Tensor | None, *state: Tensor) -> None:
    utterances, beams, vocab = logits.shape
    named = dict(zip(STATE, state, strict=True))
    # eight bytes a candidate, sixteen a hypothesis
    memory = {
        "values": logits.new_empty(utterances * 2 * beams * vocab, dtype=torch.float32),
        "candidates": logits.new_empty(utterances * (beams + 1) * 2 * beams, dtype=torch.int64),
        "next": logits.new_empty(utterances * beams * 2, dtype=torch.int64),
    }
    values = {name: tensor.data_ptr() for name, tensor in (named | memory).items()}
    values |= {"logits": logits.data_ptr(), "null_logits": 0 if null_logits is None else null_logits.data_ptr()}
    values |= {"utterances": utterances, "beams": beams, "vocab": vocab, "capacity": named["tokens"].shape[1]}
    values |= {"halves": named["lengths"].shape[0] // max(utterances, 1), "prefix_width": named["prefix"].shape[1]}
    axes = ("utterance", "beam", "token")
    for name, tensor in (("logits", logits), ("null", logits if null_logits is None else null_logits)):
        values |= {f"{name}_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}
    kernel = f"spear_fast::beam_step<{SCALARS[logits.dtype]}>"
    runtime.launch(Launch(SOURCE, kernel, STRUCT, utterances, THREADS), values, logits.device)
