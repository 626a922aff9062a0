"""Captured steps: what is captured when, over which memory, and that nobody gets other tokens from them.

A stand-in for CUDA graphs keeps what was captured as what graphs keep: addresses and sizes, not the objects that a step
finds them by. `test_gpu_graphs.py` has the real ones.
"""

from __future__ import annotations

import contextlib
import gc
import warnings

import pytest
import test_engine_interleavings as interleavings
import torch
import torch.nn.functional as F
from engine_models import alone, engine_of, requests_of, sources, tiny_model
from test_engine import options_of, same
from torch.multiprocessing.reductions import StorageWeakRef

from spear_fast import DecodingOptions
from spear_fast.decoding import config, cuda_graphs, runner, state
from spear_fast.decoding.cuda_graphs import WARM_UPS, Graphs, graphs_for, rounded_slots
from spear_fast.decoding.runner import Runner


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    """A capture that failed in one test switches off no other."""
    monkeypatch.setattr(cuda_graphs._Switch, "failed_of", None)


class StandIn:
    """Captures calls of a CPU. calls: "warm", "capture", "replay", "forget" in their order."""

    def __init__(self, fails: str | None = None):
        self.calls: list[str] = []
        self.fails = fails
        self.generation = 0

    def warm_up(self, step):
        self.calls.append("warm")
        step()

    def capture(self, step):
        self.calls.append("capture")
        if self.fails:
            raise RuntimeError(self.fails)
        generation = self.generation

        def replay():
            assert generation == self.generation, "a graph is replayed whose memory is gone"
            self.calls.append("replay")
            step()

        return replay

    def forget(self):
        self.calls.append("forget")
        self.generation += 1


@pytest.fixture
def capturers(monkeypatch):
    """Within the test steps are captured the second time; the stand-ins that did it, one for each `Runner`."""
    made = []
    monkeypatch.setattr(cuda_graphs, "WARM_UPS", 1)

    def stand_in(device):
        made.append(StandIn())
        return Graphs(made[-1])

    monkeypatch.setattr(runner, "graphs_for", stand_in)
    return made


def test_a_step_is_recorded_once_it_is_warm_and_then_played():
    capturer, made = StandIn(), []
    captured = Graphs(capturer)
    for i in range(WARM_UPS + 3):
        captured.run("a", lambda i=i: made.append(i))
    assert capturer.calls == ["warm"] * WARM_UPS + ["capture", *["replay"] * 3]
    # what was captured, not what was passed later
    assert made == [*range(WARM_UPS + 1), WARM_UPS, WARM_UPS]
    captured.run("b", lambda: made.append("b"))
    assert capturer.calls[-1] == "warm"
    captured.drop()
    captured.run("a", lambda: made.append("anew"))
    assert capturer.calls[-2:] == ["forget", "warm"]


