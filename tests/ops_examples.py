"""Small arguments for every op, by position: what the tests of all ops alike are run with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ops_attention_inputs
import ops_inputs
import ops_pointwise_inputs
import ops_selection_inputs
import torch

from spear_fast.ops.attention_arguments import AttentionArgs
from spear_fast.ops.reference import attention as reference


def _attention(**options: Any) -> tuple[Any, ...]:
    return tuple(ops_attention_inputs.make(**{"lengths": [3, 0, 5], "null": True, "rotary": True, **options}))


def _attention_backward(**options: Any) -> tuple[Any, ...]:
    arguments = _attention(**options)
    out, lse = reference.attention(*arguments)
    return AttentionArgs(*arguments).backward(torch.randn_like(out), out, lse)


EXAMPLES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    **ops_inputs.MAKE,
    **ops_pointwise_inputs.MAKE,
    **ops_selection_inputs.MAKE,
}
