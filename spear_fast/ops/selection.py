"""Selection: what becomes of a step's logits, for every utterance by its own parameters; one call a step.

Everything is written in place, nothing is read back. `utterances` of `beams` hypotheses each; `rows` is
`utterances`, or twice as many where the decoder also runs without source, for guidance: the second half of `lengths`
and `ancestors` is then treated like the first. All tensors but the logits are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase

import torch
from torch import Tensor

from spear_fast.ops import backends
from spear_fast.ops.arguments import takes
from spear_fast.ops.checks import check_float, refuse, remembering, shape_of
from spear_fast.ops.providers import register
from spear_fast.ops.reference import selection as reference
from spear_fast.ops.registry import define
from spear_fast.ops.selection_params import FloatParam, IntParam
from spear_fast.ops.selection_state import PARAMETERS, BeamState, SampleState


def beam_step(
    logits: Tensor,
    null_logits: Tensor | None,
    float_params: Tensor,
    int_params: Tensor,
    prefix: Tensor,
    inputs: Tensor,
    scores: Tensor,
    lengths: Tensor,
    ancestors: Tensor,
    tokens: Tensor,
    parents: Tensor,
    logprobs: Tensor,
    pool_scores: Tensor,
    pool_beams: Tensor,
    pool_ends: Tensor,
    pool_finished: Tensor,
    pool_last_logprobs: Tensor,
    ended: Tensor,
    done: Tensor,
) -> None:
    """Writes a step of beam search into every utterance of `SelectionMethod.BEAM` that is not done.

    The others stay as they are. Of the best `2 * beam_size` candidates, those among the first `beam_size` that end
    enter the pool, and the best `beam_size` that do not end go on. A hypothesis that reaches `max_length` competes for
    the pool as well, unfinished. Ties go to the lower beam and id; NaN counts as the best, and ends the utterance that
    chooses it. Candidates are ranked by the sum of their log-probabilities, each with the penalty of a token that came
    before, -inf where a ban forbids it; a forced prefix costs nothing. The pool ranks by that sum divided by `length **
    length_penalty`, where length counts the end of sequence but not the prefix.

    logits, null_logits: `[utterances, beams, vocabulary]`, floating point; the latter, of the decoder without source,
        may be None.
    float_params: `[utterances, len(FloatParam)]`, of the scores' dtype; see `FloatParam`.
    int_params: `[utterances, len(IntParam)]`, int32; see `IntParam`.
    prefix: `[utterances, longest prefix]`, int32; the tokens that every hypothesis starts with.
    inputs: `[utterances, beams]`, int64; becomes the chosen tokens.
    scores: `[utterances, beams]`, float32, or float64 like the logits; of the hypotheses; -inf where there is none.
    lengths: `[rows, beams]`, int64; tokens so far, below the capacity where the utterance is not done; rises by one.
    ancestors: `[rows, beams, capacity]`, uint8; the beam index under which the input at a position was written: the
        start at position 0, the token of step i at position i + 1. Positions up to `lengths` follow the hypotheses that
        go on; the one after them becomes each hypothesis' own beam index.
    tokens, parents, logprobs: `[utterances, capacity, beams]`, int32, uint8, like the scores; what each step appended,
        to which hypothesis, and the model's log-probability of it at the temperature. Written at `lengths`.
    pool_scores, pool_beams, pool_ends, pool_finished, pool_last_logprobs: `[utterances, beams]`, like the scores,
        int64, int64, bool, like the scores; ended hypotheses, best first: score, -inf where there is none; the beam
        index of the last token but the end of sequence, and the number of tokens up to there; whether an end of
        sequence follows, or `max_length` cut it; the log-probability of that end, 0 without one.
    ended: `[utterances]`, int64; hypotheses that have entered the pool, dropped ones counted.
    done: `[utterances]`, bool; becomes True where the search is over.

    Raises ValueError where the arguments do not fit each other, or parameters or lengths lie outside of the buffers.
    Source: the standard search of transformers, with patience from arXiv 2204.05424; the reference's own search
    (reference line 720) is `beam_mode="reference"` of decoding.
    """
    return _beam_step(
        logits, null_logits, float_params, int_params, prefix, inputs, scores, lengths, ancestors, tokens,
        parents, logprobs, pool_scores, pool_beams, pool_ends, pool_finished, pool_last_logprobs, ended, done,
    )  # fmt: skip


def sample_step(
    logits: Tensor,
    null_logits: Tensor | None,
    filtered: Tensor | None,
    float_params: Tensor,
    int_params: Tensor,
    prefix: Tensor,
    seeds: Tensor,
    inputs: Tensor,
    scores: Tensor,
    lengths: Tensor,
    ancestors: Tensor,
    tokens: Tensor,
    parents: Tensor,
    logprobs: Tensor,
    finished: Tensor,
    done: Tensor,
) -> None:
    """Writes a token after every hypothesis of `SelectionMethod.SAMPLE` that has not ended: a draw, or the likeliest.

    In this order: guidance, penalties and bans, temperature, `top_k`, `top_p`, the draw; temperature 0 takes the
    likeliest. Ties go to the lower id. A draw takes 53 bits of Philox-4x32-10 with the utterance's seed as its key at
    the counter (step, hypothesis, 0, 0), and the first token whose cumulative weight exceeds that share of the whole:
    nothing else in the batch changes it.
    A hypothesis also ends where its logits hold NaN, or where nothing may come next: its score is then not finite.

    logits, null_logits, filtered: `[utterances, beams, vocabulary]`, floating point; the latter two may be None.
        filtered is what to draw from instead of the mixed logits, before penalties and bans.
    float_params, int_params, prefix: `[utterances, columns]`, as for `beam_step`.
    seeds: `[utterances]`, int64.
    inputs: `[utterances, beams]`, int64; becomes the chosen tokens.
    scores: `[utterances, beams]`, float32, or float64 like the logits; sums of log-probabilities by the mixed logits,
        before all else, the prefix left out.
    lengths: `[rows, beams]`, int64; tokens so far; the hypotheses of an utterance may have different ones.
    ancestors: `[rows, beams, capacity]`, uint8; after the lengths it becomes each hypothesis' own beam index.
    tokens, parents, logprobs: `[utterances, capacity, beams]`, int32, uint8, like the scores; what each step appended,
        the hypothesis itself, and the log-probability by the mixed logits, of the prefix too.
    finished: `[utterances, beams]`, bool; becomes True where a hypothesis has ended.
    done: `[utterances]`, bool; becomes True where each has ended or has `max_length` tokens.

    Raises ValueError where the arguments do not fit each other, or parameters or lengths lie outside of the buffers.
    Source: the reference's sampling (reference line 706), which draws by Gumbel noise from one generator for all.
    """
    return _sample_step(
        logits, null_logits, filtered, float_params, int_params, prefix, seeds, inputs, scores, lengths,
        ancestors, tokens, parents, logprobs, finished, done,
    )  # fmt: skip


# name → dtype (None: the scores') and shape: U utterances, R rows, K beams, T capacity
_BUFFERS = {
    "seeds": (torch.int64, "U"),
    "inputs": (torch.int64, "UK"),
    "scores": (None, "UK"),
    "lengths": (torch.int64, "RK"),
    "ancestors": (torch.uint8, "RKT"),
    "tokens": (torch.int32, "UTK"),
    "parents": (torch.uint8, "UTK"),
    "logprobs": (None, "UTK"),
    "pool_scores": (None, "UK"),
    "pool_beams": (torch.int64, "UK"),
    "pool_ends": (torch.int64, "UK"),
    "pool_finished": (torch.bool, "UK"),
    "pool_last_logprobs": (None, "UK"),
    "ended": (torch.int64, "U"),
    "finished": (torch.bool, "UK"),
    "done": (torch.bool, "U"),
}
_NAMES = {"U": "utterances", "R": "utterances or twice that", "K": "beams", "T": "capacity"}


def _check_logits(op: str, logits: Tensor, others: dict[str, Tensor | None], state: BeamState | SampleState) -> None:
    """Raises ValueError unless the logits and the parameters of an op fit each other."""
    if logits.dim() != 3:
        refuse(op, "logits", "[utterances, beams, vocabulary]", shape_of(logits), "pass the newest step alone")
    utterances, beams, vocab = logits.shape
    check_float(op, "logits", logits.dtype)
    if not (1 <= beams <= 256):
        refuse(op, "beams", "1 to 256", str(beams), "an ancestor is one byte; use fewer beams")
    if not (vocab >= 1 and vocab * beams < 2**31):
        refuse(op, "vocabulary", "at least 1 and, times the beams, below 2**31", str(vocab), "use fewer beams")
    for name, other in others.items():
        if other is None:
            continue
        if other.shape != logits.shape:
            refuse(op, name, f"{shape_of(logits)} like logits", shape_of(other), "pass one row for each hypothesis")
        if other.dtype != logits.dtype or other.device != logits.device:
            refuse(op, name, f"{logits.dtype} on {logits.device} like logits", f"{other.dtype} on {other.device}",
                   "convert it with .to()")  # fmt: skip
    precise = torch.promote_types(logits.dtype, torch.float32)
    for name, params, width, dtype in (
        ("float_params", state.float_params, len(FloatParam), precise),
        ("int_params", state.int_params, len(IntParam), torch.int32),
        ("prefix", state.prefix, None, torch.int32),
    ):
        if params.dim() != 2 or params.shape[0] != utterances or params.shape[1] != (width or params.shape[1]):
            columns = "longest prefix" if width is None else str(width)
            refuse(op, name, f"[{utterances} utterances, {columns}]", shape_of(params), "give each utterance a row")
        _check_tensor(op, name, params, dtype, logits.device)


def _check_tensor(op: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype:
        refuse(op, name, str(dtype), str(tensor.dtype), "convert it with .to()")
    if tensor.device != device:
        refuse(op, name, f"on logits' device {device}", str(tensor.device), "move it with .to()")
    if not tensor.is_contiguous():
        refuse(op, name, "contiguous", f"strides {list(tensor.stride())}", "make it with .contiguous()")


def _check_state(op: str, logits: Tensor, state: BeamState | SampleState) -> None:
    """Raises ValueError unless the buffers fit the logits."""
    utterances, beams = logits.shape[0], logits.shape[1]
    rows = state.lengths.shape[0]
    if rows != utterances and rows != 2 * utterances:
        got = shape_of(state.lengths)
        refuse(op, "lengths", f"[{utterances} or {2 * utterances}, {beams}]", got, "give each decoded row its lengths")
    capacity = state.tokens.shape[1] if state.tokens.dim() == 3 else 0
    sizes = {"U": utterances, "R": rows, "K": beams, "T": capacity}
    precise, device = torch.promote_types(logits.dtype, torch.float32), logits.device
    for name in state._fields[PARAMETERS:]:
        tensor, (dtype, letters) = getattr(state, name), _BUFFERS[name]
        shape = tuple(sizes[letter] for letter in letters)
        if tensor.shape != shape:
            wanted = f"[{', '.join(_NAMES[letter] for letter in letters)}] = {list(shape)}"
            refuse(op, name, wanted, shape_of(tensor), "see the docstring for the sizes")
        _check_tensor(op, name, tensor, dtype or precise, device)


@takes(BeamState)
def _check_beam_step(logits: Tensor, null_logits: Tensor | None, state: BeamState) -> None:
    """Raises ValueError unless the arguments of `beam_step` fit each other; providers check the ranges of integers."""
    _check_logits("beam_step", logits, {"null_logits": null_logits}, state)
    _check_state("beam_step", logits, state)


@takes(SampleState)
def _check_sample_step(logits: Tensor, null_logits: Tensor | None, filtered: Tensor | None, state: SampleState) -> None:
    """Raises ValueError unless the arguments of `sample_step` fit each other."""
    _check_logits("sample_step", logits, {"null_logits": null_logits, "filtered": filtered}, state)
    _check_state("sample_step", logits, state)


def _schema(logits: str, fields: Sequence[str]) -> str:
    """Returns the schema of an op of such logits and fields: all buffers are written but the seeds."""
    letters = iter(ascii_lowercase)
    read = (*fields[:PARAMETERS], "seeds")
    state = [f"Tensor {name}" if name in read else f"Tensor({next(letters)}!) {name}" for name in fields]
    return f"({logits}, {', '.join(state)}) -> ()"


_beam_step = define(
    "beam_step",
    _schema("Tensor logits, Tensor? null_logits", BeamState._fields),
    check=remembering(_check_beam_step),
    fake=_check_beam_step,
    native=("cpu", "cuda"),
)
_sample_step = define(
    "sample_step",
    _schema("Tensor logits, Tensor? null_logits, Tensor? filtered", SampleState._fields),
    check=remembering(_check_sample_step),
    fake=_check_sample_step,
    native=("cpu", "cuda"),
)

for _op in ("beam_step", "sample_step"):
    register(backends.cpu(_op))
    register(backends.cuda(_op))
    register(backends.reference(_op, reference))