def test_a_failing_capture_is_told_once_and_every_step_is_made_once():
    capturer, made = StandIn(fails="operation not permitted when stream is capturing\nmore"), []
    captured = Graphs(capturer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(3 * WARM_UPS):
            captured.run(i % 2, lambda i=i: made.append(i))
    assert made == list(range(3 * WARM_UPS))
    assert capturer.calls.count("capture") == 1
    assert [str(each.message) for each in caught] == [
        "decoding goes on without CUDA graphs, which is slower: the step cannot be captured (operation not permitted "
        "when stream is capturing); SPEAR_FAST_GRAPHS=0 does not try to."
    ]


def test_an_error_of_the_step_itself_is_not_swallowed():
    def broken():
        raise torch.OutOfMemoryError("no memory")

    captured = Graphs(StandIn())
    with pytest.raises(torch.OutOfMemoryError):
        captured.run("a", broken)


def test_places_are_rounded_up_to_few_numbers():
    assert sorted({rounded_slots(used, 128) for used in range(1, 129)}) == [
        *range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128,
    ]  # fmt: skip
    for count in range(1, 70):
        for used in range(1, count + 1):
            assert used <= rounded_slots(used, count) <= min(count, 1.25 * used)


def test_a_recorded_step_takes_some_free_places_along_and_they_are_done(model, capturers):
    decoder = model.decoder("text")
    made = Runner(decoder, slots=12, beams=1, positions=9, max_source=5)
    options = DecodingOptions(method="greedy", max_length=8, min_length=7)
    with torch.inference_mode():
        made.admit(requests_of([torch.randn(4, decoder.dim) for _ in range(9)], [options] * 9))
        assert made.view().batch == 10
        made.step()
        made.drop(lambda request: request.number < 3)
        assert made.view().batch == made.used == 6
        assert made.state.done.tolist() == [False] * 6 + [True] * 6
    assert capturers[0].calls == ["warm"]


def test_graphs_are_for_cuda_and_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CudaCapturer", lambda device: StandIn())
    assert graphs_for(torch.device("cpu")) is None
    assert isinstance(graphs_for(torch.device("cuda:0")), Graphs)
    monkeypatch.setattr(cuda_graphs.ranges, "DEBUG", True)
    assert graphs_for(torch.device("cuda:0")) is None
    monkeypatch.setattr(cuda_graphs.ranges, "DEBUG", False)
    monkeypatch.setenv("SPEAR_FAST_GRAPHS", "0")
    assert graphs_for(torch.device("cuda:0")) is None
    monkeypatch.setenv("SPEAR_FAST_GRAPHS", "1")
    assert isinstance(graphs_for(torch.device("cuda:0")), Graphs)


def test_every_request_is_served_as_if_it_were_alone(model, capturers):
    """Beams, draws and greedy requests, of all lengths, in 13 slots: rounded up, moved and given away again."""
    asked = [(source, options_of(i)) for i, source in enumerate(sources(80, seed=21))]
    expected = [alone(model, source, options_of(i)) for i, (source, _) in enumerate(asked)]
    capturers.clear()
    served = {}
    with engine_of(model, slots=13, beams=4, max_length=12) as engine:
        for start in range(0, 80, 10):
            # in waves, so that the slots are never all in use for long
            wave = engine.run(asked[start : start + 10], ahead=2 + start // 8)
            served |= {request.number: request.result() for request in wave}
    assert sorted(served) == list(range(80))
    for number, result in served.items():
        same(result, expected[number])
    (capturer,) = capturers
    assert capturer.calls.count("capture") >= 5
    assert capturer.calls.count("replay") > capturer.calls.count("warm")


def test_guided_and_deterministic_requests_are_too(model, capturers):
    asked = [(source, options_of(i, cond_scale=1.0 + i % 3)) for i, source in enumerate(sources(20, seed=22))]
    expected = [alone(model, source, options_of(i, cond_scale=1.0 + i % 3)) for i, (source, _) in enumerate(asked)]
    for settings in ({"guided": True}, {"guided": True, "deterministic": True}):
        capturers.clear()
        with engine_of(model, slots=3, beams=4, max_length=12, **settings) as engine:
            for request in engine.run((source, options_of(i, cond_scale=1.0 + i % 3)) for i, (source, _) in
                                     enumerate(asked)):  # fmt: skip
                same(request.result(), expected[request.number])
        assert capturers[0].calls.count("replay")


def test_buffers_that_grow_are_recorded_anew(model, capturers, monkeypatch):
    """And the old ones are let go before the new ones are made; the stand-in refuses to replay what is gone."""
    monkeypatch.setattr(state, "FIRST_CAPACITY", 8)
    options = DecodingOptions(beam_size=2, max_length=60, min_length=59)
    expected = [alone(model, source, options) for source in sources(3, seed=23)]
    capturers.clear()
    with engine_of(model, slots=3, beams=2, max_length=60) as engine:
        for request in engine.run(sources(3, seed=23), options):
            same(request.result(), expected[request.number])
    (capturer,) = capturers
    # 8, 16, 32 and 61 positions
    assert capturer.calls.count("forget") == 3
    assert capturer.calls.count("capture") == 4


@pytest.mark.parametrize("captured", [False, True])
def test_growing_holds_one_old_buffer_at_a_time(model, monkeypatch, captured):
    """Neither the views of fewer slots nor what is captured holds on to the others."""
    monkeypatch.setattr(state, "FIRST_CAPACITY", 8)
    monkeypatch.setattr(runner, "graphs_for", lambda device: Graphs(StandIn()) if captured else None)
    decoder, pad, old, alive = model.decoder("text"), F.pad, [], []

    def watching(tensor, *arguments):
        if tensor.ndim == 4 and tensor.shape[2] == 8:
            alive.append(sum(not each.expired() for each in old))
            old.append(StorageWeakRef(tensor.untyped_storage()))
        return pad(tensor, *arguments)

    options = DecodingOptions(method="greedy", max_length=30, min_length=29)
    with torch.inference_mode():
        made = Runner(decoder, slots=4, beams=1, positions=31, max_source=5)
        made.admit(requests_of([torch.randn(4, decoder.dim) for _ in range(3)], [options] * 3))
        monkeypatch.setattr(state.F, "pad", watching)
        for _ in range(10):
            made.step()
    # keys and values of two layers
    assert alive == [0] * 4


def test_a_function_of_the_callers_is_not_captured(model, capturers):
    asked = []

    def no_even_tokens(logits):
        asked.append(len(logits))
        return logits.masked_fill(torch.arange(logits.shape[-1]) % 2 == 0, -torch.inf)

    plain = DecodingOptions(method="greedy", max_length=10, min_length=9)
    filtered = DecodingOptions(method="greedy", max_length=10, min_length=9, filter_logits=no_even_tokens)
    pair = sources(2, seed=24)
    expected = [alone(model, source, options) for source, options in zip(pair, (plain, filtered), strict=True)]
    capturers.clear()
    with engine_of(model, slots=2, beams=1, max_length=10) as engine:
        requests = [engine.submit(source, options) for source, options in zip(pair, (plain, filtered), strict=True)]
        for request, result in zip(requests, expected, strict=True):
            same(request.result(), result)
    assert "capture" not in capturers[0].calls
    assert (requests[1].result().tokens[0, 0, :9] % 2 == 1).all()


def test_between_two_growths_every_tensor_stays_where_it_is(model):
    """A captured step reads and writes addresses: none of them may change while it is replayed."""
    decoder = model.decoder("text")
    made = Runner(decoder, slots=4, beams=4, positions=40, max_source=10)
    memories = [torch.randn(n, decoder.dim) for n in (3, 10, 1)]
    options = [options_of(seed, max_length=39, min_length=38) for seed in (0, 2, 3)]

    def addresses():
        view = made.view()
        tensors = [*view.keys, *view.values, *view.memory.keys, *view.memory.values, view.memory.lengths]
        names = (name for name in vars(view) if name not in ("keys", "values", "memory"))
        return [tensor.data_ptr() for tensor in (*tensors, *(getattr(view, name) for name in names))]

    with torch.inference_mode():
        made.admit(requests_of(memories, options, [1, 2, 3]))
        before, view = addresses(), made.view()
        for _ in range(30):
            made.step()
            made.collect_finished()
            assert made.used == 3
            assert made.view() is view
            assert addresses() == before
        # one leaves, one comes: still there
        made.drop(lambda request: request.number == 0)
        made.admit(requests_of(memories[:1], options[:1], [4]))
        made.step()
        assert made.view() is view
        assert addresses() == before


class CapturedInterleavings(interleavings.Interleavings):
    """The same rules with all steps captured."""


CapturedInterleavings.TestCase.settings = interleavings.Interleavings.TestCase.settings


class TestCapturedInterleavings(CapturedInterleavings.TestCase):
    @pytest.fixture(autouse=True)
    def _captured(self, capturers, monkeypatch):
        """Steps are captured, and replayed; buffers grow meanwhile."""
        monkeypatch.setattr(state, "FIRST_CAPACITY", 4)
        yield
        assert any("replay" in capturer.calls for capturer in capturers)


def test_after_a_failed_capture_the_process_captures_no_more(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CudaCapturer", lambda device: StandIn())
    one, other = (graphs_for(torch.device("cuda:0")) for _ in range(2))
    one._capturer.fails = "no"
    made = []
    for i in range(WARM_UPS):
        one.run("a", lambda i=i: made.append(i))
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        one.run("a", lambda: made.append("not captured"))
    for i in range(2 * WARM_UPS):
        other.run("a", lambda i=i: made.append(i))
    assert other._capturer.calls == []
    assert len(made) == 3 * WARM_UPS + 1
    assert graphs_for(torch.device("cuda:0")) is None


class FakeCuda:
    """Stands for `torch.cuda` where a step is captured: what it is asked for, and whether garbage is collected."""

    class CUDAGraph:
        ends = 0

        def capture_begin(self, **_):
            assert not gc.isenabled()

        def capture_end(self):
            type(self).ends += 1
            raise RuntimeError("the capture was invalidated")

        def replay(self):
            raise AssertionError

    device = stream = staticmethod(lambda *_: contextlib.nullcontext())
    graph_pool_handle = staticmethod(object)
    empty_cache = staticmethod(lambda: None)

    Stream = staticmethod(lambda device: object())


@pytest.mark.parametrize("within", [False, True])
def test_what_failed_to_be_captured_stays_alive_and_collection_goes_on(monkeypatch, within):
    monkeypatch.setattr(cuda_graphs.torch, "cuda", FakeCuda)
    monkeypatch.setattr(cuda_graphs, "_STREAMS", {})
    monkeypatch.setattr(cuda_graphs, "_FAILED", failed := [])
    device = torch.device("cuda:0")
    first, second = cuda_graphs.CudaCapturer(device), cuda_graphs.CudaCapturer(device)
    # one for all engines of a device
    assert first._stream is second._stream

    def step():
        assert not gc.isenabled()
        if within:
            raise ValueError("in the midst of it")

    with pytest.raises(ValueError if within else RuntimeError):
        first.capture(step)
    assert gc.isenabled()
    assert [type(each) for each in failed] == [FakeCuda.CUDAGraph, object]


def test_free_bytes_counts_what_torch_holds_and_does_not_use(monkeypatch):
    held = {"mem_get_info": (100, 1000), "memory_reserved": 70, "memory_allocated": 20}
    for name, value in held.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert config.free_bytes(torch.device("cuda:0")) == int(config.SHARE * 150)
    assert config.free_bytes(torch.device("cpu")) is None
