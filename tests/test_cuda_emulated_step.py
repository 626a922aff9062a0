"""The whole decoding step in one CUDA launch, run on the CPU, computes what the ops do one by one."""

from __future__ import annotations

import ctypes

import cuda_emulator
import pytest
import torch
from cuda_emulator import emulator
from engine_models import requests_of
from plain_decoding import build_memory, build_model
from tolerance import assert_within
from torch import Tensor

from spear_fast import DecodingOptions, ops
from spear_fast.decoding import Decoder, decode, fused_step, methods
from spear_fast.decoding import step as stepping
from spear_fast.decoding.packed.fused import FusedWeights
from spear_fast.decoding.runner import Runner
from spear_fast.decoding.state import DecodeState
from spear_fast.decoding.step import decode_step
from spear_fast.ops import backends, providers
from spear_fast.ops.cuda import sources
from spear_fast.ops.cuda.runtime import SCALARS

__all__ = ["emulator"]

# utterances, beams, positions already written, capacity, source positions; then the model's sizes
CASES = {
    "one row": dict(utterances=1, beams=1, positions=5, source=9),
    "beams": dict(utterances=2, beams=3, positions=4, source=7),
    "guided": dict(utterances=2, beams=2, positions=3, source=5, guided=True),
    "several parts": dict(utterances=1, beams=2, positions=150, source=150, target_depth=1),
    "sixteen rows": dict(utterances=2, beams=8, positions=2, source=3, heads=2, target_depth=1),
    "one kv head, wide": dict(
        utterances=1, beams=2, positions=3, source=4, heads=6, target_kv_heads=1, dim_head=24, dim=264, target_depth=1
    ),
}


@pytest.fixture(autouse=True)
def three_blocks(monkeypatch):
    monkeypatch.setattr(fused_step, "blocks_on", lambda device: 3)


def build_decoder(dtype: torch.dtype, *, exact: bool = False, device: str = "cpu", **sizes) -> Decoder:
    """The decoder of a small model with weights of a dtype; exact: in float64, the same numbers."""
    model = build_model(2, dtype=dtype, **sizes)
    model = (model.double() if exact else model).to(device)
    arguments = (model.target_transformer, model.token_emb["text"].weight, model.start_token["text"])
    decoder = Decoder.from_modules(*arguments, eos_id=model.eos_id["text"], pad_id=0)
    decoder.cuda_weights = FusedWeights.of(decoder)
    return decoder


def build_state(
    decoder: Decoder,
    dtype: torch.dtype,
    *,
    utterances: int,
    beams: int,
    positions: int,
    source: int,
    guided: bool = False,
) -> DecodeState:
    """A state in the midst of decoding, of numbers of a dtype: every utterance has a length of its own.

    The beams of an utterance are equally long: none reads what another is about to write.
    """
    sizes = dict(slots=utterances, beams=beams, positions=positions + 3, max_source=source, guided=guided)
    runner = Runner(decoder, **sizes)
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(decoder.embedding)

    memories = [normal(max(1, source - 2 * i), decoder.dim) for i in range(utterances)]
    options = DecodingOptions(beam_size=beams, max_length=positions + 2)
    runner.admit(requests_of(memories, [options] * utterances))
    if runner.state.capacity < positions + 3:
        runner.state.grow(positions + 3)
    state = runner.view()
    for buffer in (*state.keys, *state.values, state.memory.store):
        buffer.copy_(normal(*buffer.shape))
    state.inputs.copy_(torch.randint(decoder.vocab_size + 1, state.inputs.shape, generator=generator))
    state.ancestors.copy_(torch.randint(beams, state.ancestors.shape, generator=generator))
    state.lengths.copy_((positions - 2 * torch.arange(len(state.lengths))).clamp(min=0)[:, None])
    own = torch.arange(beams, dtype=torch.uint8, device=decoder.device).expand_as(state.lengths)
    state.ancestors.scatter_(2, state.lengths[:, :, None], own[:, :, None])
    return state


