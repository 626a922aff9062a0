"""Tokens as they are final: a prefix of the result at every moment, as long as it can be, whoever reads them."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from engine_models import sources, tiny_model
from test_engine_methods import engine_of, options_of

from spear_fast import DecodingOptions
from spear_fast.decoding.streaming import ROW_FIELDS as ROW
from spear_fast.decoding.streaming import TokenStream, final_tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model(target_early_exit_layer=1)


def streamed(request) -> list[int]:
    return request.stream.after(0)[0]


def best(request) -> list[int]:
    result = request.result()
    return result.tokens[0, 0, : int(result.lengths[0, 0])].tolist()


def shared(history, row, beams: int) -> list[int]:
    """Returns what all hypotheses share that can still win, each traced back wholly."""
    ends = [(beam, int(row["lengths"][beam])) for beam in range(beams) if row["scores"][beam] > -np.inf]
    for rank in range(beams):
        if row["pool_scores"][rank] > -np.inf:
            ends.append((int(row["pool_beams"][rank]), int(row["pool_ends"][rank])))
    paths = []
    for beam, length in ends:
        path = []
        for step in reversed(range(length)):
            path.append((beam, int(history["tokens"][step, beam])))
            beam = int(history["parents"][step, beam])
        paths.append(path[::-1])
    common = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*paths, strict=False))
    return [column[0][1] for column in common]


def shared_in(engine, request) -> list[int] | None:
    """Returns `shared` of a request's slot; None where it has none or is done."""
    runner = engine._scheduler.runner
    if runner is None:
        return None
    slots = [i for i, slot in enumerate(runner.occupied) if slot is not None and slot.request is request]
    if not slots or runner.state.done[slots[0]]:
        return None
    fields = {name: getattr(runner.state, name)[slots[0]].numpy() for name in ("tokens", "parents", *ROW, "lengths")}
    return shared(fields, fields, request.options.beam_size)


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
def test_at_every_step_a_stream_is_a_prefix_of_the_result(model, guided):
    rows = sources(28, seed=5)
    with engine_of(model, slots=5, beams=4, max_length=12, guided=guided) as engine:
        requests = [engine.submit(row, options_of(i, guided), stream=True) for i, row in enumerate(rows)]
        seen = {request.number: [[]] for request in requests}
        while engine.waiting or engine.in_flight:
            engine.step()
            for request in requests:
                seen[request.number].append(streamed(request))
    for request in requests:
        wanted = best(request)
        assert streamed(request) == wanted
        assert all(wanted[: len(tokens)] == tokens for tokens in seen[request.number])
        assert list(request) == wanted, "whoever reads later reads the same"


def test_one_hypothesis_is_streamed_step_by_step(model):
    options = [DecodingOptions(method="greedy", max_length=9, min_length=8), DecodingOptions(method="sample")]
    with engine_of(model, slots=2, beams=2, max_length=9) as engine:
        greedy = engine.submit(sources(1)[0], options[0], stream=True)
        lengths = []
        while not greedy.done():
            engine.step()
            lengths.append(len(streamed(greedy)))
        assert lengths == list(range(1, len(lengths) + 1)), "a token after each step"
        assert len(lengths) >= 8


def test_a_search_streams_what_all_its_hypotheses_share_as_soon_as_they_do(model):
    rows, early = sources(60, seed=8), 0
    with engine_of(model, slots=6, beams=4, max_length=24) as engine:
        sizes = [dict(beam_size=2 + i % 3, max_length=24, length_penalty=i % 2, patience=1 + i % 3) for i in range(60)]
        requests = [
            engine.submit(row, DecodingOptions(**each), stream=True) for row, each in zip(rows, sizes, strict=True)
        ]
        while engine.waiting or engine.in_flight:
            engine.step()
            for request in requests:
                wanted = shared_in(engine, request)
                if wanted is not None:
                    assert streamed(request) == wanted
                    early += len(wanted)
        assert all(streamed(request) == best(request) for request in requests)
    assert early > 0, "some of it came before the end, or nothing was tested"


