"""Workers: an engine whose slots and threads are shared out gives the same results as one whose are not."""

from __future__ import annotations

import threading

import pytest
import torch
from engine_models import VOCABULARY, ask, engine_of, sources, tiny_model

from spear_fast import DecodingOptions
from spear_fast.decoding import EngineConfig, workers
from spear_fast.decoding.config import workers_for
from spear_fast.decoding.packed.linear import packs
from spear_fast.decoding.runner import Runner
from spear_fast.decoding.workers import WorkerPool
from spear_fast.ops import extension

needs_extension = pytest.mark.skipif(
    not packs(torch.zeros(1)), reason=extension.missing() or "the extension was built without vectors"
)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_each_thread_is_a_worker_where_there_are_rows_for_it():
    assert [workers_for(threads, 32, 4) for threads in (1, 2, 3, 64)] == [1, 2, 1, 1]
    assert [workers_for(64, slots, 4) for slots in (1, 256, 1023, 1024)] == [1, 1, 1, 64]
    assert workers_for(4, 3, 200) == 1


@needs_extension
def test_there_are_slots_for_every_thread_by_default(model):
    before = torch.get_num_threads()
    try:
        for threads, slots in ((1, 32), (2, 32), (4, 64)):
            torch.set_num_threads(threads)
            config = EngineConfig.for_decoder(model.decoder("text"), beams=4)
            assert (config.slots, config.workers) == (slots, threads)
        # rounded up: a row less would leave all threads to one worker
        config = EngineConfig.for_decoder(model.decoder("text"), beams=5)
        assert (config.slots, config.workers) == (52, 4)
    finally:
        torch.set_num_threads(before)


@needs_extension
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_results_are_the_same_to_the_bit(model, count, guided):
    def served(workers):
        asked = [
            (source, DecodingOptions(beam_size=4, max_length=1 + i % 12, cond_scale=2.0 if guided and i % 3 else 1.0))
            if i % 4
            else (source, DecodingOptions(method="sample", max_length=9, generator=torch.Generator().manual_seed(i)))
            for i, source in enumerate(sources(40, seed=3))
        ]
        with engine_of(model, slots=7, beams=4, max_length=12, guided=guided, workers=workers) as engine:
            results = {request.number: request.result() for request in engine.run(asked)}
            if workers > 1:
                assert isinstance(engine._scheduler.runner, WorkerPool)
                assert [part.slots for part in engine._scheduler.runner.parts] == {2: [3, 4], 3: [2, 2, 3]}[count]
            else:
                assert isinstance(engine._scheduler.runner, Runner)
        return results

    alone, shared = served(1), served(count)
    assert sorted(shared) == list(range(40))
    for number, result in shared.items():
        for name in ("tokens", "lengths", "scores", "token_logprobs"):
            assert torch.equal(getattr(result, name), getattr(alone[number], name)), f"{name} of request {number}"


@needs_extension
def test_requests_go_where_the_fewest_are(model):
    with engine_of(model, slots=8, beams=1, max_length=12, workers=2) as engine:
        for source in sources(5):
            engine.submit(source, DecodingOptions(method="greedy", max_length=12, min_length=11))
        engine.step()
        assert sorted(part.used for part in engine._scheduler.runner.parts) == [2, 3]


@needs_extension
def test_each_worker_has_its_share_of_the_threads_and_everybody_else_keeps_theirs(model, monkeypatch):
    before, seen = torch.get_num_threads(), {}
    step = Runner.step

    def stepped(self):
        seen[threading.current_thread().name] = torch.get_num_threads()
        step(self)

    monkeypatch.setattr(Runner, "step", stepped)
    torch.set_num_threads(6)
    try:
        with engine_of(model, slots=4, beams=4, max_length=12, workers=2) as engine:
            for request in [ask(engine, source) for source in sources(6)]:
                request.result()
            assert torch.get_num_threads() == 6
        assert len(seen) == 2
        assert set(seen.values()) == {3}
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [6]
    finally:
        torch.set_num_threads(before)
    assert not any(thread.name.startswith("spear_fast worker") for thread in threading.enumerate())


@needs_extension
def test_functions_of_the_caller_are_called_by_one_thread(model):
    callers = set()

    def filter_logits(logits):
        callers.add(threading.current_thread().name)
        return logits

    with engine_of(model, slots=4, beams=1, max_length=12, workers=2) as engine:
        for source in sources(6):
            engine.submit(source, DecodingOptions(method="sample", max_length=5, filter_logits=filter_logits))
        while engine.waiting or engine.in_flight:
            engine.step()
    assert callers == {threading.current_thread().name}


@needs_extension
def test_an_error_of_one_worker_is_that_of_what_took_part_and_the_engine_goes_on(model, monkeypatch):
    step, broken = workers.Runner.step, []

    def stepped(self):
        if not broken:
            broken.append(self)
            raise RuntimeError("out of order")
        step(self)

    monkeypatch.setattr(Runner, "step", stepped)
    with engine_of(model, slots=4, beams=4, max_length=12, workers=2) as engine:
        first = [ask(engine, source) for source in sources(4)]
        engine.step()
        assert [str(request.exception()) for request in first] == ["out of order"] * 4
        assert ask(engine, torch.arange(5) % VOCABULARY).result().tokens.numel()


def test_workers_are_refused_where_they_would_change_results(model):
    doubled = tiny_model().double()
    with pytest.raises(ValueError, match="workers must be 1 but for float32 models on a CPU"):
        EngineConfig.for_decoder(doubled.decoder("text"), workers=2)
    with pytest.raises(ValueError, match="got 0"):
        EngineConfig.for_decoder(model.decoder("text"), workers=0)
    assert EngineConfig.for_decoder(doubled.decoder("text"), workers=1).workers == 1
