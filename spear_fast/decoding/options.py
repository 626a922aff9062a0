"""How to decode: one immutable record, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Method = Literal["greedy", "sample", "beam", "speculative"]
BeamMode = Literal["standard", "reference"]

# what the searches that go on in lockstep do not know
_STANDARD_ONLY = ("repetition_penalty", "no_repeat_ngram_size", "prefix", "patience", "coverage_penalty")

# ancestors are stored in one byte
LARGEST_BEAM = 256
# the reference divides by max(temperature, 1e-10): below that only the maximum is left
COLDEST = 1e-10


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Returns a record of decoding options; raises ValueError, one sentence, when they do not fit together.

    method: "greedy" takes the likeliest token; "sample" draws; "beam" searches; "speculative" draws (or, at temperature
        0, takes the likeliest) with drafts of the early-exit head, from the same distribution as "sample".
    beam_size: hypotheses kept for each row. beam_mode: "standard" keeps a pool of finished hypotheses and goes on with
        unfinished ones only; "reference" is the search of spear-tts-pytorch, which goes on past the end of sequence.
    max_length: most tokens of a hypothesis, end of sequence included. min_length: fewest tokens before that end.
    temperature: divides the logits; 0 takes the likeliest token. In beam search it divides them before the log-softmax.
    top_k, top_p: sampling and its drafts draw from the k likeliest tokens, then from the smallest set that holds p.
    filter_logits: takes logits `[rows, vocabulary]` and returns them with -inf where a token is forbidden; not used in
        beam search, as in the reference.
    cond_scale: classifier-free guidance; 1 is none.
    length_penalty: scores are `sum of log-probabilities / length ** length_penalty`, where length counts the generated
        tokens and the end of sequence.
    early_stopping: as in transformers. True: stop at `beam_size` finished hypotheses. False: stop once the best
        unfinished one, scored at its present length, does not beat the worst finished one. "never": the same with the
        longest possible length, where that flatters it.
    num_return_sequences: hypotheses returned for each row, best first: of the beam, or independent draws.
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
        _check_count("beam_size", self.beam_size, LARGEST_BEAM)
        _check_count("max_length", self.max_length)
        _check_count("gamma", self.gamma)
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
        _check(_is_number(self.patience) and self.patience > 0, "patience", "above 0", self.patience)
        _check(_is_number(self.coverage_penalty) and self.coverage_penalty >= 0, "coverage_penalty", "0 or more",
               self.coverage_penalty)  # fmt: skip
        _check(isinstance(self.return_alignment, bool), "return_alignment", "True or False", self.return_alignment)
        _check(isinstance(self.prefix, tuple) and all(_is_whole(token) and token >= 0 for token in self.prefix),
               "prefix", "a tuple of ids", self.prefix)  # fmt: skip
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
            for name in (*_STANDARD_ONLY, "length_penalty", "early_stopping", "min_length"):
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
    def in_lockstep(self) -> bool:
        """Whether the rows of a batch depend on each other, or go on by whole rounds: not for the engine."""
        return self.method == "speculative" or (self.method == "beam" and self.beam_mode == "reference")


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