def test_what_a_search_shares_is_found_among_any_hypotheses():
    """Histories in which few beams go on, so that they share much, and pools with short hypotheses."""
    generator, lengths = np.random.default_rng(0), []
    for _ in range(400):
        beams, made = int(generator.integers(1, 5)), int(generator.integers(1, 12))
        parents = generator.integers(0, int(generator.integers(1, beams + 1)), (made, beams))
        history = {"tokens": generator.integers(0, 9, (made, beams)), "parents": parents}
        alive = generator.random(beams) < 0.8
        # an end lies where its beam was once in use
        pool_ends = generator.integers(0, made + 1, beams)
        row = {
            "scores": np.where(alive | (np.arange(beams) == 0), -1.0, -np.inf),
            "lengths": np.full(beams, made),
            "pool_scores": np.where(generator.random(beams) < 0.3, -1.0, -np.inf),
            "pool_beams": generator.integers(0, beams, beams),
            "pool_ends": pool_ends,
        }
        wanted = shared(history, row, beams)
        sent = int(generator.integers(0, len(wanted) + 1))
        since = {name: each[sent:] for name, each in history.items()}
        options = DecodingOptions(beam_size=beams, max_length=20)
        assert final_tokens(since, row, options, sent) == wanted[sent:]
        lengths.append(len(wanted))
    assert lengths.count(0) > 20
    assert sum(length > 2 for length in lengths) > 100


def test_iterating_makes_the_steps_or_waits_for_the_thread_that_does(model):
    row = sources(1, seed=3)[0]
    for threaded in (False, True):
        with engine_of(model, slots=2, beams=4, max_length=12) as engine:
            request = engine.submit(row, DecodingOptions(method="greedy", max_length=12, min_length=11), stream=True)
            if threaded:
                engine.start()
            found = []
            for token in request:
                found.append(token)
                assert threaded or not request.done() or len(found) >= 11
            assert found == best(request)


def test_coroutines_read_side_by_side_and_whoever_leaves_stops_nobody(model):
    rows = sources(8, seed=4)

    async def read(engine, row, most: int):
        request, found = engine.submit(row, DecodingOptions(method="greedy", max_length=12), stream=True), []
        async for token in request:
            found.append(token)
            if len(found) == most:
                break
        return request, found

    async def everyone(engine):
        return await asyncio.gather(*(read(engine, row, 100 if i % 2 else 1) for i, row in enumerate(rows)))

    with engine_of(model, slots=3, beams=1, max_length=12) as engine:
        for i, (request, found) in enumerate(asyncio.run(everyone(engine))):
            wanted = best(request)
            assert found == (wanted if i % 2 else wanted[:1])


def test_iterating_raises_what_the_request_fails_of(model):
    def refuse(logits):
        raise ArithmeticError("no")

    with engine_of(model, slots=2, beams=4, max_length=12) as engine:
        row = sources(1)[0]
        failing = engine.submit(row, DecodingOptions(method="greedy", max_length=5, filter_logits=refuse), stream=True)
        with pytest.raises(ArithmeticError, match="no"):
            list(failing)
        refused = engine.submit(torch.tensor([1000]), stream=True)
        with pytest.raises(ValueError, match="ids must lie"):
            list(refused)
        cancelled = engine.submit(row, DecodingOptions(max_length=12), stream=True)
        cancelled.cancel()
        with pytest.raises(CancelledError):
            list(cancelled)
        with pytest.raises(TypeError, match="stream=True"):
            list(engine.submit(row, DecodingOptions(max_length=12)))
        closed = engine.submit(row, DecodingOptions(max_length=12), stream=True)
    with pytest.raises(CancelledError):
        list(closed)


def test_tokens_come_once_where_memory_runs_out_in_between(model, monkeypatch):
    from spear_fast.decoding import runner

    steps, real = [], runner.Runner._step

    def failing(self, view, mix):
        steps.append(len(self.taken))
        if len(steps) == 4:
            raise torch.OutOfMemoryError("no memory")
        real(self, view, mix)

    options = DecodingOptions(method="greedy", max_length=12, min_length=11)
    with engine_of(model, slots=4, beams=1, max_length=12) as engine:
        requests = [engine.submit(row, options) for row in sources(4, seed=6)]
        wanted = [best(request) for request in requests]
    monkeypatch.setattr(runner.Runner, "_step", failing)
    with engine_of(model, slots=4, beams=1, max_length=12) as engine:
        requests = [engine.submit(row, options, stream=True) for row in sources(4, seed=6)]
        assert [list(request) for request in requests] == wanted
        assert engine.config.slots == 2


def test_a_stream_takes_no_other_tokens_than_it_has():
    stream = TokenStream()
    stream.put(0, [4, 5, 6])
    stream.put(1, [5, 6, 7])
    assert stream.after(0) == ([4, 5, 6, 7], False)
    with pytest.raises(RuntimeError, match="began again"):
        stream.put(0, [4, 9])
    assert stream.after(2) == ([6, 7], False)
    stream.end()
    assert stream.after(4) == ([], True)
