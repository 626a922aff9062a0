"""On a CUDA device: the whole step in one cooperative launch is chosen for few rows, is right, and is captured."""

from __future__ import annotations

import pytest
import torch
from test_cuda_emulated_step import CASES, build_decoder, build_state, chosen, split
from tolerance import assert_within

from spear_fast import ops
from spear_fast.decoding import fused_step
from spear_fast.decoding.step import decode_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    # where the launch is refused
    pytest.mark.filterwarnings("error::RuntimeWarning"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step(case, dtype):
    arguments, sizes = split(case)
    decoder = build_decoder(dtype, device="cuda", **sizes)
    exact = build_decoder(dtype, exact=True, device="cuda", **sizes)
    state, plain, truth = (build_state(each, dtype, **arguments) for each in (decoder, decoder, exact))
    assert fused_step.fits(decoder, state)
    assert chosen(True) == "cuda-fused"
    logits = decode_step(decoder, state)
    with ops.forced("*=reference,decode_step=layered"):
        baseline, wanted = decode_step(decoder, plain), decode_step(exact, truth)
    assert_within(logits, wanted, baseline)
    caches = [(*each.keys, *each.values) for each in (state, truth, plain)]
    for ours, exactly, theirs in zip(*caches, strict=True):
        assert_within(ours, exactly, theirs)
    assert not state.memory.arrivals.any()


def test_a_captured_step_has_the_same_bits():
    arguments, sizes = split(CASES["several parts"])
    decoder = build_decoder(torch.bfloat16, device="cuda", **sizes)
    state = build_state(decoder, torch.bfloat16, **arguments)
    wanted = decode_step(decoder, state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decode_step(decoder, state)
    for _ in range(3):
        logits.fill_(torch.nan)
        graph.replay()
        assert torch.equal(logits, wanted)
