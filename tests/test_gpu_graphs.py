"""On a CUDA device: the engine's steps are really captured, and give what steps without a graph give."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from engine_models import engine_of, requests_of, sources, tiny_model
from test_engine import options_of, same

from spear_fast import DecodingOptions
from spear_fast.decoding import runner
from spear_fast.decoding.cuda_graphs import WARM_UPS, CudaCapturer, Graphs
from spear_fast.decoding.runner import Runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model().cuda()


@pytest.fixture
def counted(monkeypatch):
    """Counts what the capturer is asked for; a failing capture is an error here."""
    calls = {"warm_up": 0, "capture": 0, "replay": 0}

    class Counting(CudaCapturer):
        def warm_up(self, step):
            calls["warm_up"] += 1
            super().warm_up(step)

        def capture(self, step):
            replay = super().capture(step)
            calls["capture"] += 1

            def counting():
                calls["replay"] += 1
                replay()

            return counting

    monkeypatch.setattr(runner, "graphs_for", lambda device: Graphs(Counting(device)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield calls


def served(model, asked, **settings):
    with engine_of(model, **settings) as engine:
        return {request.number: request.result() for request in engine.run(asked())}


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
def test_captured_steps_serve_every_request_as_ordinary_ones_do(model, counted, monkeypatch, guided):
    """Beams, draws and greedy requests in 13 slots, coming and going."""
    tokens = sources(60, seed=31)

    def asked():
        return [(source, options_of(i, cond_scale=1.0 + guided * (i % 3))) for i, source in enumerate(tokens)]

    settings = {"slots": 13, "beams": 4, "max_length": 12, "guided": guided}
    found = served(model, asked, **settings)
    assert counted["capture"] >= 1
    assert counted["replay"] > counted["capture"]
    monkeypatch.setattr(runner, "graphs_for", lambda device: None)
    wanted = served(model, asked, **settings)
    for number, result in wanted.items():
        same(found[number], result)


def test_buffers_that_grow_are_captured_anew(model, counted, monkeypatch):
    monkeypatch.setattr(runner, "FIRST_CAPACITY", 16)
    options = DecodingOptions(beam_size=4, max_length=150, min_length=149)
    tokens = sources(5, seed=32)
    settings = {"slots": 5, "beams": 4, "max_length": 150}
    found = served(model, lambda: [(source, options) for source in tokens], **settings)
    assert counted["capture"] == 5
    monkeypatch.setattr(runner, "graphs_for", lambda device: None)
    wanted = served(model, lambda: [(source, options) for source in tokens], **settings)
    for number, result in wanted.items():
        same(found[number], result)


@pytest.fixture
def no_waiting():
    """Within the test's `with no_waiting():` torch raises where the host would wait for the device."""

    @contextlib.contextmanager
    def strict():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return strict


@pytest.mark.parametrize("captured", [True, False], ids=["replayed", "ordinary"])
@pytest.mark.parametrize("method", ["beam", "sample", "greedy"])
def test_neither_a_step_nor_giving_places_away_waits(model, monkeypatch, no_waiting, method, captured):
    if not captured:
        monkeypatch.setattr(runner, "graphs_for", lambda device: None)
    decoder = model.decoder("text")
    made = Runner(decoder, slots=4, beams=4, positions=60, max_source=30)
    options = DecodingOptions(method=method, max_length=59, min_length=58)
    with torch.inference_mode():
        memories = [torch.randn(n, decoder.dim, device="cuda") for n in (3, 30, 1)]
        made.admit(requests_of(memories, [options] * 3, [1, 2, 3]))
        # capture waits, and so does what is planned at first
        for _ in range(WARM_UPS):
            made.step()
        with no_waiting():
            made.step()
            made.drop(lambda request: request.number == 0)
            made.admit(requests_of(memories[:1], [options], [4]))


def test_encoding_does_not_wait(model, no_waiting):
    encoder, tokens = model.encoder("speech"), sources(3, seed=33)
    with torch.inference_mode():
        wanted = encoder.encoded(tokens)
        with no_waiting():
            found = encoder.encoded(tokens)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_played_step_takes_no_memory(model):
    decoder = model.decoder("text")
    made = Runner(decoder, slots=4, beams=4, positions=60, max_source=30)
    options = DecodingOptions(beam_size=4, max_length=59, min_length=58)
    with torch.inference_mode():
        memories = [torch.randn(n, decoder.dim, device="cuda") for n in (3, 30, 1)]
        made.admit(requests_of(memories, [options] * 3, [1, 2, 3]))
        for _ in range(WARM_UPS):
            made.step()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        made.step()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


CANNOT_BE_CAPTURED = """
import warnings
import torch
from engine_models import engine_of, sources, tiny_model
from spear_fast import DecodingOptions
from spear_fast.decoding.cuda_graphs import graphs_for

counter = torch.zeros((), device="cuda")
graphs, stream = graphs_for(counter.device), torch.cuda.current_stream()

def asking():
    counter.add_(1)
    counter.item()

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(10):
        graphs.run("a", asking)
assert ["without CUDA graphs" in str(each.message) for each in caught] == [True]
assert counter.item() == 10
assert torch.cuda.current_stream() == stream
assert torch.ones(1000, device="cuda").sum().item() == 1000
assert graphs_for(counter.device) is None
model, options = tiny_model().cuda(), DecodingOptions(beam_size=2, max_length=30, min_length=29)
with engine_of(model, slots=3, beams=2, max_length=30) as engine:
    for request in engine.run(sources(9), options):
        assert request.result().tokens.numel()
"""


def test_a_step_that_cannot_be_captured_is_made_without_a_graph():
    """In a process of its own, which captures no more: and the device is as usable as before."""
    subprocess.run([sys.executable, "-c", CANNOT_BE_CAPTURED], cwd=Path(__file__).parent, check=True, timeout=200)
