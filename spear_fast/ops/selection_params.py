"""The columns of the two tensors in which each utterance has its own parameters of selection.

csrc/select/params.h has the same columns in the same order.
"""

from __future__ import annotations

from enum import IntEnum, auto

# at or below this only the likeliest token is left; beam search divides by it where less is asked for
COLDEST = 1e-10


class _Columns(IntEnum):
    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return count


class FloatParam(_Columns):
    """Columns of `float_params`, `[utterances, len(FloatParam)]`, of the dtype of the scores.

    TEMPERATURE: divides the logits; sampling at `COLDEST` or below takes the likeliest token.
    GUIDANCE: scale of classifier-free guidance; 1 leaves the null logits unread.
    LENGTH_PENALTY: exponent of the length by which scores are divided, in beam search.
    REPETITION_PENALTY: divides positive and multiplies negative scores of tokens that came before; 1 is none.
    PATIENCE: the search may end once `round(patience * beam_size)` hypotheses have.
    TOP_P: the share of the smallest set of tokens to draw from; 1 or more is all.
    """

    TEMPERATURE = auto()
    GUIDANCE = auto()
    LENGTH_PENALTY = auto()
    REPETITION_PENALTY = auto()
    PATIENCE = auto()
    TOP_P = auto()


class IntParam(_Columns):
    """Columns of `int_params`, `[utterances, len(IntParam)]`, int32.

    METHOD: a `SelectionMethod`; an op leaves utterances of another method as they are.
    BEAM_SIZE: hypotheses in use, the first of the beams; the others are neither read nor written.
    MAX_LENGTH, MIN_LENGTH: most tokens, the end of sequence included; fewest before it.
    EOS_ID: -1 where nothing ends a sequence.
    NO_REPEAT_NGRAM_SIZE: no n-gram of this size comes twice; 0 is no ban.
    EARLY_STOPPING: an `EarlyStopping`.
    PREFIX_LENGTH: tokens at the start that are given.
    TOP_K: draws are from so many likeliest tokens; 0 is all.
    """

    METHOD = auto()
    BEAM_SIZE = auto()
    MAX_LENGTH = auto()
    MIN_LENGTH = auto()
    EOS_ID = auto()
    NO_REPEAT_NGRAM_SIZE = auto()
    EARLY_STOPPING = auto()
    PREFIX_LENGTH = auto()
    TOP_K = auto()


class SelectionMethod(IntEnum):
    """BEAM utterances are for `beam_step`, SAMPLE for `sample_step`, greedy ones among them.

    REFERENCE and SPECULATIVE ones are for step functions of `spear_fast.decoding`; the ops leave them as they are.
    """

    BEAM = 0
    SAMPLE = 1
    REFERENCE = 2
    SPECULATIVE = 3


class EarlyStopping(IntEnum):
    """When a beam search with enough ended hypotheses is over.

    AT_BOUND: once the best that goes on, at its present length, does not beat the worst ended one. AT_ONCE: at once.
    NEVER: as AT_BOUND, but at the longest possible length where that flatters it.
    """

    AT_BOUND = 0
    AT_ONCE = 1
    NEVER = 2
