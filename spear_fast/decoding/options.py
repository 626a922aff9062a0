"""How to decode: one immutable record, checked when it is made, and the same as the selection ops read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spear_fast.ops.selection_params import COLDEST, EarlyStopping, FloatParam, IntParam, SelectionMethod

Method = Literal["greedy", "sample", "beam", "speculative"]
BeamMode = Literal["standard", "reference"]
Drafter = Literal["early_exit", "ngram"]

# what neither the reference's search nor speculative decoding knows
_STANDARD_ONLY = ("repetition_penalty", "no_repeat_ngram_size", "prefix", "patience", "coverage_penalty")

# ancestors are stored in one byte
LARGEST_BEAM = 256
# drafts of one round; buffers are that much longer
LARGEST_GAMMA = 256
# the selection ops read whole numbers as int32
LARGEST_INT = 2**31 - 1
EARLY_STOPPING = {True: EarlyStopping.AT_ONCE, False: EarlyStopping.AT_BOUND, "never": EarlyStopping.NEVER}


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Returns a record of decoding options; raises ValueError, one sentence, when they do not fit together.

    method: "greedy" takes the likeliest token; "sample" draws; "beam" searches; "speculative" draws (or, at temperature
        0, takes the likeliest) with drafts, from the same distribution as "sample".
    beam_size: hypotheses kept for each row. beam_mode: "standard" keeps a pool of finished hypotheses and extends
        unfinished ones only; "reference" is the search of spear-tts-pytorch, which goes on past the end of sequence.
    max_length: most tokens of a hypothesis, end of sequence included. min_length: fewest tokens before that end. These
        and all other whole numbers are at most 2**31 - 1.
    temperature: divides the logits; 0 takes the likeliest token. In beam search it divides them before the log-softmax.
    top_k, top_p: sampling and its drafts draw from the k likeliest tokens, then from the smallest set that holds p.
    filter_logits: takes logits `[rows, vocabulary]` and returns them with -inf where a token is forbidden; not for the
        reference's search, which ignores it. What it raises fails the requests that have this function, no others.
    cond_scale: classifier-free guidance; 1 is none.
    length_penalty: scores are `sum of log-probabilities / length ** length_penalty`, where length counts the generated
        tokens and the end of sequence.
    early_stopping: as in transformers. True: stop at `beam_size` finished hypotheses. False: stop once the best
        unfinished one, scored at its present length, does not beat the worst finished one. "never": the same with the
        longest possible length, where that flatters it.
    num_return_sequences: hypotheses returned for each row, best first: of the beam, or independent draws.
    drafter: of speculative decoding: the model's "early_exit" head, or, for any model, "ngram": what followed the last
        tokens where they came before.
    gamma: drafted tokens for each verification. lenience: below 1 accepts drafts more often and is no longer exact.
    generator: of the random draws, on the model's device.
    repetition_penalty: divides the positive and multiplies the negative scores (in beam search: log-probabilities) of
        tokens that came before; 1 is none. no_repeat_ngram_size: no n-gram of this size comes twice; 0 is no ban.
    prefix: ids that every hypothesis starts with; they cost nothing and count as generated tokens.
    patience: the search may end once `round(patience * beam_size)` hypotheses have (arXiv 2204.05424).
    coverage_penalty: at the end `coverage_penalty * sum of log(min(1, attention received))` over the source positions
        is added to the scores of all `beam_size` (or drawn) hypotheses, and they are ranked again (arXiv 1609.08144).
    return_alignment: whether the result has an `alignment`; takes a pass over the hypotheses, and slows no step down.
    """

    method: Method = "beam"
    beam_size: int = 4
    beam_mode: BeamMode = "standard"
    max_length: int = 2048
    min_length: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    filter_logits: Callable[[Tensor], Tensor] | None = None
    cond_scale: float = 1.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    drafter: Drafter = "early_exit"
    gamma: int = 5
    lenience: float = 1.0
    generator: torch.Generator | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    prefix: tuple[int, ...] = ()
    patience: float = 1.0
    coverage_penalty: float = 0.0
    return_alignment: bool = False

    def __post_init__(self) -> None:
        _check(self.method in get_args(Method), "method", "one of " + ", ".join(get_args(Method)), self.method)
        _check(self.beam_mode in get_args(BeamMode), "beam_mode", "'standard' or 'reference'", self.beam_mode)
        _check(self.drafter in get_args(Drafter), "drafter", "'early_exit' or 'ngram'", self.drafter)
        _check_count("beam_size", self.beam_size, LARGEST_BEAM)
        _check_count("max_length", self.max_length)
        _check_count("gamma", self.gamma)
        _check(self.gamma <= LARGEST_GAMMA, "gamma", f"at most {LARGEST_GAMMA}", self.gamma)
        _check(_is_whole(self.min_length) and 0 <= self.min_length < self.max_length, "min_length",
               f"a whole number from 0 to below max_length {self.max_length}", self.min_length)  # fmt: skip
        _check(_is_number(self.temperature) and self.temperature >= 0, "temperature", "0 or more", self.temperature)
        _check(_is_number(self.cond_scale) and self.cond_scale >= 1, "cond_scale", "1 or more", self.cond_scale)
        _check(_is_number(self.length_penalty), "length_penalty", "a finite number", self.length_penalty)
        _check(_is_number(self.lenience) and 0 < self.lenience <= 1, "lenience", "above 0 and at most 1", self.lenience)
        _check(
            self.early_stopping in (True, False, "never"),
            "early_stopping",
            "True, False or 'never'",
            self.early_stopping,
        )
        _check(_is_number(self.repetition_penalty) and self.repetition_penalty > 0, "repetition_penalty", "above 0",
               self.repetition_penalty)  # fmt: skip
        _check(_is_whole(self.no_repeat_ngram_size) and self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size",
               "a whole number of 0 or more", self.no_repeat_ngram_size)  # fmt: skip
        _check(self.no_repeat_ngram_size <= LARGEST_INT, "no_repeat_ngram_size", f"at most {LARGEST_INT}",
               self.no_repeat_ngram_size)  # fmt: skip
        _check(self.filter_logits is None or callable(self.filter_logits), "filter_logits", "a function or None",
               self.filter_logits)  # fmt: skip
        _check(_is_number(self.patience) and self.patience > 0, "patience", "above 0", self.patience)
        _check(_is_number(self.coverage_penalty) and self.coverage_penalty >= 0, "coverage_penalty", "0 or more",
               self.coverage_penalty)  # fmt: skip
        _check(isinstance(self.return_alignment, bool), "return_alignment", "True or False", self.return_alignment)
        are_ids = isinstance(self.prefix, tuple) and all(_is_whole(each) and 0 <= each < 2**31 for each in self.prefix)
        _check(are_ids, "prefix", "a tuple of ids", self.prefix)
        _check(len(self.prefix) < self.max_length, "prefix", f"shorter than max_length {self.max_length}", self.prefix)
        if self.top_k is not None:
            _check_count("top_k", self.top_k)
        if self.top_p is not None:
            _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        self._check_method()

    def _check_method(self) -> None:
        drawn = self.method in ("sample", "speculative")
        if not drawn and (self.top_k is not None or self.top_p is not None):
            raise ValueError(f"top_k and top_p are for sampling, got method {self.method!r}; leave them out or sample.")
        most = self.hypotheses
        _check(_is_whole(self.num_return_sequences) and 1 <= self.num_return_sequences <= most, "num_return_sequences",
               f"from 1 to {most} with method {self.method!r}", self.num_return_sequences)  # fmt: skip
        if self.method == "beam" and self.beam_mode == "reference":
            for name in (*_STANDARD_ONLY, "length_penalty", "early_stopping", "min_length", "filter_logits"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name} is not part of the reference's search, got {getattr(self, name)!r}; "
                        "use beam_mode='standard'."
                    )

        if self.method == "speculative":
            for name in _STANDARD_ONLY:
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"{name} is not part of speculative decoding, got {getattr(self, name)!r}; sample."
                    )

    @property
    def hypotheses(self) -> int:
        """Hypotheses that are decoded side by side for each row."""
        if self.method == "beam":
            return self.beam_size
        if self.method == "sample" and _is_whole(self.num_return_sequences):
            return min(max(self.num_return_sequences, 1), LARGEST_BEAM)
        return 1

    @property
    def deterministic(self) -> bool:
        """Whether the likeliest token is taken instead of a draw."""
        return self.method == "greedy" or self.temperature <= COLDEST

    @property
    def guided(self) -> bool:
        return self.cond_scale > 1

    @property
    def aligns(self) -> bool:
        """Whether it is wanted where the hypotheses looked in their source."""
        return self.return_alignment or self.coverage_penalty > 0

    @property
    def group(self) -> tuple:
        """What requests have in common that a step function can decode together."""
        sampled = (
            self.drafter,
            self.gamma,
            self.lenience,
            self.top_k,
            self.top_p,
            id(self.filter_logits),
            self.min_length,
        )
        return self.kind, self.beam_size, self.max_length, self.temperature, self.cond_scale, sampled

    @property
    def kind(self) -> SelectionMethod:
        """Which step function decodes it."""
        if self.method == "speculative":
            return SelectionMethod.SPECULATIVE
        if self.method != "beam":
            return SelectionMethod.SAMPLE
        return SelectionMethod.REFERENCE if self.beam_mode == "reference" else SelectionMethod.BEAM


