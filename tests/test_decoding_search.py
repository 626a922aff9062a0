"""The searches: the standard beam search against brute force and a plain second implementation, ties, ends, limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_decoding import (
    assert_same_hypotheses,
    build_memory,
    build_model,
    every_hypothesis,
    hypotheses_of,
    log_probs_of,
    slow_beam_search,
)

from spear_fast.decoding import Decoder, DecodingOptions, decode
from spear_fast.ops.reference.candidates import best_candidates

TINY = dict(num_text_token_ids=2, text_pad_id=-1)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("cond_scale", [1.0, 2.5])
def test_wide_beam_finds_every_hypothesis_in_order(length_penalty: float, early_stopping, cond_scale: float) -> None:
    model = build_model(1, **TINY)
    memory, mask = build_memory(model, 2)
    # 15 sequences that end and 16 that are cut; a narrower beam than 31 could drop some
    how = dict(length_penalty=length_penalty, early_stopping=early_stopping, cond_scale=cond_scale)
    options = DecodingOptions(beam_size=31, max_length=4, num_return_sequences=31, **how)
    result = decode(model.decoder("text"), memory, mask, options)
    for row in range(2):
        log_probs = log_probs_of(model, memory, mask, row, cond_scale=cond_scale)
        every = every_hypothesis(log_probs, 3, 2, max_length=4, length_penalty=length_penalty)
        assert len(every) == 31
        assert_same_hypotheses(hypotheses_of(result, row), every)


def test_beam_wider_than_all_hypotheses() -> None:
    model = build_model(1, **TINY)
    memory, mask = build_memory(model, 1)
    result = decode(
        model.decoder("text"), memory, mask, DecodingOptions(beam_size=40, max_length=4, num_return_sequences=40)
    )
    every = every_hypothesis(log_probs_of(model, memory, mask), 3, 2, max_length=4, length_penalty=1.0)
    assert_same_hypotheses(hypotheses_of(result, 0)[:31], every)
    assert (result.scores[0, 31:] == -torch.inf).all()
    assert not result.finished[0, 31:].any()
    assert (result.tokens[0, 31:] == -1).all()


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
def test_narrow_beam_equals_the_plain_search(beam_size: int, early_stopping, length_penalty: float) -> None:
    model = build_model(beam_size, num_text_token_ids=4, text_pad_id=-1)
    memory, mask = build_memory(model, 3)
    how = dict(beam_size=beam_size, max_length=9, length_penalty=length_penalty, early_stopping=early_stopping)
    result = decode(model.decoder("text"), memory, mask, DecodingOptions(num_return_sequences=beam_size, **how))
    for row in range(3):
        wanted = slow_beam_search(log_probs_of(model, memory, mask, row), 4, **how)
        assert_same_hypotheses(hypotheses_of(result, row), wanted)


MODELS: dict = {}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 5),
    rows=st.integers(1, 4),
    beam_size=st.integers(1, 7),
    max_length=st.integers(1, 8),
    min_length=st.integers(0, 6),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.5]),
    early_stopping=st.sampled_from([True, False, "never"]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    cond_scale=st.sampled_from([1.0, 1.5]),
    ends=st.booleans(),
)
def test_any_search(seed, rows, ends, **options) -> None:
    options["min_length"] = min(options["min_length"], options["max_length"] - 1)
    if (seed, ends) not in MODELS:
        MODELS[seed, ends] = build_model(seed, num_text_token_ids=3, text_pad_id=-1, autoset_text_eos_id=ends)
    model = MODELS[seed, ends]
    memory, mask = build_memory(model, rows, seed=seed)
    result = decode(
        model.decoder("text"), memory, mask, DecodingOptions(num_return_sequences=options["beam_size"], **options)
    )
    temperature, cond_scale = options.pop("temperature"), options.pop("cond_scale")
    for row in range(rows):
        log_probs = log_probs_of(model, memory, mask, row, temperature=temperature, cond_scale=cond_scale)
        wanted = slow_beam_search(log_probs, 3 if ends else None, **options)
        assert_same_hypotheses([h for h in hypotheses_of(result, row) if h.score > -torch.inf], wanted)


def test_early_stopping_modes_differ() -> None:
    """The modes must not be names for one search: on some model each gives another result."""
    found = set()
    for seed in range(12):
        model = build_model(seed, num_text_token_ids=4, text_pad_id=-1)
        memory, mask = build_memory(model, 4, seed=seed)
        best = []
        for how in (True, False, "never"):
            options = DecodingOptions(beam_size=2, max_length=12, early_stopping=how, length_penalty=2.0)
            best.append(decode(model.decoder("text"), memory, mask, options))
        for row in range(4):
            one, two, three = (tuple(result.tokens[row, 0, : result.lengths[row, 0]].tolist()) for result in best)
            found.add((one == two, two == three))
            # the bound of "never" is exact: nothing that was cut off could have won
            assert best[2].scores[row, 0] >= best[1].scores[row, 0] - 1e-6
            assert best[2].scores[row, 0] >= best[0].scores[row, 0] - 1e-6
    assert {(False, True), (True, False)} & found or (False, False) in found


@pytest.mark.parametrize("kind", ["text", "speech"])
@pytest.mark.parametrize("beam_mode", ["standard", "reference"])
def test_beam_of_one_is_greedy(kind: str, beam_mode: str) -> None:
    model = build_model(2)
    memory, mask = build_memory(model, 4)
    greedy = decode(model.decoder(kind), memory, mask, DecodingOptions(method="greedy", max_length=15))
    beam = decode(model.decoder(kind), memory, mask, DecodingOptions(beam_size=1, beam_mode=beam_mode, max_length=15))
    cold = decode(model.decoder(kind), memory, mask, DecodingOptions(method="sample", temperature=0.0, max_length=15))
    assert greedy.tokens.tolist() == beam.tokens.tolist() == cold.tokens.tolist()
    torch.testing.assert_close(greedy.sum_logprobs, beam.sum_logprobs)


@pytest.mark.parametrize(
    "options", [dict(method="greedy"), dict(beam_size=3), dict(method="sample"), dict(method="speculative")], ids=str
)
def test_min_length_keeps_the_end_away(options: dict) -> None:
    model = build_model(2, num_semantic_token_ids=2, target_early_exit_layer=1)
    memory, mask = build_memory(model, 6)
    free = decode(model.decoder("speech"), memory, mask, DecodingOptions(max_length=12, **options))
    held = decode(model.decoder("speech"), memory, mask, DecodingOptions(max_length=12, min_length=7, **options))
    assert int(free.lengths.min()) < 7
    assert int(held.lengths.min()) >= 7
    assert bool(held.finished.any())


@pytest.mark.parametrize(
    "options", [dict(method="greedy"), dict(beam_size=3), dict(beam_size=3, beam_mode="reference")], ids=str
)
def test_pads_after_the_end(options: dict) -> None:
    model = build_model(8, num_text_token_ids=4, text_pad_id=-7)
    memory, mask = build_memory(model, 8)
    result = decode(model.decoder("text"), memory, mask, DecodingOptions(max_length=20, **options))
    assert result.finished.any()
    for row in range(8):
        tokens, length = result.tokens[row, 0].tolist(), int(result.lengths[row, 0])
        assert 4 not in tokens[:length]
        if result.finished[row, 0]:
            assert tokens[length] == 4
        assert set(tokens[length + int(result.finished[row, 0]) :]) <= {-7}


def test_an_end_that_the_vocabulary_lacks_never_comes() -> None:
    model = build_model(8, autoset_text_eos_id=False)
    memory, mask = build_memory(model, 3)
    for mode in ("standard", "reference"):
        result = decode(
            model.decoder("text"), memory, mask, DecodingOptions(max_length=9, beam_mode=mode, num_return_sequences=4)
        )
        assert result.tokens.shape == (3, 4, 9)
        assert not result.finished.any()
        assert (result.lengths == 9).all()


def test_beam_larger_than_the_vocabulary() -> None:
    model = build_model(8, num_text_token_ids=2, text_pad_id=-1)
    memory, mask = build_memory(model, 3)
    for mode in ("standard", "reference"):
        options = DecodingOptions(max_length=6, beam_size=20, beam_mode=mode, num_return_sequences=5)
        result = decode(model.decoder("text"), memory, mask, options)
        assert result.scores.isfinite().all()
        assert (result.scores.diff(dim=-1) <= 0).all()
        # the reference's hypotheses differ after their ends, which are wiped out
        assert len({tuple(row) for row in result.tokens[0].tolist()}) == (5 if mode == "standard" else 3)


def test_vocabulary_of_the_end_alone() -> None:
    model = build_model(8)
    memory, mask = build_memory(model, 3)
    embedding, start = model.token_emb["text"].weight[:1], model.start_token["text"]
    decoder = Decoder.from_modules(model.target_transformer, embedding, start, eos_id=0, pad_id=-1)
    for options in (dict(), dict(method="greedy"), dict(beam_mode="reference", beam_size=1)):
        result = decode(decoder, memory, mask, DecodingOptions(max_length=6, **options))
        assert result.lengths.flatten().tolist() == [0, 0, 0]
        assert result.finished.all()
        assert result.sum_logprobs.tolist() == [[0.0]] * 3


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1.5, -1.5, -3e38, 2e-40, -2e-40, float("-inf")]), min_size=6, max_size=6),
        min_size=1,
        max_size=3,
    ),
    count=st.integers(1, 9),
)
def test_ties_go_to_the_lowest_index(rows: list, count: int) -> None:
    for dtype in (torch.float32, torch.float64):
        values, index = best_candidates(torch.tensor(rows, dtype=dtype), count)
        for row, value, best in zip(
            torch.tensor(rows, dtype=dtype).tolist(), values.tolist(), index.tolist(), strict=True
        ):
            order = sorted(range(6), key=lambda i: (-row[i], i))[:count]
            assert best[: min(count, 6)] == order
            assert value == [row[i] for i in order] + [float("-inf")] * (count - 6)


def test_equal_logits_take_the_lowest_tokens() -> None:
    model = build_model(0, dtype=torch.float32)
    with torch.no_grad():
        model.token_emb["text"].weight.zero_()
    memory, mask = build_memory(model, 2)
    result = decode(
        model.decoder("text"),
        memory,
        mask,
        DecodingOptions(beam_size=3, max_length=4, num_return_sequences=3, length_penalty=0.0),
    )
    # every token is as likely as any other, so the end, which is the last id, loses to all of them until the limit
    assert result.tokens[0, :, :].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]


@pytest.mark.parametrize(
    "options", [dict(method="greedy"), dict(method="sample"), dict(), dict(beam_mode="reference")], ids=str
)
def test_a_row_of_nan_ends_at_once_and_alone(options: dict) -> None:
    model = build_model(2)
    memory, mask = build_memory(model, 3)
    good = decode(model.decoder("text"), memory, mask, DecodingOptions(max_length=8, **options))
    memory[1] = torch.nan
    bad = decode(model.decoder("text"), memory, mask, DecodingOptions(max_length=8, **options))
    assert not bad.scores[1].isfinite().any()
    assert not bad.finished[1].any()
    alone = decode(model.decoder("text"), memory[1:2], mask[1:2], DecodingOptions(max_length=2000, **options))
    assert alone.tokens.shape[-1] <= 1
    if options.get("method") != "sample":
        assert bad.tokens[[0, 2]].tolist() == good.tokens[[0, 2]].tolist()
