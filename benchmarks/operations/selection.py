"""Cases of the ops that choose a step's tokens: little data and little arithmetic, so launches are what others pay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.operations.case import MODELS, Model, OpCase, Prepared
from benchmarks.operations.decode import BATCHES, GENERATED

EOS = 1
LENGTH_PENALTY = 1.0
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9


def cases() -> Iterator[OpCase]:
    for make in (beam_step, sample_step):
        yield make("tiny", MODELS["tiny"], 2, 3, 6, sets=("tiny",))
        for batch, beams in BATCHES:
            on_cpu = batch <= 32
            sets = ("cpu", "gpu") if on_cpu else ("gpu",)
            yield make(f"v512 {batch}x{beams}", MODELS["512x6"], batch, beams, GENERATED[250], sets=sets)


def _capacity(generated: int) -> int:
    return 2 * generated


def _state(model: Model, batch: int, beams: int, generated: int, device: torch.device) -> dict[str, Tensor]:
    """Returns the buffers in the middle of a search: half of the history common, hypotheses of different scores."""
    torch.manual_seed(0)
    pair, capacity, trunk = (batch, beams), _capacity(generated), generated // 2
    ancestors = torch.arange(beams)[:, None].expand(batch, beams, capacity).clone()
    ancestors[:, :, :trunk] = torch.randint(beams, (batch, 1, trunk))
    history = batch, capacity, beams
    # ended hypotheses that are so bad that a better one replaces them
    pool = -30.0 - torch.arange(beams, dtype=torch.float32).expand(pair)
    state = {
        "logits": torch.randn(batch, beams, model.vocabulary),
        "inputs": torch.randint(model.vocabulary, pair),
        "scores": -torch.rand(pair).cumsum(1) - generated,
        "lengths": torch.full(pair, generated),
        "ancestors": ancestors.to(torch.uint8),
        "tokens": torch.randint(model.vocabulary, history, dtype=torch.int32),
        "parents": torch.randint(beams, history, dtype=torch.uint8),
        "logprobs": -torch.rand(history),
        "pool_scores": pool.contiguous(),
        "pool_beams": torch.zeros(pair, dtype=torch.int64),
        "pool_ends": torch.zeros(pair, dtype=torch.int64),
        "pool_finished": torch.zeros(pair, dtype=torch.bool),
        "pool_last_logprobs": torch.zeros(pair),
        "ended": torch.ones(batch, dtype=torch.int64),
        "finished": torch.zeros(pair, dtype=torch.bool),
        "done": torch.zeros(batch, dtype=torch.bool),
        "seeds": torch.arange(batch),
    }
    return {name: tensor.to(device) for name, tensor in state.items()}


def _settings(batch: int, beams: int, capacity: int, device: torch.device, **changed: float) -> tuple[Tensor, ...]:
    """Returns float params, int params and an empty prefix, the same for each utterance."""
    from spear_fast.ops.selection_params import EarlyStopping, FloatParam, IntParam, SelectionMethod

    values = {
        "TEMPERATURE": 1.0, "GUIDANCE": 1.0, "LENGTH_PENALTY": LENGTH_PENALTY, "REPETITION_PENALTY": 1.0,
        "PATIENCE": 1.0, "TOP_P": 1.0, "METHOD": SelectionMethod.BEAM, "BEAM_SIZE": beams, "MAX_LENGTH": capacity,
        "MIN_LENGTH": 0, "EOS_ID": EOS, "NO_REPEAT_NGRAM_SIZE": 0, "EARLY_STOPPING": EarlyStopping.AT_BOUND,
        "PREFIX_LENGTH": 0, "TOP_K": 0, **changed,
    }  # fmt: skip
    float_params = torch.tensor([[float(values[column.name]) for column in FloatParam]], device=device).repeat(batch, 1)
    int_params = torch.tensor([[int(values[column.name]) for column in IntParam]], dtype=torch.int32, device=device)
    return float_params, int_params.repeat(batch, 1), torch.zeros(batch, 0, dtype=torch.int32, device=device)


def beam_step(name: str, model: Model, batch: int, beams: int, generated: int, *, sets: tuple[str, ...]) -> OpCase:
    vocabulary, capacity = model.vocabulary, _capacity(generated)

    def inputs(dtype: torch.dtype, device: torch.device) -> tuple:
        state = _state(model, batch, beams, generated, device)
        logits = state.pop("logits").to(dtype)
        del state["seeds"], state["finished"]
        return logits, None, *_settings(batch, beams, capacity, device), *state.values()

    def composed(arguments: Sequence[Any]) -> Prepared:
        return Prepared(lambda: torch_beam_step(*arguments), lambda result: [arguments[i] for i in compared])

    # what everybody has to agree on; where the pool is empty the rest of it means nothing
    compared = (5, 6, 7, 9, 10, 12, 18)
    wanted = {"cpu": {"times": 5.0}} if (batch, beams) == (32, 4) else {}
    if (batch, beams) == (128, 5):
        wanted = {"cuda": {"seconds": 15e-6}}
    return OpCase(
        "beam_step",
        name,
        dict(batch=batch, beams=beams, vocabulary=vocabulary, generated=generated),
        inputs,
        # logits, the table of ancestors read and written, and some forty bytes a hypothesis
        bytes=lambda size: float(batch * beams * (size * vocabulary + 2 * (generated + 1) + 40)),
        flops=5.0 * batch * beams * vocabulary,
        baselines={"torch, log_softmax and topk": composed},
        against=("torch, log_softmax and topk",),
        wanted=wanted,
        writes=compared,
        consumed=tuple(range(5, 19)),
        dtype=torch.float32,
        sets=sets,
    )


def torch_beam_step(
    logits: Tensor, _null: None, _float_params: Tensor, _int_params: Tensor, _prefix: Tensor, inputs: Tensor,
    scores: Tensor, lengths: Tensor, ancestors: Tensor, tokens: Tensor, parents: Tensor, logprobs: Tensor,
    pool_scores: Tensor, pool_beams: Tensor, pool_ends: Tensor, pool_finished: Tensor, pool_last_logprobs: Tensor,
    ended: Tensor, done: Tensor,
) -> None:  # fmt: skip
    """A step of plain beam search with a pool of ended hypotheses, as one writes it in torch."""
    batch, beams, vocabulary = logits.shape
    model = logits.log_softmax(-1)
    values, index = (scores[:, :, None] + model).flatten(1).topk(2 * beams)
    slots, chosen = index // vocabulary, index % vocabulary
    steps = model.flatten(1).gather(1, index)
    length = lengths[:, :1] + 1
    scale = length.to(values.dtype) ** LENGTH_PENALTY

    ends = chosen == EOS
    enters = ends.clone()
    enters[:, beams:] = False
    merged = torch.cat((pool_scores, (values / scale).masked_fill(~enters, -torch.inf)), 1)
    best, order = merged.sort(dim=1, descending=True, stable=True)
    for pool, new in (
        (pool_beams, slots),
        (pool_ends, (length - 1).expand_as(slots)),
        (pool_finished, ends),
        (pool_last_logprobs, steps),
    ):
        pool.copy_(torch.cat((pool, new), 1).gather(1, order)[:, :beams])
    pool_scores.copy_(best[:, :beams])
    ended += enters.sum(1)

    goes_on = ends.to(torch.uint8).sort(dim=1, stable=True).indices[:, :beams]
    slots, chosen, steps = slots.gather(1, goes_on), chosen.gather(1, goes_on), steps.gather(1, goes_on)
    scores.copy_(values.gather(1, goes_on))
    position = lengths[:, None]
    for history, new in ((tokens, chosen), (parents, slots), (logprobs, steps)):
        history.scatter_(1, position, new[:, None].to(history.dtype))
    rows = slots + torch.arange(batch, device=slots.device)[:, None] * beams
    ancestors.copy_(ancestors.flatten(0, 1)[rows.flatten()].view_as(ancestors))
    own = torch.arange(beams, device=slots.device, dtype=torch.uint8).expand(batch, beams)
    ancestors.scatter_(2, (lengths + 1)[:, :, None], own[:, :, None])
    inputs.copy_(chosen)
    lengths += 1
    done |= (ended >= beams) & (scores[:, 0] / scale[:, 0] <= pool_scores[:, -1])


def sample_step(name: str, model: Model, batch: int, beams: int, generated: int, *, sets: tuple[str, ...]) -> OpCase:
    vocabulary, capacity = model.vocabulary, _capacity(generated)

    def inputs(dtype: torch.dtype, device: torch.device) -> tuple:
        from spear_fast.ops.selection_params import SelectionMethod

        changed = {"METHOD": SelectionMethod.SAMPLE, "TEMPERATURE": TEMPERATURE, "TOP_K": TOP_K, "TOP_P": TOP_P}
        state = _state(model, batch, beams, generated, device)
        names = (
            "seeds",
            "inputs",
            "scores",
            "lengths",
            "ancestors",
            "tokens",
            "parents",
            "logprobs",
            "finished",
            "done",
        )
        buffers = (state[each] for each in names)
        return state["logits"].to(dtype), None, None, *_settings(batch, beams, capacity, device, **changed), *buffers

    def composed(arguments: Sequence[Any]) -> Prepared:
        # the draws are other ones, so there is nothing to compare
        return Prepared(lambda: torch_sample_step(*arguments), lambda result: [])

    return OpCase(
        "sample_step",
        name,
        dict(batch=batch, beams=beams, vocabulary=vocabulary, generated=generated, top_k=TOP_K),
        inputs,
        bytes=lambda size: float(batch * beams * (size * vocabulary + 40)),
        flops=8.0 * batch * beams * vocabulary,
        baselines={"torch, sort, filter and multinomial": composed},
        against=("torch, sort, filter and multinomial",),
        writes=(7, 8, 9, 11, 13, 14, 15),
        consumed=tuple(range(7, 16)),
        dtype=torch.float32,
        sets=sets,
    )


def torch_sample_step(
    logits: Tensor, _null: None, _filtered: None, _float_params: Tensor, _int_params: Tensor, _prefix: Tensor,
    _seeds: Tensor, inputs: Tensor, scores: Tensor, lengths: Tensor, _ancestors: Tensor, tokens: Tensor,
    _parents: Tensor, logprobs: Tensor, finished: Tensor, done: Tensor,
) -> None:  # fmt: skip
    """A draw for each hypothesis with temperature, top-k and top-p, as one writes it in torch."""
    model = logits.log_softmax(-1)
    likeliest, ids = logits.div(TEMPERATURE).topk(min(TOP_K, logits.shape[-1]))
    weights = likeliest.softmax(-1)
    weights = weights.masked_fill(weights.cumsum(-1) - weights > TOP_P, 0)
    drawn = torch.multinomial(weights.flatten(0, 1), 1).view(*lengths.shape, 1)
    chosen = ids.gather(-1, drawn)[..., 0]
    steps = model.gather(-1, chosen[..., None])[..., 0]
    for history, new in ((tokens, chosen), (logprobs, steps)):
        history.scatter_(1, lengths[:, None], new[:, None].to(history.dtype))
    scores.add_(steps.masked_fill(finished, 0))
    lengths.add_(~finished)
    finished |= chosen == EOS
    inputs.copy_(chosen)
    done.copy_(finished.all(1))