def split(case: dict) -> tuple[dict, dict]:
    ours = ("utterances", "beams", "positions", "source", "guided")
    return {name: case[name] for name in ours if name in case}, {
        name: value for name, value in case.items() if name not in ours
    }


@pytest.mark.parametrize(
    ("case", "dtype"), [*((name, torch.bfloat16) for name in CASES), ("guided", torch.float16)], ids=str
)
@pytest.mark.usefixtures("nan_filled_empty", "emulator")
def test_a_step(case, dtype):
    arguments, sizes = split(CASES[case])
    decoder, exact = build_decoder(dtype, **sizes), build_decoder(dtype, exact=True, **sizes)
    state, plain, truth = (build_state(each, dtype, **arguments) for each in (decoder, decoder, exact))
    assert fused_step.fits(decoder, state)
    logits = fused_step.fused_step(decoder, state)
    with ops.forced("*=reference"):
        baseline, wanted = decode_step(decoder, plain), decode_step(exact, truth)
    assert_within(logits, wanted, baseline)
    caches = [(*each.keys, *each.values) for each in (state, truth, plain)]
    for ours, exactly, theirs in zip(*caches, strict=True):
        assert_within(ours, exactly, theirs)
    assert not state.memory.arrivals.any()


ORDER = dict(utterances=1, beams=2, positions=66, source=70, target_depth=1)


# stands for the barrier before the first phase
BEFORE_ALL = 100


@pytest.fixture
def skip_barrier(monkeypatch):
    """Compiles the kernel without the barrier after a phase that the function returned chooses."""
    condition, text = "if (layer < a.layers) {", sources.text("fused_step.cu")
    assert text.count(condition) == 1
    text = text.replace(condition, "if (layer < a.layers && phase != skipped_phase) {")
    first = "embed<scalar_t>(a);"
    assert text.count(first) == 1
    text = text.replace(first, f"{first} if (skipped_phase != {BEFORE_ALL})")
    text = f'extern "C" int skipped_phase;\nint skipped_phase = -1;\n{text}'.replace("{", "{{").replace("}", "}}")
    monkeypatch.setattr(cuda_emulator, "PROGRAM", cuda_emulator.PROGRAM.replace('#include "{source}"', text))
    cuda_emulator._kernel.cache_clear()

    def skip(phase: int) -> None:
        kernel = f"spear_fast::fused_step<{SCALARS[torch.bfloat16]}, 4>"
        compiled = cuda_emulator._kernel(fused_step.SOURCE, kernel, fused_step.STRUCT)
        ctypes.c_int.in_dll(compiled, "skipped_phase").value = phase

    yield skip
    cuda_emulator._kernel.cache_clear()


def steps_by_seed(emulator, count: int) -> set[tuple[float, ...]]:
    arguments, sizes = split(ORDER)
    decoder, found = build_decoder(torch.bfloat16, **sizes), set()
    for emulator.seed in range(count):
        state = build_state(decoder, torch.bfloat16, **arguments)
        logits = fused_step.fused_step(decoder, state)
        found.add((*logits.flatten().tolist(), *state.keys[0].flatten().tolist()))
    return found


def test_the_order_of_threads_and_blocks_changes_nothing(emulator):
    assert len(steps_by_seed(emulator, 4)) == 1


def test_every_barrier_is_needed(emulator, skip_barrier):
    """Without the one after a phase, a block reads what another has yet to write."""
    skip_barrier(-1)
    wanted = steps_by_seed(emulator, 2)
    assert len(wanted) == 1
    for phase in (*range(8), BEFORE_ALL):
        skip_barrier(phase)
        assert steps_by_seed(emulator, 8) != wanted, f"phase {phase}"


