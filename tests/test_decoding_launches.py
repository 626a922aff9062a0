"""A decoding step launches few kernels: counted, with a ceiling that only ever goes down."""

from __future__ import annotations

import pytest
import torch
from engine_models import engine_of, requests_of, sources, tiny_model
from launches import launches_of

from spear_fast import DecodingOptions, ops
from spear_fast.decoding import runner as runner_module
from spear_fast.decoding.methods import Mix, step
from spear_fast.decoding.packed.linear import normalize
from spear_fast.decoding.packed.memory import ProjectedMemory
from spear_fast.decoding.runner import Runner
from spear_fast.ops import extension
from spear_fast.transfer import packed, unpacked

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

# of a layer: 6 matmuls with their residuals, self-attention, which appends too, cross-attention, GEGLU; these three
# make up for the norms before the matmuls that they read
LAYER = 9
# of a layer of the encoder on the CPU: a norm, 4 matmuls, attention, GEGLU, which makes up for the other norm, and the
# last bias with the residual, which on a GPU is a column of the matmul
ENCODER_LAYER = 8
# of a step besides: embedding, lengths, norm, logits, selection
STEP = 5
METHODS = {
    "beam": DecodingOptions(beam_size=4, max_length=20),
    "greedy": DecodingOptions(method="greedy", max_length=20),
    "sample": DecodingOptions(method="sample", max_length=20, top_k=5),
}


def counted(depth: int, options: DecodingOptions, guided: bool = False, kv_dtype: str = "exact"):
    model = tiny_model(target_depth=depth).to(torch.bfloat16)
    decoder = model.decoder("text")
    assert decoder.fused is None
    runner = Runner(decoder, slots=3, beams=4, positions=21, max_source=9, guided=guided, kv_dtype=kv_dtype)
    with torch.inference_mode():
        memories = [torch.randn(n, decoder.dim, dtype=torch.bfloat16) for n in (3, 9, 1)]
        runner.admit(requests_of(memories, [options] * 3))
        runner.step()
        return launches_of(step, decoder, runner.view(), Mix.of([(0, options), (1, options), (2, options)]))


@pytest.mark.parametrize("method", METHODS)
def test_launches_of_a_step(method, record_property):
    """59 at six layers and 113 at twelve, where 62 and 122 were the aim; 164 and 320 was where it began."""
    for depth in (1, 6, 12):
        found = counted(depth, METHODS[method])
        record_property(f"launches_{depth}", sum(found.values()))
        assert sum(found.values()) <= LAYER * depth + STEP, found
        # nothing but matmuls, the embedding, lengths and the package's own ops
        assert {name for name in found if not name.startswith("spear_fast::")} <= {
            "aten::index",
            "aten::add",
            "aten::linear",
            "aten::addmm_",
        }


def test_guidance_adds_one_launch_a_layer():
    """The null branch of cross-attention is a constant that is added."""
    options = DecodingOptions(beam_size=4, max_length=20, cond_scale=2.0)
    assert sum(counted(6, options, guided=True).values()) <= (LAYER + 1) * 6 + STEP + 1


@pytest.mark.parametrize("apart", [False, True])
def test_admission_launches_as_much_for_many_utterances_and_layers(apart, monkeypatch):
    """One matmul and one scatter, whoever comes; a matmul for each utterance where bits must not know of the others."""

    monkeypatch.setattr(ProjectedMemory, "put", ProjectedMemory.scatter)

    def admitted(depth: int, count: int):
        decoder = tiny_model(target_depth=depth).to(torch.bfloat16).decoder("text")
        runner = Runner(decoder, slots=8, beams=2, positions=21, max_source=9, fixed=apart)
        memories = [torch.randn(n, decoder.dim, dtype=torch.bfloat16) for n in (3, 9, 1, 4, 4, 2, 7, 8)[:count]]
        return launches_of(runner.admit, requests_of(memories, [METHODS["greedy"]] * count))

    few, many = admitted(1, 1), admitted(12, 8)
    assert few["aten::linear"] == 1
    assert many["aten::linear"] == (8 if apart else 1)
    # the rest of them are of the small rows, alike for all
    assert many["aten::index_put_"] == few["aten::index_put_"]
    assert many["aten::copy_"] == few["aten::copy_"]


