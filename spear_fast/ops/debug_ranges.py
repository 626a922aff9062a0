"""Ranges of integer arguments in debug mode, SPEAR_FAST_DEBUG=1: looked at on any device, whoever computes the op.

Looking waits for the device, so that otherwise only providers look, and only where that is free: on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spear_fast.ops.arguments import takes
from spear_fast.ops.attention_arguments import AttentionArgs, AttentionBackwardArgs
from spear_fast.ops.reference import ranges as reference
from spear_fast.ops.reference.ranges import check_offsets, check_range, check_selection
from spear_fast.ops.selection_params import IntParam, SelectionMethod
from spear_fast.ops.selection_state import BeamState, SampleState


def check(op: str, first: Tensor, *others: Any) -> None:
    """Raises ValueError where an integer argument of `op` lies outside of its range, in debug mode; else looks at none.

    Passes while a CUDA graph is captured, where nothing can be read back.
    """
    if not reference.DEBUG or op not in RANGES or first.device.type == "meta":
        return
    if first.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    RANGES[op](first, *others)


def _append_kv(
    key: Tensor, value: Tensor, freqs: Tensor, positions: Tensor, cache_key: Tensor, cache_value: Tensor
) -> None:
    last = cache_key.shape[2] - key.shape[1]
    check_range("append_kv", "positions", positions, last, "make the caches longer or end the row")


def _decode_self_attention(
    query: Tensor,
    freqs: Tensor,
    cache_key: Tensor,
    cache_value: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    key: Tensor | None = None,
    *others: Tensor | None,
) -> None:
    op, buffer, beams = "decode_self_attention", cache_key.shape[2], query.shape[1]
    least = 0 if key is None else query.shape[2]
    check_range(op, "lengths", lengths, buffer, "make the caches longer or end the hypothesis", least=least)
    read = torch.arange(buffer, device=ancestors.device) < lengths[..., None]
    beam_read = ancestors.masked_fill(~read, 0)
    check_range(op, "ancestors", beam_read, beams - 1, "write each position's beam index before it is read")


def _decode_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    lengths: Tensor,
    *others: Any,
) -> None:
    advice = "pass each utterance's number of source positions"
    check_range("decode_cross_attention", "lengths", lengths, key.shape[2], advice)


def _offsets(op: str, args: AttentionArgs | AttentionBackwardArgs) -> None:
    if args.cu_query is not None and args.cu_key is not None:
        check_offsets(op, "cu_query", args.cu_query, args.query.shape[0], "max_query", args.max_query)
        check_offsets(op, "cu_key", args.cu_key, args.key.shape[0], "max_key", args.max_key)


@takes(AttentionArgs)
def _attention(args: AttentionArgs) -> None:
    _offsets("attention", args)


@takes(AttentionBackwardArgs)
def _attention_backward(args: AttentionBackwardArgs) -> None:
    _offsets("attention_backward", args)


def _cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, op: str = "cross_entropy"
) -> None:
    advice = f"pass ids of the vocabulary, or {ignore_index} for what is ignored"
    check_range(op, "labels", labels.masked_fill(labels == ignore_index, 0), weight.shape[0] - 1, advice)


def _cross_entropy_backward(
    grad_losses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, ignore_index: int
) -> None:
    _cross_entropy(hidden, weight, labels, ignore_index, op="cross_entropy_backward")


def _check_live(
    op: str, method: SelectionMethod, logits: Tensor, state: BeamState | SampleState, lengths: Tensor
) -> None:
    """lengths: `[utterances, beams or 1]`, tokens so far of those hypotheses that go on, 0 of others."""
    live = ~state.done & (state.int_params[:, IntParam.METHOD] == method)
    beam = torch.arange(lengths.shape[1], device=lengths.device)
    used = live[:, None] & (beam < state.int_params[:, IntParam.BEAM_SIZE, None])
    lengths = lengths[: len(state.done)].masked_fill(~used, 0)
    check_selection(op, logits, live, state.int_params, state.prefix, lengths, state.tokens)


@takes(BeamState)
def _beam_step(logits: Tensor, null_logits: Tensor | None, state: BeamState) -> None:
    _check_live("beam_step", SelectionMethod.BEAM, logits, state, state.lengths[:, :1])


@takes(SampleState)
def _sample_step(logits: Tensor, null_logits: Tensor | None, filtered: Tensor | None, state: SampleState) -> None:
    lengths = state.lengths[: len(state.done)].masked_fill(state.finished, 0)
    _check_live("sample_step", SelectionMethod.SAMPLE, logits, state, lengths)


# op → what looks at the integers among its arguments
RANGES: dict[str, Callable[..., None]] = {
    "append_kv": _append_kv,
    "beam_step": _beam_step,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "cross_entropy": _cross_entropy,
    "cross_entropy_backward": _cross_entropy_backward,
    "decode_cross_attention": _decode_cross_attention,
    "decode_self_attention": _decode_self_attention,
    "sample_step": _sample_step,
}
