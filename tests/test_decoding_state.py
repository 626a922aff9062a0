"""Decoding's buffers: cached equals uncached, a batch its rows, and no growth, hole or late look changes a result."""

from __future__ import annotations

import pytest
import torch
from engine_models import requests_of, tiny_model
from plain_decoding import all_logits, build_memory, build_model, hypotheses_of
from torch import Tensor

from spear_fast import ops
from spear_fast.decoding import Decoder, DecodingOptions, DecodingResult, decode, runner, state
from spear_fast.decoding.packed.layout import DecoderLayer
from spear_fast.decoding.runner import Runner
from spear_fast.ops.decode_cross_attention import planned_split

METHODS = {
    "greedy": dict(method="greedy"),
    "standard": dict(beam_size=3, num_return_sequences=3),
    "reference": dict(beam_size=3, beam_mode="reference", num_return_sequences=3),
    "speculative": dict(method="speculative", temperature=0.0, gamma=3),
}


def decoded(model, memory: Tensor, mask: Tensor, kind: str = "speech", **options) -> DecodingResult:
    return decode(model.decoder(kind), memory, mask, DecodingOptions(**{"max_length": 12, **options}))


def assert_close(one: DecodingResult, other: DecodingResult) -> None:
    """Equal tokens and near scores; one may hold fewer columns, of pads."""
    width = max(one.tokens.shape[-1], other.tokens.shape[-1])

    def wide(tokens: Tensor) -> list:
        return torch.nn.functional.pad(tokens, (0, width - tokens.shape[-1]), value=-1).tolist()

    assert wide(one.tokens) == wide(other.tokens)
    for name in ("lengths", "finished"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
    for name in ("scores", "sum_logprobs"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_equals_uncached(method: str, cond_scale: float, kv_heads: int) -> None:
    model = build_model(kv_heads, target_kv_heads=kv_heads, target_depth=3, target_early_exit_layer=2)
    memory, mask = build_memory(model, 3)
    result = decoded(model, memory, mask, cond_scale=cond_scale, **METHODS[method])
    assert len(set(result.tokens.flatten().tolist())) > 3
    for i in range(result.tokens.shape[1]):
        tokens = result.tokens[:, i].clamp(min=0)
        logits = all_logits(model, memory, mask, tokens, kind="speech", cond_scale=cond_scale)[:, :-1]
        log_probs = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        inside = torch.arange(tokens.shape[1]) < (result.lengths + result.finished)[:, i, None]
        torch.testing.assert_close(result.token_logprobs[:, i], (log_probs * inside).float(), rtol=1e-5, atol=1e-5)
        if method in ("greedy", "speculative"):
            assert torch.equal(logits.argmax(dim=-1)[inside], tokens[inside])


@pytest.mark.parametrize("method", METHODS)
def test_cached_equals_uncached_of_the_reference_modules(method: str) -> None:
    from reference import build_reference

    theirs = build_reference(5, dtype=torch.float64, target_kv_heads=2, target_early_exit_layer=1)
    ours = build_model(5, target_early_exit_layer=1)
    ours.load_state_dict(theirs.state_dict())
    memory, mask = build_memory(ours, 3)
    decoder = Decoder.from_modules(
        theirs.target_transformer,
        theirs.token_emb["speech"].weight,
        theirs.start_token["speech"],
        eos_id=17,
        pad_id=-1,
        early_exit=(1, theirs.to_early_exit_semantic_logits),
    )
    options = DecodingOptions(max_length=9, **METHODS[method])
    assert_close(decode(decoder, memory, mask, options), decoded(ours, memory, mask, max_length=9, **METHODS[method]))


@pytest.mark.parametrize("method", ["greedy", "standard", "speculative"])
@pytest.mark.parametrize("cond_scale", [1.0, 1.5])
def test_batch_equals_one_by_one(method: str, cond_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # the reference's search stops for the whole batch at once, so that its rows do depend on each other
    left = []
    collect = Runner.collect_finished

    def collected(self: Runner) -> list:
        before, found = self.used, collect(self)
        assert self.used == before - len(found)
        if found and self.used:
            left.append(len(found))
        return found

    monkeypatch.setattr(Runner, "collect_finished", collected)
    model = build_model(2, target_early_exit_layer=1, num_semantic_token_ids=4)
    memory, mask = build_memory(model, 7)
    options = dict(cond_scale=cond_scale, max_length=25, **METHODS[method])
    together = decoded(model, memory, mask, **options)
    assert left, "no utterance left the batch before the others"
    assert together.finished.any()
    assert len(set(together.lengths[:, 0].tolist())) > 2
    for row in range(7):
        inside = mask[row : row + 1, : mask[row].sum()]
        alone = decoded(model, memory[row : row + 1, : inside.shape[1]], inside, **options)
        assert_close(alone, together.take(torch.tensor([row])))


@pytest.mark.parametrize("method", METHODS)
def test_growth_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(3, target_early_exit_layer=1, autoset_semantic_eos_id=False)
    memory, mask = build_memory(model, 2)
    options = dict(max_length=30, cond_scale=1.5, **METHODS[method])
    wide = decoded(model, memory, mask, **options)
    monkeypatch.setattr(state, "FIRST_CAPACITY", 3)
    assert_close(decoded(model, memory, mask, **options), wide)
    assert wide.lengths.tolist() == torch.full_like(wide.lengths, 30).tolist()


def test_long_limit_allocates_little() -> None:
    model = build_model(3)
    memory, _ = build_memory(model, 2)
    decoder, options = model.decoder("speech"), DecodingOptions(max_length=100_000)
    made = Runner(decoder, slots=2, beams=4, positions=100_000, max_source=memory.shape[1])
    made.admit(requests_of(list(memory), [options] * 2))
    made.step()
    assert made.state.keys[0].shape == (8, 2, state.FIRST_CAPACITY, 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("late", [3, 7, 1000])
def test_looking_late_changes_nothing(method: str, late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(2, target_early_exit_layer=1, num_semantic_token_ids=4)
    memory, mask = build_memory(model, 4)
    options = dict(max_length=40, **METHODS[method])
    at_once = decoded(model, memory, mask, **options)
    assert at_once.tokens.shape[-1] < 40
    monkeypatch.setattr(runner, "interval", lambda device, made: late)
    assert_close(decoded(model, memory, mask, **options), at_once)


@pytest.mark.parametrize("method", METHODS)
def test_holes_close_up(method: str) -> None:
    model = build_model(4, target_early_exit_layer=1)
    memory, _ = build_memory(model, 2, 6)
    mask = torch.tensor([[True, False, True, True, False, False], [False, False, False, False, True, True]])
    holed = decoded(model, memory, mask, **METHODS[method])
    dense = torch.stack((memory[0, [0, 2, 3]], memory[1, [4, 5, 0]]))
    assert_close(decoded(model, dense, torch.tensor([[True] * 3, [True, True, False]]), **METHODS[method]), holed)


@pytest.mark.parametrize("method", METHODS)
def test_row_without_source_is_the_unconditional_branch(method: str) -> None:
    model = build_model(4, target_early_exit_layer=1)
    memory, mask = build_memory(model, 2)
    mask[1] = False
    result = decoded(model, memory, mask, max_length=6, **METHODS[method])
    tokens = result.tokens[1, :1].clamp(min=0)
    logits = all_logits(model, memory[1:], mask[1:], tokens, kind="speech")[:, :-1]
    log_probs = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[0, :, 0]
    count = int(result.lengths[1, 0] + result.finished[1, 0])
    torch.testing.assert_close(result.token_logprobs[1, 0, :count], log_probs[:count].float(), rtol=1e-5, atol=1e-5)
    empty = decoded(model, memory[1:, :0], mask[1:, :0], max_length=6, **METHODS[method])
    unconditional = decoded(model, memory[1:], mask[1:], max_length=6, **METHODS[method])
    assert_close(empty, unconditional)


@pytest.mark.parametrize("method", METHODS)
def test_guidance_of_one_is_none(method: str) -> None:
    model = build_model(6, target_early_exit_layer=1)
    memory, mask = build_memory(model, 3)
    plain = decoded(model, memory, mask, **METHODS[method])
    near = decoded(model, memory, mask, cond_scale=1 + 1e-9, **METHODS[method])
    assert_close(near, plain)
    assert decoded(model, memory, mask, cond_scale=4.0, **METHODS[method]).tokens.tolist() != plain.tokens.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_model_dtypes(method: str, dtype: torch.dtype) -> None:
    exact = build_model(7, target_early_exit_layer=1)
    model = build_model(7, target_early_exit_layer=1, dtype=dtype)
    memory, mask = build_memory(exact, 3)
    result = decoded(model, memory.to(dtype), mask, max_length=70, **METHODS[method])
    assert result.scores.dtype == result.token_logprobs.dtype == torch.float32
    # the tokens may differ at near ties; their log-probabilities must be those of the exact model
    tokens = result.tokens[:, 0].clamp(min=0)
    logits = all_logits(exact, memory, mask, tokens, kind="speech")[:, :-1]
    log_probs = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0].float()
    inside = torch.arange(tokens.shape[1]) < (result.lengths + result.finished)[:, :1]
    error = (result.token_logprobs[:, 0] - log_probs)[inside].abs()
    size = float(logits.abs().max())
    assert float(error.max()) < 40 * size * torch.finfo(dtype).eps
    for row in range(3):
        hypotheses_of(result, row)


def test_nothing_unwritten_is_read(nan_filled_empty) -> None:
    model = build_model(9, target_early_exit_layer=1)
    memory, mask = build_memory(model, 3)
    memory = memory.masked_fill(~mask[..., None], torch.nan)
    for options in METHODS.values():
        for cond_scale in (1.0, 2.0):
            result = decoded(model, memory, mask, cond_scale=cond_scale, **options)
            assert result.token_logprobs.isfinite().all()


def test_empty_batch() -> None:
    model = build_model()
    memory, mask = build_memory(model, 2)
    result = decoded(model, memory[:0], mask[:0], beam_size=3, num_return_sequences=2)
    assert result.tokens.shape == (0, 2, 0)
    assert result.scores.shape == (0, 2)


def test_results_are_ordinary_tensors() -> None:
    model = build_model()
    memory, mask = build_memory(model, 2)
    result = decoded(model, memory, mask, max_length=3)
    result.tokens[0] = 0
    assert not result.scores.is_inference()


def test_staleness() -> None:
    model = build_model(2, target_early_exit_layer=1)
    decoder = model.decoder("speech")
    assert model.decoder("speech") is decoder
    assert not decoder.is_stale()
    with torch.no_grad():
        model.target_transformer.layers[1][2][4].bias.add_(1)
    assert decoder.is_stale()
    again = model.decoder("speech")
    model.to_early_exit_semantic_logits[2].weight.data = torch.zeros_like(model.to_early_exit_semantic_logits[2].weight)
    assert again.is_stale()
    moved = model.decoder("speech")
    model.float()
    assert moved.is_stale()
    assert model.decoder("speech").dtype == torch.float32


def test_null_output_is_what_the_unconditional_branch_adds() -> None:
    model = build_model(2)
    layer: DecoderLayer = model.decoder("text").layers[1]
    cross = model.target_transformer.layers[1][1]
    x = torch.randn(3, 4, 32, dtype=torch.float64)
    context, mask = torch.randn(3, 5, 32, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(cross(x, context=context, mask=mask), layer.null_output.expand(3, 4, -1))


def test_how_sources_are_split_is_planned_once(monkeypatch):
    """By the engine's slots, whatever is in flight: so the bits of an utterance know of no other."""
    assert [planned_split(slots, 8) for slots in (1, 4, 8, 16, 33, 63, 64, 512)] == [64, 64, 128, 256, 512, 960, 0, 0]
    decoder = tiny_model().decoder("text")
    runner = Runner(decoder, slots=6, beams=3, positions=9, max_source=9)
    counts, splits = [], []
    real = ops.decode_cross_attention

    def noted(query, *others, arrivals, split, **more):
        assert arrivals is runner.state.memory.arrivals
        assert not arrivals.any()
        assert len(arrivals) >= 6 * decoder.heads
        counts.append(len(query))
        splits.append(split)
        return real(query, *others, arrivals=arrivals, split=split, **more)

    monkeypatch.setattr(ops, "decode_cross_attention", noted)
    options = DecodingOptions(beam_size=3, max_length=8)
    with torch.inference_mode(), ops.forced("decode_step=layered"):
        for count in (1, 3):
            runner.admit(requests_of([torch.randn(5, decoder.dim)] * count, [options] * count))
            runner.step()
    assert set(counts) == {1, 4}
    assert set(splits) == {planned_split(6, decoder.heads)}
