"""Every method is served by one engine: the reference's search and speculative decoding beside beams and draws."""

from __future__ import annotations

import pytest
import torch
from engine_models import assert_same_in_any_company, sources, tiny_model
from plain_decoding import build_memory, build_model
from test_engine import same

from spear_fast import DecodingOptions
from spear_fast.decoding import Engine, EngineConfig, config, decode, scheduler
from spear_fast.decoding.packed import encoder
from spear_fast.decoding.request import StopGroup


@pytest.fixture(scope="module")
def model():
    return tiny_model(target_early_exit_layer=1)


def engine_of(model, **sizes) -> Engine:
    decoder = model.decoder("speech")
    guided = sizes.pop("guided", False)
    made = EngineConfig.for_decoder(decoder, max_source=30, guided=guided, **sizes)
    return Engine(model.encoder("text"), decoder, made, guided=guided)


def alone(model, source, options):
    with torch.no_grad():
        memory = model.source_transformer(model.token_emb["text"](source)[None])
        return decode(model.decoder("speech"), memory, torch.ones(1, len(source), dtype=torch.bool), options)


def options_of(i: int, guided: bool = False) -> DecodingOptions:
    length = 3 + i % 10
    common = dict(max_length=length, cond_scale=1.0 + i % 3 if guided else 1.0)
    seeded = {"generator": torch.Generator().manual_seed(i)}
    kinds = (
        dict(method="speculative", temperature=0.0, gamma=1 + i % 4),
        dict(beam_size=1 + i % 4, beam_mode="reference", num_return_sequences=1),
        dict(beam_size=3, num_return_sequences=2),
        dict(method="speculative", gamma=3, **seeded),
        dict(method="sample", top_k=5, num_return_sequences=2, **seeded),
        dict(beam_size=4, beam_mode="reference", num_return_sequences=3, return_alignment=i % 2 == 0),
        dict(method="speculative", gamma=2, top_k=4, min_length=2, return_alignment=True, **seeded),
        dict(method="speculative", gamma=3, drafter="ngram", **seeded),
    )
    return DecodingOptions(**common, **kinds[i % len(kinds)])


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
def test_all_methods_share_an_engine_and_each_is_as_alone(model, guided):
    rows = sources(42, seed=41)
    expected = [alone(model, row, options_of(i, guided)) for i, row in enumerate(rows)]
    with engine_of(model, slots=5, beams=4, max_length=12, guided=guided) as engine:
        asked = ((row, options_of(i, guided)) for i, row in enumerate(rows))
        served = {request.number: request.result() for request in engine.run(asked)}
    assert sorted(served) == list(range(42))
    for number, result in served.items():
        same(result, expected[number])


def test_drafts_near_the_limit_of_the_buffers_stay_within_them(model):
    """A request of the engine's full length, beside one that has come to its end and one that drafts far ahead."""
    rows = sources(3, seed=42)
    full = dict(max_length=12, min_length=11)
    asked = [
        DecodingOptions(method="speculative", temperature=0.0, gamma=40, **full),
        DecodingOptions(method="greedy", **full),
        DecodingOptions(beam_size=4, **full),
    ]
    expected = [alone(model, row, options) for row, options in zip(rows, asked, strict=True)]
    with engine_of(model, slots=3, beams=4, max_length=12) as engine:
        requests = [engine.submit(row, options) for row, options in zip(rows, asked, strict=True)]
        for request, wanted in zip(requests, expected, strict=True):
            same(request.result(), wanted)
    greedy = alone(model, rows[0], DecodingOptions(method="greedy", **full))
    assert greedy.tokens.tolist() == expected[0].tokens.tolist()


