"""Whatever comes, goes, is taken back or fails, in any order: every other request gets the plain search's result."""

from __future__ import annotations

import os
from concurrent.futures import CancelledError

import pytest
from engine_models import alone, engine_of, sources, tiny_model
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from test_engine import options_of, same

MODEL = tiny_model()
SOURCES = sources(24, seed=11)
KNOWN: dict[tuple[int, int], object] = {}


def expected(which: int, seed: int):
    if (which, seed) not in KNOWN:
        KNOWN[which, seed] = alone(MODEL, SOURCES[which], options_of(seed))
    return KNOWN[which, seed]


class Interleavings(RuleBasedStateMachine):
    requests = Bundle("requests")

    @initialize(slots=st.integers(1, 4))
    def make(self, slots):
        self.engine = engine_of(MODEL, slots=slots, beams=4, max_length=12)
        self.slots, self.asked, self.cancelled = slots, {}, set()

    @rule(target=requests, which=st.integers(0, len(SOURCES) - 1), seed=st.integers(0, 15))
    def submit(self, which, seed):
        request = self.engine.submit(SOURCES[which], options_of(seed), tag=(which, seed))
        self.asked[request.number] = request
        return request

    @rule(target=requests)
    def submit_what_cannot_be_served(self):
        request = self.engine.submit(SOURCES[0], options_of(0, max_length=999))
        assert isinstance(request.exception(), ValueError)
        return multiple()

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self.engine.step()

    @rule(request=requests)
    def cancel(self, request):
        if request.cancel():
            self.cancelled.add(request.number)

    @rule(request=requests)
    def wait(self, request):
        if request.number not in self.cancelled:
            same(request.result(), expected(*request.tag))

    @invariant()
    def no_more_in_flight_than_slots(self):
        if hasattr(self, "engine"):
            assert self.engine.in_flight <= self.slots
            assert self.engine.in_flight + self.engine.waiting <= len(self.asked) + len(self.cancelled)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for number, request in self.asked.items():
            if number in self.cancelled:
                with pytest.raises(CancelledError):
                    request.result()
            else:
                same(request.result(), expected(*request.tag))
        assert self.engine.in_flight == self.engine.waiting == 0
        self.engine.close()


Interleavings.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestInterleavings = Interleavings.TestCase


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory in use from /proc")
def test_soak_of_20000_short_requests():
    """None lost, none twice, none mixed up, and no more memory at the end than after the first tenth."""
    from spear_fast import DecodingOptions

    pool = sources(50, seed=12, longest=8)
    options = [DecodingOptions(method="greedy", max_length=1 + i % 3) for i in range(6)]
    expected = {(i, j): alone(MODEL, pool[i], options[j]).tokens.tolist() for i in range(50) for j in range(6)}
    count, seen, memory = 20_000, set(), []
    with engine_of(MODEL, slots=64, beams=1, max_length=4) as engine:
        asked = ((pool[i % 50], options[i % 6]) for i in range(count))
        for request in engine.run(asked):
            assert request.number not in seen
            seen.add(request.number)
            assert request.result().tokens.tolist() == expected[request.number % 50, request.number % 6]
            if len(seen) % (count // 10) == 0:
                memory.append(resident_bytes())
    assert len(seen) == count
    assert memory[-1] - memory[0] < 32 * 2**20
