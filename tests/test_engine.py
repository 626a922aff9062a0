"""The engine serves every request as if it were alone, whatever else is in flight."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import CancelledError

import pytest
import torch
from engine_models import alone, ask, assert_same_in_any_company, engine_of, sources, tiny_model

from spear_fast import DecodingOptions
from spear_fast.decoding.packed import linear
from spear_fast.decoding.runner import Runner


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def options_of(seed, **fixed):
    """Returns options drawn for a request: any that the engine serves."""
    draw = random.Random(seed)
    length = draw.randint(1, 12)
    common = {"max_length": length, "min_length": draw.randint(0, length - 1)}
    common |= {"repetition_penalty": draw.choice([1.0, 1.3]), "no_repeat_ngram_size": draw.choice([0, 0, 2])}
    kind = draw.choice(["beam", "beam", "greedy", "sample"])
    if kind == "beam":
        beams = draw.randint(1, 4)
        common |= {
            "beam_size": beams,
            "num_return_sequences": draw.randint(1, beams),
            "length_penalty": draw.choice([0.0, 1.0, 1.7]),
            "early_stopping": draw.choice([True, False, "never"]),
            "patience": draw.choice([1.0, 1.5]),
        }
    elif kind == "sample":
        # a generator of its own: the draws are the request's, wherever it stands
        common |= {"top_k": draw.choice([None, 3]), "generator": torch.Generator().manual_seed(seed)}
        common |= {"num_return_sequences": draw.randint(1, 4), "temperature": draw.choice([0.7, 1.0])}
    common |= {"coverage_penalty": draw.choice([0.0, 0.0, 0.6]), "return_alignment": draw.random() < 0.3}
    return DecodingOptions(method=kind, **(common | fixed))


def same(ours, theirs):
    torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=0, atol=0)
    torch.testing.assert_close(ours.lengths, theirs.lengths)
    torch.testing.assert_close(ours.finished, theirs.finished)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.sum_logprobs, theirs.sum_logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.token_logprobs, theirs.token_logprobs, rtol=1e-4, atol=1e-4)
    assert (ours.alignment is None) == (theirs.alignment is None)
    if ours.alignment is not None:
        torch.testing.assert_close(ours.alignment, theirs.alignment, rtol=1e-4, atol=1e-4)


def test_every_request_is_served_as_if_it_were_alone(model):
    asked = [(source, options_of(i)) for i, source in enumerate(sources(60, seed=1))]
    expected = [alone(model, source, options_of(i)) for i, (source, _) in enumerate(asked)]
    with engine_of(model, slots=5, beams=4, max_length=12) as engine:
        served = {request.number: request.result() for request in engine.run(asked)}
    assert sorted(served) == list(range(60))
    for number, result in served.items():
        same(result, expected[number])


def test_guided_and_unguided_requests_share_a_batch(model):
    asked = [(source, options_of(i, cond_scale=1.0 + i % 3)) for i, source in enumerate(sources(20, seed=2))]
    expected = [alone(model, source, options_of(i, cond_scale=1.0 + i % 3)) for i, (source, _) in enumerate(asked)]
    with engine_of(model, slots=3, beams=4, max_length=12, guided=True) as engine:
        for request in engine.run(asked):
            same(request.result(), expected[request.number])


@pytest.mark.parametrize(("dtype", "packs"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
def test_deterministic_results_are_the_same_to_the_bit_whatever_is_beside_them(dtype, packs, monkeypatch):
    if not packs:
        # torch's own matmuls, which round by the number of their rows
        monkeypatch.setattr(linear, "packs", lambda weight: False)
    model = tiny_model().to(dtype)
    assert_same_in_any_company(model, options_of, requests=30, slots=6, by_itself=range(30))


def test_the_comparison_sees_bits_that_depend_on_the_company(monkeypatch):
    """Without `deterministic`, torch's own matmuls round by the number of their rows."""
    monkeypatch.setattr(linear, "packs", lambda weight: False)
    with pytest.raises(AssertionError, match="of request"):
        assert_same_in_any_company(
            tiny_model(), options_of, requests=30, slots=6, by_itself=range(30), deterministic=False
        )


def test_a_looping_row_holds_up_nobody(model):
    """One request of 60 tokens beside 30 of one: those are done while it goes on."""
    with engine_of(model, slots=2, beams=1, max_length=60) as engine:
        tokens = sources(31, seed=3)
        looping = engine.submit(tokens[0], DecodingOptions(method="greedy", max_length=60, min_length=59))
        short = [engine.submit(each, DecodingOptions(method="greedy", max_length=1)) for each in tokens[1:]]
        for request in short:
            request.result()
        assert not looping.done()
        assert looping.result().tokens.shape[-1] >= 59


