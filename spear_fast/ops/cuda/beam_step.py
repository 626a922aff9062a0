"""`beam_step` by csrc/cuda/beam_step.cu: its launch, and its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_fast.ops.arguments import takes
from spear_fast.ops.cuda import runtime
from spear_fast.ops.cuda.runtime import SCALARS, Launch
from spear_fast.ops.cuda.selection import THREADS, logits_fields, state_fields
from spear_fast.ops.selection_state import BeamState

SOURCE, STRUCT = "beam_step.cu", "BeamStep"


@takes(BeamState)
def beam_step(logits: Tensor, null_logits: Tensor | None, state: BeamState) -> None:
    utterances, beams, vocab = logits.shape
    memory = {"values": logits.new_empty(utterances * 2 * beams * vocab, dtype=torch.float32)}
    values = state_fields(logits, state._asdict() | memory)
    values |= logits_fields("logits", logits) | logits_fields("null_logits", null_logits)
    kernel = f"spear_fast::beam_step<{SCALARS[logits.dtype]}>"
    runtime.launch(Launch(SOURCE, kernel, STRUCT, utterances, THREADS), values, logits.device)