@dataclass(frozen=True)
class PackedOptions:
    """Options of requests as the selection ops read them, a row for each.

    float_params: `[requests, len(FloatParam)]` float64. int_params: `[requests, len(IntParam)]` int32.
    prefix: `[requests, longest]` int32.
    """

    float_params: Tensor
    int_params: Tensor
    prefix: Tensor

    @classmethod
    def of(cls, options: Sequence[DecodingOptions], eos_id: int | None) -> PackedOptions:
        """Returns the rows of requests, each with options of its own."""
        longest = max(len(each.prefix) for each in options)
        prefixes = [[*each.prefix, *(0 for _ in range(longest - len(each.prefix)))] for each in options]
        return cls(
            float_params=torch.tensor([_float_params(each) for each in options], dtype=torch.float64, device="cpu"),
            int_params=torch.tensor([_int_params(each, eos_id) for each in options], dtype=torch.int32, device="cpu"),
            prefix=torch.tensor(prefixes, dtype=torch.int32, device="cpu").view(len(options), longest),
        )


def _float_params(options: DecodingOptions) -> list[float]:
    values = {
        FloatParam.TEMPERATURE: 0.0 if options.method == "greedy" else options.temperature,
        FloatParam.GUIDANCE: options.cond_scale,
        FloatParam.LENGTH_PENALTY: options.length_penalty,
        FloatParam.REPETITION_PENALTY: options.repetition_penalty,
        FloatParam.PATIENCE: options.patience,
        FloatParam.TOP_P: 1.0 if options.top_p is None else options.top_p,
    }
    return [values[column] for column in FloatParam]