@pytest.mark.parametrize("way", ["scatter", "copy"])
def test_admission_writes_every_layer_of_its_slots_alone(way, monkeypatch):
    monkeypatch.setattr(ProjectedMemory, "put", getattr(ProjectedMemory, way))
    decoder = tiny_model(target_depth=3).decoder("text")
    runner = Runner(decoder, slots=4, beams=2, positions=21, max_source=9)
    runner.state.memory.store.fill_(7.0)
    memories = [torch.randn(n, decoder.dim) for n in (3, 9, 1)]
    options, seeds = [METHODS["greedy"]] * 3, [0] * 3
    with torch.inference_mode():
        runner.state.fill([2, 0, 3], memories, options, seeds, decoder)
        expected = torch.full_like(runner.state.memory.store, 7.0)
        for slot, memory in zip([2, 0, 3], memories, strict=True):
            rows = decoder.project(memory)
            for i in range(3):
                for j in range(2):
                    expected[i, j, slot, :, : len(memory)] = rows[:, i, j].transpose(0, 1)
    assert torch.equal(runner.state.memory.store, expected)
    for i in range(3):
        assert torch.equal(runner.state.memory.keys[i], expected[i, 0])
        assert torch.equal(runner.state.memory.values[i], expected[i, 1])


def test_launches_of_an_encoder_layer():
    """On a GPU it is one less, see `ENCODER_LAYER`."""

    def encoded(depth: int) -> int:
        encoder = tiny_model(source_depth=depth).to(torch.bfloat16).encoder("speech")
        return sum(launches_of(encoder, torch.randint(0, 20, (13,)), torch.tensor([3, 9, 1])).values())

    assert encoded(6) - encoded(1) <= 5 * ENCODER_LAYER


def test_results_come_back_in_one_copy(monkeypatch):
    """As from a GPU: the bytes of every field in one tensor, whose launch is one beside a gather for each field."""
    copies = []

    def as_from_a_gpu(tensors):
        assert launches_of(packed, tensors) == {"aten::cat": 1}
        copies.append(packed(tensors))
        return unpacked(copies[-1].numpy(), tensors)

    def results():
        options = [DecodingOptions(beam_size=4, max_length=n, num_return_sequences=4) for n in (3, 7, 12, 5)]
        with engine_of(tiny_model(), slots=3, beams=4, max_length=12) as engine:
            asked = zip(sources(4), options, strict=True)
            return {request.number: request.result() for request in engine.run(asked)}

    wanted = results()
    monkeypatch.setattr(runner_module, "to_host", as_from_a_gpu)
    found = results()
    assert copies
    for number, result in wanted.items():
        for name in ("tokens", "lengths", "finished", "scores", "token_logprobs"):
            assert torch.equal(getattr(found[number], name), getattr(result, name)), name


def test_packed_bytes_are_every_dtypes_values_and_aligned():
    tensors = {
        "flags": torch.rand(3, 5) > 0.5,
        "bytes": torch.randint(0, 256, (7,), dtype=torch.uint8),
        "nothing": torch.zeros(2, 0, 3, dtype=torch.int32),
        "turned": torch.randint(-9, 9, (3, 5), dtype=torch.int32).t(),
        "long": torch.randint(-(2**62), 2**62, (3,)),
        "double": torch.randn(2, 3, dtype=torch.float64),
        "half": torch.randn(3, dtype=torch.float16),
        "single": torch.randn(1, 3, 2),
    }
    found = unpacked(packed(tensors).numpy(), tensors)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].flags.aligned
        assert found[name].dtype == tensor.numpy().dtype
        assert found[name].shape == tuple(tensor.shape)
        assert (found[name] == tensor.numpy()).all()


def test_the_counter_sees_glue():
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    assert sum(launches_of(normalize, x, None).values()) == 4
    assert launches_of(normalize, x, torch.ones(8, dtype=torch.bfloat16)) == {"spear_fast::rms_norm": 1}
    assert launches_of(ops.geglu, x)["spear_fast::geglu"] == 1
    assert not launches_of(lambda: x.view(2, 16)[:, :3].t())
