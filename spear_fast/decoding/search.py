"""The reference's beam search, and callers' own filters of logits. All of it stays on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.state import DecodeState
from spear_fast.ops.reference.selection import follow_parents, record_step
from spear_fast.ops.selection_params import FloatParam
from spear_fast.transfer import to_device

Filter = Callable[[Tensor], Tensor]


def reference_step(
    decoder: Decoder,
    state: DecodeState,
    conditional: Tensor,
    unconditional: Tensor | None,
    options: DecodingOptions,
    slots: list[int],
) -> None:
    """Makes a step of the reference's search (reference line 720) in some slots, all of these options.

    K candidates of each beam, the best K of those; hypotheses go on past their end. `ended` becomes the step at which
    all of an utterance's hypotheses hold an end, or are NaN; they do from then on.

    conditional, unconditional: logits `[U, beams, vocabulary]`.
    """
    beams, vocab = options.beam_size, conditional.shape[-1]
    logits = conditional[:, :beams].to(state.scores.dtype)
    if unconditional is not None and options.cond_scale != 1:
        null = unconditional[:, :beams].to(state.scores.dtype)
        logits = null + (logits - null) * options.cond_scale
    if options.temperature != 1:
        logits = logits / max(options.temperature, 1e-10)
    logprobs = logits.log_softmax(dim=-1)
    width = min(beams, vocab)
    best, ids = logprobs.topk(width, dim=-1)
    totals = (state.scores[:, :beams, None] + best).flatten(1)
    order = totals.sort(dim=-1, descending=True, stable=True).indices[:, :beams]

    live = slot_mask(state, slots) & ~state.done
    written = (live[:, None] & (torch.arange(state.beams, device=live.device) < beams)).contiguous()
    steps = state.generated.masked_fill(~written, 0)

    def wide(values: Tensor) -> Tensor:
        return F.pad(values, (0, state.beams - beams))

    parents = wide(order // width)
    chosen = wide(ids.flatten(1).gather(1, order))
    own = wide(best.flatten(1).gather(1, order))
    for history, new in ((state.tokens, chosen), (state.parents, parents), (state.logprobs, own)):
        record_step(history, steps, new, written)
    follow_parents(state.ancestors, parents, steps[:, :1], written)
    state.inputs.copy_(torch.where(written, chosen, state.inputs))
    state.scores.copy_(torch.where(written, wide(totals.gather(1, order)), state.scores))
    state.lengths += written.repeat(state.lengths.shape[0] // state.batch, 1)
    if decoder.eos_id is not None:
        finished = state.finished.gather(1, parents) | (chosen == decoder.eos_id)
        state.finished.copy_(torch.where(written, finished, state.finished))
    over = (state.finished | state.scores.isnan())[:, :beams].all(dim=-1)
    state.ended.copy_(torch.where(live & over & (state.ended == 0), state.lengths[: state.batch, 0], state.ended))
    state.done |= live & (state.lengths[: state.batch, 0] >= options.max_length)


def slot_mask(state: DecodeState, slots: list[int]) -> Tensor:
    """Returns `[U]` bool, on the state's device: which slots these are."""
    mask = torch.zeros(state.batch, dtype=torch.bool, device="cpu")
    mask[slots] = True
    return to_device(mask, state.done.device)


class FilterError(Exception):
    """A caller's function of logits failed; its own exception is the cause."""


@dataclass(frozen=True)
class Filtered:
    """Logits after callers' functions.

    logits: `[U, beams, vocabulary]`, guidance mixed in, or None where there is no function. index: `[n]` int64, the
    slots whose logits went through one.
    """

    logits: Tensor | None
    index: Tensor | None = None

    def for_beams(self, conditional: Tensor, float_params: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits and parameters for `ops.beam_step`, which mixes guidance in by itself."""
        if self.logits is None:
            return conditional, float_params
        own, params = conditional.clone(), float_params.clone()
        own[self.index] = self.logits[self.index]
        params[self.index, FloatParam.GUIDANCE] = 1
        return own, params


def apply_filters(
    conditional: Tensor,
    unconditional: Tensor | None,
    state: DecodeState,
    filters: Iterable[tuple[Filter, list[int]]],
) -> tuple[Filtered, list[tuple[list[int], BaseException]]]:
    """Returns the logits after each caller's own function, and slots with what a function raised for them.

    conditional, unconditional: `[U, beams, vocabulary]`. filters: functions, each with its slots.
    """
    filters = list(filters)
    if not filters:
        return Filtered(None), []
    logits = conditional.to(state.scores.dtype)
    if unconditional is not None:
        guidance = state.float_params[:, FloatParam.GUIDANCE, None, None]
        logits = torch.where(guidance == 1, logits, unconditional + (logits - unconditional) * guidance)
    filtered, failures = logits.clone(), []
    for function, slots in filters:
        index = to_device(torch.tensor(slots, device="cpu"), logits.device)
        rows = logits[index]
        try:
            filtered[index] = call_filter(function, rows.flatten(0, 1)).view_as(rows)
        except FilterError as error:
            failures.append((slots, error.__cause__ or error))
    index = to_device(torch.tensor(sorted(slot for _, slots in filters for slot in slots), device="cpu"), logits.device)
    return Filtered(filtered.to(conditional.dtype), index), failures


def call_filter(function: Filter, logits: Tensor) -> Tensor:
    """Returns `function(logits)`, `[rows, vocabulary]`; raises FilterError from what it raised or gave instead."""
    try:
        filtered = function(logits)
        if not isinstance(filtered, Tensor) or filtered.shape != logits.shape:
            got = list(filtered.shape) if isinstance(filtered, Tensor) else type(filtered).__name__
            raise ValueError(f"filter_logits must return logits {list(logits.shape)}, as it was given, got {got}.")
    # whatever a caller's function raises is the business of its own requests alone
    except BaseException as error:
        raise FilterError from error
    return filtered