METHODS = {
    "greedy": dict(method="greedy"),
    "sampling, guided": dict(method="sample", num_return_sequences=2, cond_scale=1.5),
    "beams": dict(beam_size=3),
    "beams, guided": dict(beam_size=2, cond_scale=2.0),
}


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@pytest.mark.usefixtures("emulator")
def test_decoding_by_such_steps(options, monkeypatch):
    """Step after step, over caches that earlier ones wrote and histories that selection chose."""
    decoder = build_decoder(torch.bfloat16, target_depth=1)
    compared = []

    def both(decoder: Decoder, state: DecodeState) -> Tensor:
        ours = fused_step.fused_step(decoder, state)
        after = [buffer.clone() for buffer in (*state.keys, *state.values)]
        theirs = decode_step(decoder, state)
        rows, lengths = torch.arange(state.lengths.numel()), state.lengths.flatten()
        for mine, buffer in zip(after, (*state.keys, *state.values), strict=True):
            torch.testing.assert_close(mine[rows, :, lengths], buffer[rows, :, lengths], rtol=0.05, atol=0.05)
        compared.append((ours, theirs))
        return ours

    monkeypatch.setattr(methods, "decode_step", both)
    memory, mask = build_memory(build_model(2, dtype=torch.bfloat16, target_depth=1), 2)
    decode(decoder, memory, mask, DecodingOptions(**{"max_length": 4, **options}))
    assert len(compared) > 2
    for ours, theirs in compared:
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.1)


def chosen(rows_are_few: bool) -> str:
    query = providers.ProviderQuery(torch.device("cuda"), torch.bfloat16, 64, (False, True, rows_are_few))
    function = providers.choose("decode_step", query)
    return next(
        name for name in providers.names("decode_step") if providers.get("decode_step", name).function is function
    )


def test_few_rows_are_served_by_it(monkeypatch):
    """Unless another provider is asked for, of what it computes by itself."""
    monkeypatch.setattr(backends, "cuda_missing", lambda: None)
    assert (chosen(True), chosen(False)) == ("cuda-fused", "layered")
    with ops.forced("geglu=reference"):
        assert chosen(True) == "layered"
    with ops.forced("decode_step=cuda-fused"), pytest.raises(RuntimeError, match="takes up to 16 hypotheses"):
        chosen(False)


def test_what_does_not_fit(monkeypatch):
    decoder = build_decoder(torch.bfloat16)
    few = dict(positions=3, source=4)
    assert fused_step.fits(decoder, build_state(decoder, torch.bfloat16, utterances=2, beams=8, **few))
    assert not fused_step.fits(decoder, build_state(decoder, torch.bfloat16, utterances=2, beams=9, **few))
    state = build_state(decoder, torch.bfloat16, utterances=1, beams=1, **few)
    state.keys[0] = state.keys[0].mT.contiguous().mT
    assert not fused_step.fits(decoder, state)
    state = build_state(decoder, torch.bfloat16, utterances=2, beams=1, **few)
    monkeypatch.setattr(fused_step, "MULTIPLICATIONS", 2 * decoder.cuda_weights.numbers - 1)
    assert not fused_step.fits(decoder, state)
    assert fused_step.fits(decoder, build_state(decoder, torch.bfloat16, utterances=1, beams=1, **few))
    assert build_decoder(torch.bfloat16, dim_head=12, heads=4).cuda_weights is None
    assert build_decoder(torch.float64).cuda_weights is None


def test_a_launch_that_is_refused_is_said_and_replaced(monkeypatch):
    decoder = build_decoder(torch.bfloat16)
    arguments = dict(utterances=1, beams=2, positions=3, source=4)
    state, other = (build_state(decoder, torch.bfloat16, **arguments) for _ in range(2))

    def refuse(decoder: Decoder, state: DecodeState) -> Tensor:
        raise RuntimeError("too many blocks\nfor this device")

    monkeypatch.setattr(stepping, "fused_step", refuse)
    monkeypatch.setattr(stepping._Refused, "reason", None)
    provider = providers.get("decode_step", "cuda-fused")
    with pytest.warns(RuntimeWarning, match=r"the launch was refused \(too many blocks\); SPEAR_FAST_PROVIDER="):
        logits = provider.function(decoder, state)
    assert torch.equal(logits, decode_step(decoder, other))
    assert "too many blocks" in provider.missing()
    monkeypatch.setattr(backends, "cuda_missing", lambda: None)
    assert chosen(True) == "layered"