def test_who_comes_takes_the_slot_of_who_left_and_nobody_is_moved(model, monkeypatch):
    moved = []
    move = Runner._move
    monkeypatch.setattr(
        Runner, "_move", lambda self, slot, *slot_ids: moved.append(slot_ids) or move(self, slot, *slot_ids)
    )
    # one after the other ends, from the first slot on; those that take their slots end together
    lengths = [1, 2, 3, 4, 12, 11, 10, 9]
    asked = [
        (source, DecodingOptions(method="greedy", max_length=n, min_length=n - 1))
        for source, n in zip(sorted(sources(8, seed=5), key=len, reverse=True), lengths, strict=True)
    ]
    with engine_of(model, slots=4, beams=1, max_length=12) as engine:
        requests = [engine.submit(*each) for each in asked[:4]]
        for request in requests:
            request.result()
        # nobody waited: the last ones closed up
        assert moved == [(3, 0), (2, 1)]
        moved.clear()
        assert len(list(engine.run(asked))) == 8
    assert not moved


def test_results_come_as_they_are_finished(model):
    lengths = [12, 1, 2, 3]
    asked = [
        (source, DecodingOptions(method="greedy", max_length=n, min_length=n - 1))
        for source, n in zip(sources(4, seed=4), lengths, strict=True)
    ]
    with engine_of(model, slots=4, beams=1, max_length=12) as engine:
        assert [request.number for request in engine.run(asked)] == [1, 2, 3, 0]


WRONG = [
    (torch.zeros(0, dtype=torch.long), {}, "source must have 1 to 30 ids"),
    (torch.zeros(31, dtype=torch.long), {}, "source must have 1 to 30 ids"),
    (torch.zeros(3), {}, "source must be a tensor of integer ids"),
    (torch.tensor([1, 99]), {}, "source ids must lie in 0.."),
    (torch.tensor([-1, 2]), {}, "source ids must lie in 0.."),
    (torch.tensor([1, 2]), {"beam_size": 5}, "up to 4 hypotheses"),
    (torch.tensor([1, 2]), {"max_length": 13}, "max_length may be up to 12"),
    (torch.tensor([1, 2]), {"cond_scale": 2.0}, "guided=True"),
    (torch.tensor([1, 2]), {"method": "speculative"}, "drafts with an early-exit head"),
    (torch.tensor([1, 2]), {"prefix": (1, 99)}, "prefix"),
]


@pytest.mark.parametrize(("source", "settings", "said"), WRONG)
def test_a_request_that_cannot_be_served_fails_alone(model, source, settings, said):
    good = sources(3, seed=5)
    with engine_of(model, slots=2, beams=4, max_length=12, max_source=30) as engine:
        before, after = ask(engine, good[0]), None
        bad = engine.submit(source, DecodingOptions(**({"max_length": 12} | settings)))
        after = ask(engine, good[1])
        with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")) as caught:
            bad.result()
        assert "\n" not in str(caught.value)
        for request, source_ids in ((before, good[0]), (after, good[1])):
            same(request.result(), alone(model, source_ids, DecodingOptions(beam_size=4, max_length=12)))


def test_cancelling_frees_the_slot(model):
    with engine_of(model, slots=1, beams=1, max_length=60) as engine:
        long = engine.submit(sources(1)[0], DecodingOptions(method="greedy", max_length=60, min_length=59))
        waiting = engine.submit(sources(1)[0], DecodingOptions(method="greedy", max_length=2))
        gone = engine.submit(sources(1)[0], DecodingOptions(method="greedy", max_length=2))
        engine.step()
        assert engine.in_flight == 1
        assert gone.cancel()
        assert long.cancel()
        assert not long.cancel()
        assert waiting.result().tokens.numel()
        for request in (long, gone):
            with pytest.raises(CancelledError):
                request.result()
        assert engine.in_flight == engine.waiting == 0


def test_an_exception_in_a_callback_stops_nothing(model, caplog):
    called = []

    def broken(request):
        called.append(request.number)
        raise RuntimeError("broken callback")

    with engine_of(model, slots=2, beams=1, max_length=5) as engine:
        requests = [ask(engine, source, callback=broken, beam_size=1, max_length=5) for source in sources(5)]
        for request in requests:
            assert request.result().tokens.numel()
    assert sorted(called) == list(range(5))
    assert "broken callback" in caplog.text


def test_a_callback_may_ask_submit_cancel_and_close(model):
    engine = engine_of(model, slots=1, beams=1, max_length=6)
    later, others = [], []
    # one slot, and the longest goes first
    lengths = [4, 3, 2, 2, 1]
    ordered = [torch.arange(1, length + 1) for length in lengths]

    def busy(request):
        later.append(ask(engine, ordered[4], beam_size=1, max_length=6))
        assert others[0].result().tokens.numel()
        assert others[1].cancel()
        engine.close()

    first = ask(engine, ordered[0], beam_size=1, max_length=6, callback=busy)
    others += [ask(engine, source, beam_size=1, max_length=6) for source in ordered[1:4]]
    assert first.result().tokens.numel()
    assert not others[0].cancelled()
    assert all(request.cancelled() for request in (*later, *others[1:]))
    assert len(later) == 1


