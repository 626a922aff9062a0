"""`sample_step` by csrc/cuda/sample_step.cu: its launch, and its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_fast.ops.cuda import runtime
from spear_fast.ops.cuda.runtime import SCALARS, Launch
from spear_fast.ops.cuda.selection import THREADS, logits_fields, state_fields

SOURCE, STRUCT = "sample_step.cu", "SampleStep"
# in the order of the op's arguments behind the logits; the struct's fields have the same names
STATE = (
    "float_params int_params prefix seeds inputs scores lengths ancestors tokens parents logprobs finished done"
).split()


def sample_step(logits: Tensor, null_logits: Tensor | None, filtered: Tensor | None, *state: Tensor) -> None:
    utterances, beams, vocab = logits.shape
    memory = {"values": logits.new_empty(utterances * 2 * beams * vocab, dtype=torch.float32)}
    values = state_fields(logits, dict(zip(STATE, state, strict=True)) | memory)
    values |= logits_fields("logits", logits) | logits_fields("null_logits", null_logits)
    values |= logits_fields("filtered", filtered)
    kernel = f"spear_fast::sample_step<{SCALARS[logits.dtype]}>"
    runtime.launch(Launch(SOURCE, kernel, STRUCT, utterances, THREADS), values, logits.device)
