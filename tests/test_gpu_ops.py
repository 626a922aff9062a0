"""What only a CUDA device can show: streams, graphs, other devices, and that the native and run-time kernels agree.

The values of every op, provider and dtype are tested by the shared matrix, which moves to the device if there is one.
"""

from __future__ import annotations

import importlib

import ops_inputs
import pytest
import torch
from ops_examples import EXAMPLES
from ops_matrix import moved
from ops_selection_inputs import random_state
from tolerance import to_float64
from torch import Tensor

from spear_fast.ops import backends, providers
from spear_fast.ops.cuda import runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

MAKE = {
    "append_kv": lambda: ops_inputs.append_kv(rows=6, length=40, size=64),
    "decode_self_attention": lambda: ops_inputs.decode_self_attention(beams=5, length=300, size=64),
    "decode_cross_attention": lambda: ops_inputs.decode_cross_attention(beams=5, source=70, size=64),
    "beam_step": lambda: random_state("beam_step", utterances=8, beams=5, vocab=257, capacity=20, guided=True),
    "sample_step": lambda: random_state("sample_step", utterances=8, beams=2, vocab=257, capacity=20, guided=True),
}
CASES = [(op, name) for op in MAKE for name in providers.names(op) if name in ("cuda", "triton")]


def function_of(op, name):
    provider = providers.get(op, name)
    if provider.missing():
        pytest.skip(f"{op} by {name}: {provider.missing()}")
    return provider.function


def outcome(result, arguments):
    """Returns all that an op may have made or written."""
    made = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    return [each.clone() for each in (*made, *arguments) if isinstance(each, Tensor)]


def assert_equal(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.cpu().nan_to_num(), theirs.cpu().nan_to_num())


def fresh(op, device="cuda"):
    torch.manual_seed(0)
    return moved(MAKE[op](), torch.device(device))


@pytest.mark.parametrize(("op", "name"), CASES)
def test_runs_on_the_current_stream(op, name):
    """Inputs that a side stream is still making are waited for, without any wait on the default stream."""
    function = function_of(op, name)
    arguments = fresh(op)
    wanted = outcome(function(*arguments), arguments)
    sources, arguments = fresh(op), fresh(op)
    for each in arguments:
        if isinstance(each, Tensor):
            each.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for each, source in zip(arguments, sources, strict=True):
            if isinstance(each, Tensor):
                each.copy_(source)
        found = outcome(function(*arguments), arguments)
    stream.synchronize()
    assert_equal(found, wanted)


@pytest.mark.parametrize(("op", "name"), CASES)
def test_is_captured_into_a_graph(op, name):
    """The replay computes from what the inputs hold then."""
    function = function_of(op, name)
    arguments = fresh(op)
    wanted = outcome(function(*arguments), arguments)
    arguments, sources = fresh(op), fresh(op)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*arguments)
    for each, source in zip(arguments, sources, strict=True):
        if isinstance(each, Tensor):
            each.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(outcome(result, arguments), wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
@pytest.mark.parametrize(("op", "name"), CASES)
def test_runs_on_another_device(op, name):
    """Where the tensors are, not where the current device is."""
    function = function_of(op, name)
    first, second = fresh(op, "cuda:0"), fresh(op, "cuda:1")
    assert_equal(outcome(function(*second), second), outcome(function(*first), first))
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
@pytest.mark.parametrize("op", [op for op in EXAMPLES if "triton" in providers.names(op)])
def test_triton_launches_where_the_tensors_are(op):
    function, arguments = function_of(op, "triton"), EXAMPLES[op]()
    outcomes = []
    for device in ("cuda:0", "cuda:1"):
        given = moved(arguments, torch.device(device))
        outcomes.append([each.cpu() for each in outcome(function(*given), given)])
    torch.testing.assert_close(*outcomes, equal_nan=True)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("op", [op for op, name in CASES if name == "cuda"])
def test_native_and_run_time_kernels_agree(op):
    """The same source, built by nvcc and by CuPy, gives the same bits."""
    if not backends.cuda_is_native() or runtime.missing():
        pytest.skip(runtime.missing() or "the extension was built without nvcc")
    built = importlib.import_module(f"spear_fast.ops.cuda.{op}")
    first, second = fresh(op), fresh(op)
    native = getattr(torch.ops.spear_fast, op).cuda
    assert_equal(outcome(native(*first), first), outcome(getattr(built, op)(*second), second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_head_size_and_tile(dtype):
    """Whole and in odd sizes, one tile of query rows and several, in one split and two."""
    function = function_of("decode_self_attention", "triton")
    reference = providers.get("decode_self_attention", "reference").function
    for size in (16, 34, 64, 80, 128):
        for beams, tokens, heads in ((1, 1, 2), (5, 1, 2), (5, 1, 8), (1, 5, 8), (2, 6, 16)):
            arguments = ops_inputs.decode_self_attention(
                3, beams, tokens, heads, 2, 600, size, dtype=dtype, append=True, dim=96
            )
            truth = reference(*to_float64(arguments))
            found = function(*moved(arguments, torch.device("cuda"))).cpu().double()
            error = (found - truth).norm() / truth.norm()
            assert error < (1e-4 if dtype == torch.float32 else 2e-2), (size, beams, tokens, heads)