def test_an_error_of_encoding_is_that_of_what_was_encoded(model, monkeypatch):
    """Nobody waits for ever: neither for what an error took along nor for what came after it."""
    from spear_fast.decoding.packed.encoder import Encoder

    encode, calls = Encoder.__call__, []

    def failing(self, ids, lengths):
        calls.append(len(lengths))
        if len(calls) == 1:
            raise RuntimeError("the encoder is gone")
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return encode(self, ids, lengths)

    monkeypatch.setattr(Encoder, "__call__", failing)
    with engine_of(model, slots=4, beams=1, max_length=4) as engine:
        engine._scheduler.encode_tokens = 1
        requests = [ask(engine, source, beam_size=1, max_length=4) for source in sources(6)]
        failed = [request for request in requests if request.exception() is not None]
    assert [str(request.exception()) for request in failed] == ["the encoder is gone"]
    assert engine.config.slots == 2


def test_closing_ends_everything(model):
    engine = engine_of(model, slots=1, beams=1, max_length=40)
    requests = [ask(engine, source, beam_size=1, max_length=40) for source in sources(3)]
    engine.step()
    engine.close()
    engine.close()
    for request in requests:
        with pytest.raises(CancelledError):
            request.result()
    with pytest.raises(RuntimeError, match="closed"):
        ask(engine, sources(1)[0], beam_size=1, max_length=5)


def test_coroutines_wait_for_requests(model):
    async def main(engine):
        requests = [ask(engine, source, beam_size=2, max_length=8) for source in sources(9, seed=6)]
        return await asyncio.gather(*(asyncio.wrap_future(request) for request in requests))

    with engine_of(model, slots=2, beams=2, max_length=8).start() as engine:
        results = asyncio.run(asyncio.wait_for(main(engine), timeout=120))
    for source, result in zip(sources(9, seed=6), results, strict=True):
        same(result, alone(model, source, DecodingOptions(beam_size=2, max_length=8)))


def test_an_error_of_the_step_is_that_of_what_took_part(model, monkeypatch):
    from spear_fast.decoding import runner as module

    engine = engine_of(model, slots=2, beams=1, max_length=5)
    step, calls = module.step, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        return step(*arguments)

    monkeypatch.setattr(module, "step", failing)
    requests = [ask(engine, source, beam_size=1, max_length=5) for source in sources(4)]
    for request in requests:
        request.exception()
    failed = [request for request in requests if request.exception() is not None]
    assert len(failed) == 2
    assert all("the device is gone" in str(request.exception()) for request in failed)
    engine.close()


def test_out_of_memory_halves_the_slots_and_goes_on(model, monkeypatch):
    from spear_fast.decoding import runner as module

    engine = engine_of(model, slots=8, beams=1, max_length=6)
    step = module.step

    def failing(decoder, view, mix):
        if view.batch > 2:
            raise torch.OutOfMemoryError("no memory")
        return step(decoder, view, mix)

    monkeypatch.setattr(module, "step", failing)
    tokens = sources(12, seed=7)
    requests = [ask(engine, source, beam_size=1, max_length=6) for source in tokens]
    for source, request in zip(tokens, requests, strict=True):
        same(request.result(), alone(model, source, DecodingOptions(beam_size=1, max_length=6)))
    assert engine.config.slots == 2
    engine.close()
    assert engine.in_flight == 0


def test_a_config_says_what_it_takes_and_refuses_what_it_cannot(model):
    from spear_fast.decoding.config import EngineConfig

    decoder = model.decoder("text")
    config = EngineConfig.for_decoder(decoder, slots=3, beams=4, max_length=12, max_source=30)
    state = Runner(decoder, slots=3, beams=4, positions=13, max_source=30).state
    buffers = [*state.keys, *state.values, *state.memory.keys, *state.memory.values]
    buffers += [state.ancestors, state.tokens, state.parents, state.logprobs, state.prefix]
    assert config.bytes == sum(buffer.nbytes for buffer in buffers)
    each = config.slot_bytes
    assert EngineConfig.for_decoder(decoder, beams=4, max_length=12, max_source=30, memory_budget=2 * each).slots == 2
    for wanted, budget in ((None, each - 1), (3, 3 * each - 1)):
        with pytest.raises(ValueError, match="the memory budget is"):
            EngineConfig.for_decoder(decoder, slots=wanted, beams=4, max_length=12, max_source=30, memory_budget=budget)
