"""Ranges of integer arguments in debug mode, SPEAR_FAST_DEBUG=1: looked at on any device, whoever computes the op.

Looking waits for the device, so that otherwise only providers look, and only where that is free: on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spear_fast.ops.reference import ranges as reference
from spear_fast.ops.reference.ranges import check_offsets, check_range, check_selection
from spear_fast.ops.selection_params import IntParam, SelectionMethod


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
    query: Tensor, freqs: Tensor, cache_key: Tensor, cache_value: Tensor, ancestors: Tensor, lengths: Tensor
) -> None:
    op, buffer, beams = "decode_self_attention", cache_key.shape[2], query.shape[1]
    check_range(op, "lengths", lengths, buffer, "make the caches longer or end the hypothesis")
    read = torch.arange(buffer, device=ancestors.device) < lengths[..., None]
    slots = ancestors.masked_fill(~read, 0)
    check_range(op, "ancestors", slots, beams - 1, "write each position's slot before it is read")


def _decode_cross_attention(query: Tensor, key: Tensor, *others: Any) -> None:
    lengths, advice = others[3], "pass each utterance's number of source positions"
    check_range("decode_cross_attention", "lengths", lengths, key.shape[2], advice)


def _attention(query: Tensor, key: Tensor, value: Tensor, *others: Any, op: str = "attention") -> None:
    _, cu_query, cu_key, max_query, max_key, *_ = others
    if cu_query is not None:
        check_offsets(op, "cu_query", cu_query, query.shape[0], "max_query", max_query)
    if cu_key is not None:
        check_offsets(op, "cu_key", cu_key, key.shape[0], "max_key", max_key)


def _attention_backward(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> None:
    _attention(query, key, value, *others[2:], op="attention_backward")


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
    op: str,
    method: SelectionMethod,
    logits: Tensor,
    int_params: Tensor,
    prefix: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    done: Tensor,
) -> None:
    live = ~done & (int_params[:, IntParam.METHOD] == method)
    slot = torch.arange(lengths.shape[1], device=lengths.device)
    used = live[:, None] & (slot < int_params[:, IntParam.BEAM_SIZE, None])
    check_selection(op, logits, live, int_params, prefix, lengths[: len(done)].masked_fill(~used, 0), tokens)


def _beam_step(
    logits: Tensor, null_logits: Tensor | None, float_params: Tensor, int_params: Tensor, prefix: Tensor,
    inputs: Tensor, scores: Tensor, lengths: Tensor, ancestors: Tensor, tokens: Tensor, *others: Tensor,
) -> None:  # fmt: skip
    _check_live("beam_step", SelectionMethod.BEAM, logits, int_params, prefix, lengths[:, :1], tokens, others[-1])


def _sample_step(
    logits: Tensor, null_logits: Tensor | None, filtered: Tensor | None, float_params: Tensor, int_params: Tensor,
    prefix: Tensor, seeds: Tensor, inputs: Tensor, scores: Tensor, lengths: Tensor, ancestors: Tensor, tokens: Tensor,
    parents: Tensor, logprobs: Tensor, finished: Tensor, done: Tensor,
) -> None:  # fmt: skip
    lengths = lengths[: len(done)].masked_fill(finished, 0)
    _check_live("sample_step", SelectionMethod.SAMPLE, logits, int_params, prefix, lengths, tokens, done)


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