def test_speculative_draws_are_the_same_whatever_is_decoded_beside_them(model):
    rows = sources(12, seed=43)

    def options(i):
        generator = torch.Generator().manual_seed(i)
        return DecodingOptions(method="speculative", gamma=1 + i % 3, max_length=12, generator=generator)

    with engine_of(model, slots=4, beams=2, max_length=12) as engine:
        served = {each.number: each.result() for each in engine.run((row, options(i)) for i, row in enumerate(rows))}
    tokens = {number: result.tokens.tolist() for number, result in served.items()}
    assert tokens == {i: alone(model, row, options(i)).tokens.tolist() for i, row in enumerate(rows)}
    assert len({str(each) for each in tokens.values()}) > 6


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_references_rows_stop_together_with_fewer_slots_than_rows(model, monkeypatch, slots, aligned):
    """Who has made all steps leaves its slot to the next row, and is done once all have."""
    memory, lengths = torch.randn(5, 9, 32), torch.tensor([9, 2, 5, 1, 7])
    mask = torch.arange(9) < lengths[:, None]
    options = DecodingOptions(
        beam_size=2, beam_mode="reference", max_length=6, num_return_sequences=2, return_alignment=aligned
    )
    decoder = model.decoder("speech")
    wanted = decode(decoder, memory, mask, options)
    each = EngineConfig.for_batch(decoder, 1, beams=2, max_length=6, max_source=9).slot_bytes
    monkeypatch.setattr(config, "free_bytes", lambda device: slots * each)
    same(decode(decoder, memory, mask, options), wanted)


def test_a_group_that_lost_a_request_stops_without_it(model):
    rows = sources(3, seed=44)
    options = DecodingOptions(beam_size=2, beam_mode="reference", max_length=12)
    group = StopGroup(4)
    with engine_of(model, slots=1, beams=2, max_length=12) as engine:
        good = [engine.submit(row, options, stop_group=group) for row in rows]
        refused = engine.submit(torch.tensor([10**6]), options, stop_group=group)
        assert isinstance(refused.exception(), ValueError)
        assert good[1].cancel()
        for request in (good[0], good[2]):
            assert request.result(timeout=60).tokens.numel()


def test_the_reference_of_a_batch_differs_from_its_rows_alone():
    """Or the group would be for nothing: the search of a batch goes on until its last row has ended."""
    model = build_model(3, num_text_token_ids=4, text_pad_id=-1)
    memory, mask = build_memory(model, 6, seed=3)
    options = DecodingOptions(beam_size=3, beam_mode="reference", max_length=60)
    decoder = model.decoder("text")
    together = decode(decoder, memory, mask, options)
    single = [decode(decoder, memory[i : i + 1], mask[i : i + 1], options) for i in range(6)]
    assert together.finished.all()
    assert sum(float(one.scores[0, 0]) != float(together.scores[i, 0]) for i, one in enumerate(single)) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_that_are_filled_up_are_the_same_in_any_company(monkeypatch, dtype):
    """As a GPU encodes where results are batch-invariant."""
    monkeypatch.setattr(scheduler, "fills_groups", lambda device: True)
    calls, encoded = [], encoder.Encoder.__call__

    def counted(self, ids, lengths):
        calls.append(len(ids))
        return encoded(self, ids, lengths)

    monkeypatch.setattr(encoder.Encoder, "__call__", counted)
    options = DecodingOptions(beam_size=3, max_length=8)
    assert_same_in_any_company(
        tiny_model().to(dtype), lambda i: options, requests=20, slots=6, by_itself=range(0, 20, 3), encode_tokens=64
    )
    assert set(calls) == {64}
    # the same sources one by one would be one call each, of 20, 20 and 7
    assert len(calls) < 2 * 10 + 7


@pytest.mark.parametrize("multiple", [1, 7, 64, 300])
def test_filling_a_group_changes_no_memory(multiple):
    packed = tiny_model().double().encoder("text")
    rows = sources(9, seed=3)
    with torch.inference_mode():
        found = packed.encoded(rows, multiple=multiple)
        for row, memory in zip(rows, found, strict=True):
            (expected,) = packed.encoded([row])
            torch.testing.assert_close(memory, expected, rtol=1e-12, atol=1e-12)