def _int_params(options: DecodingOptions, eos_id: int | None) -> list[int]:
    values = {
        IntParam.METHOD: options.kind,
        IntParam.BEAM_SIZE: options.hypotheses,
        IntParam.MAX_LENGTH: options.max_length,
        IntParam.MIN_LENGTH: options.min_length,
        IntParam.EOS_ID: -1 if eos_id is None else eos_id,
        IntParam.NO_REPEAT_NGRAM_SIZE: options.no_repeat_ngram_size,
        IntParam.EARLY_STOPPING: EARLY_STOPPING[options.early_stopping],
        IntParam.PREFIX_LENGTH: len(options.prefix),
        IntParam.TOP_K: options.top_k or 0,
    }
    return [int(values[column]) for column in IntParam]


def new_seed(options: DecodingOptions) -> int:
    """Returns the seed of a request's draws: from its generator, else from torch's own; 0 where nothing is drawn."""
    if options.deterministic or options.method == "beam":
        return 0
    generator = options.generator
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(holds: bool, name: str, wanted: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {got!r}.")


def _check_count(name: str, value: Any, most: int | None = None) -> None:
    wanted = "a whole number of at least 1" if most is None else f"a whole number from 1 to {most}"
    _check(_is_whole(value) and value >= 1 and (most is None or value <= most), name, wanted, value)
    _check(value <= LARGEST_INT, name, f"at most {LARGEST_INT}", value)
