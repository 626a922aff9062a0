"""Nothing hangs and nothing takes others down: failing functions, interrupts, time-outs, no memory, odd sources."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, CancelledError, as_completed, wait

import pytest
import torch
from engine_models import VOCABULARY, alone, ask, engine_of, sources, tiny_model
from test_engine import same

from spear_fast import DecodingOptions
from spear_fast.decoding import Engine, EngineConfig, Request, runner, scheduler, state

LONG = DecodingOptions(method="greedy", max_length=60, min_length=59)
SHORT = DecodingOptions(method="greedy", max_length=4)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def no_memory(*shape, **_):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to ...")


def test_buffers_that_cannot_be_allocated_fail_the_requests_with_what_they_take(model, monkeypatch):
    monkeypatch.setattr(state.torch, "empty", no_memory)
    with engine_of(model, slots=4, beams=1, max_length=4, max_source=10**7) as engine:
        asked = [engine.submit(source, SHORT) for source in sources(3)]
        for request in asked:
            with pytest.raises(MemoryError, match=r"slot takes up to [\d,]+ bytes; lower one of them .*can't allocate"):
                request.result(timeout=30)
        monkeypatch.undo()
        assert engine.submit(sources(1)[0], SHORT).result(timeout=30).tokens.numel()


def test_sizes_that_nobody_could_allocate_fail_the_requests_too(model):
    with engine_of(model, slots=4, beams=1, max_length=4, max_source=10**12) as engine:
        error = engine.submit(sources(1)[0], SHORT).exception(timeout=30)
    assert isinstance(error, MemoryError)
    assert "lower one of them" in str(error)


def test_a_cpu_that_runs_out_of_memory_in_a_step_goes_on_with_half_the_slots(model, monkeypatch):
    step = runner.step

    def failing(decoder, view, mix):
        return no_memory() if view.batch > 1 else step(decoder, view, mix)

    monkeypatch.setattr(runner, "step", failing)
    tokens = sources(3, seed=7)
    with engine_of(model, slots=4, beams=1, max_length=4) as engine:
        asked = [engine.submit(source, SHORT) for source in tokens]
        for source, request in zip(tokens, asked, strict=True):
            same(request.result(), alone(model, source, SHORT))
        assert engine.config.slots == 1


def raises(error):
    def function(logits):
        raise error

    return function


FAILING = {
    "an error": (raises(ValueError("my own fault")), ValueError, "my own fault"),
    "an exit": (raises(SystemExit(3)), RuntimeError, "SystemExit"),
    "nothing": (lambda logits: None, ValueError, r"must return logits \[\d+, 21\], as it was given, got NoneType"),
    "another shape": (lambda logits: logits[:, :3], ValueError, "must return logits"),
}


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("method", ["sample", "beam"])
@pytest.mark.parametrize("what", FAILING)
def test_a_function_of_the_callers_that_fails_ends_its_own_request_alone(model, what, method, threaded):
    function, kind, said = FAILING[what]
    rows = sources(6, seed=31)
    with engine_of(model, slots=4, beams=2, max_length=12) as engine:
        if threaded:
            engine.start()
        others = [engine.submit(source, DecodingOptions(beam_size=2, max_length=12)) for source in rows[:3]]
        own = DecodingOptions(method=method, beam_size=2, max_length=12, filter_logits=function)
        bad = engine.submit(rows[3], own)
        others += [engine.submit(source, DecodingOptions(beam_size=2, max_length=12)) for source in rows[4:]]
        with pytest.raises(kind, match=said):
            bad.result(timeout=60)
        for source, request in zip([*rows[:3], *rows[4:]], others, strict=True):
            same(request.result(timeout=60), alone(model, source, DecodingOptions(beam_size=2, max_length=12)))
        assert engine.submit(rows[0], SHORT).result(timeout=60).tokens.numel()


def test_a_failing_function_of_speculative_decoding_ends_its_own_requests_alone():
    model = tiny_model(target_early_exit_layer=1)
    decoder = model.decoder("speech")
    config = EngineConfig.for_decoder(decoder, slots=3, beams=1, max_length=12, max_source=30)
    good = DecodingOptions(method="speculative", temperature=0.0, max_length=12)
    bad = DecodingOptions(
        method="speculative", temperature=0.0, max_length=12, filter_logits=raises(ValueError("mine"))
    )
    with Engine(model.encoder("text"), decoder, config) as engine:
        one, two = engine.submit(sources(1)[0], good), engine.submit(sources(1)[0], bad)
        with pytest.raises(ValueError, match="mine"):
            two.result()
        assert one.result().tokens.numel()


def test_functions_are_obeyed_in_beam_search_and_change_nobody_else(model):
    forbidden = [2, 3, 5, 7]

    def ban(logits):
        logits = logits.clone()
        logits[:, forbidden] = -torch.inf
        return logits

    rows = sources(8, seed=32)
    plain = DecodingOptions(beam_size=3, max_length=12, num_return_sequences=3)
    banned = DecodingOptions(beam_size=3, max_length=12, num_return_sequences=3, filter_logits=ban)
    assert any(token in forbidden for row in rows for token in alone(model, row, plain).tokens.flatten().tolist())
    with engine_of(model, slots=8, beams=3, max_length=12, guided=True) as engine:
        asked = [engine.submit(row, banned if i % 2 else plain) for i, row in enumerate(rows)]
        for i, (row, request) in enumerate(zip(rows, asked, strict=True)):
            found = request.result()
            if i % 2:
                assert not set(found.tokens.flatten().tolist()) & set(forbidden)
                assert found.scores.isfinite().all()
            else:
                same(found, alone(model, row, plain))


@pytest.mark.parametrize("threaded", [False, True])
def test_a_callback_that_exits_stops_nothing(model, threaded, caplog):
    with engine_of(model, slots=2, beams=1, max_length=12) as engine:
        first = engine.submit(sources(1)[0], SHORT, callback=lambda request: sys.exit(1))
        later = [engine.submit(source, SHORT) for source in sources(4)]
        if threaded:
            engine.start()
        for request in (first, *later):
            assert request.result(timeout=60).tokens.numel()
    assert "a callback of request 0 raised" in caplog.text


def interrupted_once(monkeypatch, module, name, at):
    """Lets the `at`-th call of a function be interrupted after it has done its work, as by Ctrl-C."""
    function, calls = getattr(module, name), []

    def interrupted(*arguments, **keywords):
        found = function(*arguments, **keywords)
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(module, name, interrupted)


@pytest.mark.parametrize(
    ("module", "name", "at"),
    [
        (runner, "step", 2),
        (scheduler.Scheduler, "_encode", 1),
        (scheduler.Scheduler, "step", 3),
        (runner.Runner, "_take", 1),
        (runner.Runner, "admit", 1),
        (runner, "backtrace", 1),
    ],
)
def test_an_interrupt_loses_no_request(model, monkeypatch, module, name, at):
    rows = sources(5, seed=33)
    asked = DecodingOptions(method="sample", max_length=6, generator=torch.Generator().manual_seed(1))
    with engine_of(model, slots=2, beams=1, max_length=12) as engine:
        requests = [engine.submit(row, asked) for row in rows]
        interrupted_once(monkeypatch, module, name, at)
        with pytest.raises(KeyboardInterrupt):
            list(map(Request.result, requests))
        found = [request.result(timeout=60) for request in requests]
        monkeypatch.undo()
        again = DecodingOptions(method="sample", max_length=6, generator=torch.Generator().manual_seed(1))
        for row, result in zip(rows, found, strict=True):
            same(result, alone(model, row, again))


def test_an_interrupt_inside_a_callers_function_reaches_the_caller_once(model):
    with engine_of(model, slots=2, beams=1, max_length=12) as engine:
        stopped = DecodingOptions(method="sample", max_length=12, filter_logits=raises(KeyboardInterrupt()))
        bad, good = engine.submit(sources(1)[0], stopped), engine.submit(sources(1)[0], SHORT)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert good.result(timeout=60).tokens.numel()
        with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
            bad.result(timeout=60)


def test_what_is_interrupted_is_completed_by_close(model, monkeypatch):
    engine = engine_of(model, slots=1, beams=1, max_length=60)
    asked = [engine.submit(source, LONG) for source in sources(3)]
    interrupted_once(monkeypatch, runner, "step", 2)
    with pytest.raises(KeyboardInterrupt):
        asked[0].result()
    engine.close()
    for request in asked:
        with pytest.raises(CancelledError):
            request.result(timeout=5)


def test_the_engines_thread_leaves_nobody_behind_whatever_ends_it(model, monkeypatch):
    def broken(self):
        raise SystemExit("the end")

    with engine_of(model, slots=1, beams=1, max_length=60) as engine:
        monkeypatch.setattr(scheduler.Scheduler, "step", broken)
        asked = [engine.submit(source, LONG) for source in sources(3)]
        engine.start()
        for request in asked:
            with pytest.raises(RuntimeError, match="the engine's thread has ended"):
                request.result(timeout=30)
        with pytest.raises(RuntimeError, match="closed"):
            engine.submit(sources(1)[0], SHORT)


def test_a_source_is_copied_when_it_is_submitted(model):
    row = sources(1, seed=34)[0]
    with torch.no_grad():
        memory = model.source_transformer(model.token_emb["speech"](row)[None])[0]
    buffers = [row.clone(), memory.clone()]
    with engine_of(model, slots=2, beams=1, max_length=12) as engine:
        asked = [engine.submit(buffer, SHORT) for buffer in buffers]
        buffers[0].fill_(VOCABULARY + 7)
        buffers[1].fill_(torch.nan)
        for request in asked:
            same(request.result(), alone(model, row, SHORT))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int32])
def test_ids_of_every_integer_type_are_taken(model, dtype):
    row = sources(1, seed=35)[0]
    with engine_of(model, slots=1, beams=1, max_length=12) as engine:
        same(engine.submit(row.to(dtype), SHORT).result(), alone(model, row, SHORT))


ODD = {
    "meta": torch.zeros(3, dtype=torch.long, device="meta"),
    "sparse": torch.tensor([1, 0, 2]).to_sparse(),
    "too large": torch.tensor([2**63], dtype=torch.uint64),
    "complex": torch.zeros(3, dtype=torch.complex64),
    "a list": [1, 2, 3],
    "half memory": torch.zeros(3, 31, dtype=torch.float16),
    "none": None,
}


@pytest.mark.parametrize("what", ODD)
def test_odd_sources_fail_alone_in_their_requests(model, what):
    with engine_of(model, slots=1, beams=1, max_length=12) as engine:
        bad, good = engine.submit(ODD[what], SHORT), engine.submit(sources(1)[0], SHORT)
        assert isinstance(bad.exception(timeout=5), ValueError)
        assert "\n" not in str(bad.exception())
        assert good.result().tokens.numel()
        assert isinstance(engine.submit(sources(1)[0], "greedy").exception(timeout=5), TypeError)


TOO_LARGE = dict(no_repeat_ngram_size=2**31, max_length=2**31, prefix=(2**31,), gamma=2**31)


@pytest.mark.parametrize("name", [*TOO_LARGE, "top_k"])
def test_options_are_bounded_where_they_are_made(name):
    how = {"method": "sample", "top_k": 2**31} if name == "top_k" else {name: TOO_LARGE[name]}
    with pytest.raises(ValueError, match=f"{name} must be"):
        DecodingOptions(**how)
    largest = {"method": "sample", "top_k": 2**31 - 1} if name == "top_k" else {}
    DecodingOptions(no_repeat_ngram_size=2**31 - 1, **largest)


def test_a_timeout_holds_when_the_caller_makes_the_steps(model):
    with engine_of(model, slots=1, beams=1, max_length=4000) as engine:
        long = engine.submit(sources(1)[0], DecodingOptions(method="greedy", max_length=4000, min_length=3999))
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            long.result(timeout=0.05)
        with pytest.raises(TimeoutError):
            long.exception(timeout=0)
        # a step may take a while here, thousands of them would take longer
        assert time.monotonic() - began < 2
        assert not long.done()
        assert long.cancel()


def test_standard_ways_to_wait_start_the_engine(model):
    def asked(engine):
        return [engine.submit(source, SHORT) for source in sources(3)]

    for how in (
        lambda requests: wait(requests, timeout=60, return_when=FIRST_COMPLETED).done,
        lambda requests: list(as_completed(requests, timeout=60)),
        lambda requests: asyncio.run(asyncio.wait_for(gathered(requests), 60)),
    ):
        with engine_of(model, slots=2, beams=1, max_length=12) as engine:
            assert how(asked(engine))
    called = threading.Event()
    with engine_of(model, slots=2, beams=1, max_length=12) as engine:
        asked(engine)[0].add_done_callback(lambda request: called.set())
        assert called.wait(60)


async def gathered(requests):
    return await asyncio.gather(*(asyncio.wrap_future(request) for request in requests))


@pytest.mark.parametrize("threaded", [False, True])
def test_waiting_for_oneself_raises(model, threaded):
    said = []

    def function(logits):
        for ask_in_vain in (lambda: other.result(), engine.close):
            try:
                ask_in_vain()
            except RuntimeError as error:
                said.append(str(error))
        return logits

    with engine_of(model, slots=2, beams=1, max_length=12) as engine:
        if threaded:
            engine.start()
        other = engine.submit(sources(1)[0], DecodingOptions(method="greedy", max_length=12, min_length=11))
        own = engine.submit(sources(1)[0], DecodingOptions(method="sample", max_length=2, filter_logits=function))
        assert own.result(timeout=60).tokens.numel()
    assert len(said) >= 2
    assert all("wait for itself" in text for text in said)


def test_a_callback_on_the_engines_thread_may_ask_for_another_result(model):
    found = []
    with engine_of(model, slots=1, beams=1, max_length=12).start() as engine:
        others = []
        done = threading.Event()

        def busy(request):
            found.append(others[0].result(timeout=60).tokens.numel())
            done.set()

        with engine._lock:
            first = engine.submit(torch.arange(6), SHORT, callback=busy)
            others.append(engine.submit(torch.arange(2), SHORT))
        assert first.result(timeout=60).tokens.numel()
        assert done.wait(60)
    assert found


def test_run_on_a_started_engine_yields_all_without_polling(model, monkeypatch):
    waits = []
    monkeypatch.setattr(threading.Condition, "wait", watched(threading.Condition.wait, waits))
    with engine_of(model, slots=2, beams=2, max_length=12).start() as engine:
        rows = sources(20, seed=36)
        found = {
            request.number: request.result()
            for request in engine.run(rows, DecodingOptions(beam_size=2, max_length=12))
        }
    assert sorted(found) == list(range(20))
    assert all(timeout is None for timeout in waits)


def watched(function, waits):
    def wait_(self, timeout=None):
        waits.append(timeout)
        return function(self, timeout)

    return wait_


@pytest.mark.parametrize("method", ["beam", "greedy"])
def test_autocast_around_decoding_changes_nothing(model, method):
    row = sources(1, seed=37)[0]
    options = DecodingOptions(method=method, beam_size=2, max_length=12)
    wanted = alone(model, row, options)
    with torch.autocast("cpu", dtype=torch.bfloat16), engine_of(model, slots=1, beams=2, max_length=12) as engine:
        same(engine.submit(row, options).result(), wanted)
        ids = model.generate(row[None], source_type="speech", target_type="text", max_length=6, temperature=0.0)
    assert torch.equal(
        ids, model.generate(row[None], source_type="speech", target_type="text", max_length=6, temperature=0.0)
    )


def test_closing_completes_what_was_never_decoded(model):
    engine = engine_of(model, slots=1, beams=4, max_length=12)
    waiting = [ask(engine, source) for source in sources(3)]
    engine.close()
    assert all(request.cancelled() for request in waiting)
