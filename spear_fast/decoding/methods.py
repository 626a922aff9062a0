"""One step of all that is in flight: each utterance by the step function of its method, over one state.

Standard beam search, sampling and the reference's search choose from the logits of the newest inputs, in one pass of
the decoder for all; speculative decoding makes rounds of its own. Each writes its own utterances and leaves the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from spear_fast import ops
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.search import FilterError, apply_filters, reference_step
from spear_fast.decoding.speculative import speculate
from spear_fast.decoding.state import DecodeState
from spear_fast.decoding.step import decode_step
from spear_fast.ops.selection_params import SelectionMethod

# slots, and what a caller's function raised for them
Failure = tuple[list[int], BaseException]


@dataclass
class Mix:
    """Which step functions the slots in use want.

    beam, sample: whether some are for `ops.beam_step`, for `ops.sample_step`. filters: functions of callers, each with
    its slots, but those of speculative decoding. groups: slots of the reference's search and of speculative decoding,
    those of equal options together.
    """

    beam: bool = False
    sample: bool = False
    filters: dict[int, tuple[Callable[[Tensor], Tensor], list[int]]] = field(default_factory=dict)
    groups: dict[Hashable, tuple[DecodingOptions, list[int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, slots: Iterable[tuple[int, DecodingOptions]]) -> Mix:
        """Returns the mix of slots in use and their options."""
        mix = cls()
        for slot, options in slots:
            mix.beam |= options.kind == SelectionMethod.BEAM
            mix.sample |= options.kind == SelectionMethod.SAMPLE
            if options.filter_logits is not None and options.kind != SelectionMethod.SPECULATIVE:
                mix.filters.setdefault(id(options.filter_logits), (options.filter_logits, []))[1].append(slot)
            if options.kind in (SelectionMethod.REFERENCE, SelectionMethod.SPECULATIVE):
                mix.groups.setdefault(options.group, (options, []))[1].append(slot)
        return mix

    @property
    def capturable(self) -> bool:
        """Whether a step is the same work each time: a caller's function may do what no graph can capture."""
        return not self.filters and not self.groups

    @property
    def drafted(self) -> int:
        """Most tokens that a step drafts beyond the one that it appends."""
        return max(
            (each.gamma for each, _ in self.groups.values() if each.kind == SelectionMethod.SPECULATIVE), default=0
        )


def step(decoder: Decoder, state: DecodeState, mix: Mix) -> list[Failure]:
    """Makes one step of all utterances of a state that are not done; slots that are in use come first.

    Returns slots and what a caller's function raised for them; those are as they were, or have made a step without it.
    """
    failures: list[Failure] = []
    speculating = {key: each for key, each in mix.groups.items() if each[0].kind == SelectionMethod.SPECULATIVE}
    if mix.beam or mix.sample or len(speculating) < len(mix.groups):
        failures += _step_by_logits(decoder, state, mix)
    for options, slots in speculating.values():
        try:
            speculate(decoder, state, options, slots)
        except FilterError as error:
            failures.append((slots, error.__cause__ or error))
    return failures


def _step_by_logits(decoder: Decoder, state: DecodeState, mix: Mix) -> list[Failure]:
    """Makes the step of all whose selection follows from the logits of the newest inputs."""
    logits = decode_step(decoder, state).view(*state.lengths.shape, -1)
    conditional, unconditional = logits.chunk(2) if state.guided else (logits, None)
    filtered, failures = apply_filters(conditional, unconditional, state, mix.filters.values())
    buffers = state.inputs, state.scores, state.lengths, state.ancestors, state.tokens, state.parents, state.logprobs
    if mix.beam:
        own, float_params = filtered.for_beams(conditional, state.float_params)
        ops.beam_step(
            own, unconditional, float_params, state.int_params, state.prefix, *buffers, state.pool_scores,
            state.pool_beams, state.pool_ends, state.pool_finished, state.pool_last_logprobs, state.ended, state.done,
        )  # fmt: skip
    if mix.sample:
        ops.sample_step(
            conditional, unconditional, filtered.logits, state.float_params, state.int_params, state.prefix,
            state.seeds, *buffers, state.finished, state.done,
        )  # fmt: skip
    for options, slots in mix.groups.values():
        if options.kind == SelectionMethod.REFERENCE:
            reference_step(decoder, state, conditional, unconditional, options, slots)
    return failures
