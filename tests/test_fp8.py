"""Cross-attention's keys and values in 8 bits: what is held, that nobody's bits know of another, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_models import assert_same_in_any_company, engine_of, requests_of, sources, tiny_model
from launches import launches_of
from test_decoding_launches import counted
from test_engine import same

from spear_fast import DecodingOptions, ops
from spear_fast.cli import main
from spear_fast.decoding import EngineConfig
from spear_fast.decoding.packed.memory import FP8, LARGEST, ProjectedMemory, quantised
from spear_fast.decoding.runner import Runner
from spear_fast.labelling import LabelOptions, read_labels
from spear_fast.labelling.errors import LabellingError
from spear_fast.ops.reference.decode_attention import dequantised

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "espeak"
OPTIONS = {
    "beam": DecodingOptions(beam_size=4, max_length=12, num_return_sequences=4, return_alignment=True),
    "coverage": DecodingOptions(beam_size=3, max_length=12, coverage_penalty=0.5),
    "reference": DecodingOptions(beam_size=4, max_length=12, beam_mode="reference", return_alignment=True),
    "guided": DecodingOptions(beam_size=2, max_length=12, cond_scale=2.0),
    "sample": DecodingOptions(method="sample", max_length=12, top_k=5),
    "speculative": DecodingOptions(method="speculative", drafter="ngram", max_length=12, temperature=0.0),
}


def rows(*lengths, dtype=torch.float32, layers=2, heads=3, size=4):
    return torch.randn(sum(lengths), layers, 2, heads, size, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_head_of_an_utterance_uses_the_whole_range(dtype):
    projected = rows(5, 1, 7, dtype=dtype)
    # heads of different sizes, one of zeros alone
    projected *= torch.tensor([1e-3, 30.0, 0.0], dtype=dtype)[:, None]
    held, scales = quantised(projected, [5, 1, 7])
    assert (held.dtype, held.shape) == (FP8, projected.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (3, 2, 2, 3))
    for utterance, (part, own) in enumerate(zip(held.split([5, 1, 7]), projected.split([5, 1, 7]), strict=True)):
        largest = part.float().abs().amax(dim=(0, -1))
        assert (largest[..., :2] == LARGEST).all()
        assert (largest[..., 2] == 0).all()
        assert (scales[utterance, ..., 2] == 1).all()
        back = part.float() * scales[utterance][..., None]
        # three bits after the first one, and the smallest steps of small numbers
        allowed = (own.float().abs() / 16).maximum(scales[utterance][..., None] * 2.0**-10) * (1 + 1e-6)
        assert ((back - own.float()).abs() <= allowed).all()


def test_numbers_that_are_not_finite_spoil_their_own_head_alone():
    projected = rows(4, 3)
    for poison in (torch.nan, torch.inf, -torch.inf):
        spoilt = projected.clone()
        spoilt[1, 0, 1, 2, 3] = poison
        scales = quantised(spoilt, [4, 3])[1]
        bad = ~scales.isfinite()
        assert bad.nonzero().tolist() == [[0, 0, 1, 2]]
        assert torch.equal(scales[~bad], quantised(projected, [4, 3])[1][~bad])


@pytest.mark.parametrize("way", ["scatter", "copy"])
def test_what_is_put_and_moved_is_what_was_projected(way, monkeypatch):
    decoder = tiny_model().decoder("text")
    memory = ProjectedMemory.allocate(decoder, slots=4, beams=2, length=9, kv_dtype="fp8")
    monkeypatch.setattr(ProjectedMemory, "copy", getattr(ProjectedMemory, way))
    memories = [torch.randn(n, decoder.dim) for n in (3, 9, 1)]
    projected = [decoder.project(each) for each in memories]
    memory.put(torch.cat(projected), [2, 0, 3], [3, 9, 1])
    memory.move(2, 1, 3)
    for slot, own in zip([2, 0, 3, 1], [*projected, projected[0]], strict=True):
        alone = memory.alone(own)
        one = memory.part(slot, slot + 1)
        for i in range(len(decoder.layers)):
            length = len(own)
            found = dequantised(one.keys[i][:, :, :length], one.values[i][:, :, :length], one.scales_of(i), own.dtype)
            wanted = dequantised(alone.keys[i], alone.values[i], alone.scales_of(i), own.dtype)
            for j in range(2):
                assert torch.equal(found[j], wanted[j])
                exact = own[:, i, j].transpose(0, 1)[None]
                assert (found[j] - exact).abs().max() <= exact.abs().max() / 16


def options_of(method, number):
    options = OPTIONS[method]
    drawn = options.method == "sample"
    return replace(options, generator=torch.Generator().manual_seed(number)) if drawn else options


@pytest.mark.parametrize("method", OPTIONS)
def test_results_are_batch_invariant(method):
    """Alone, among others and in any order; also where an alignment looks at a source again that has left its slot."""
    settings = dict(requests=6, by_itself=[1, 4], slots=3, workers=1, guided=method == "guided", kv_dtype="fp8")
    assert_same_in_any_company(tiny_model(), lambda i: options_of(method, i), **settings)


@pytest.mark.parametrize("method", OPTIONS)
def test_results_are_those_of_rounded_keys_and_values(method, monkeypatch):
    """As if the projection had been rounded and held as floating point."""
    model = tiny_model()

    def results(kv_dtype):
        settings = dict(slots=3, beams=4, max_length=12, guided=method == "guided", kv_dtype=kv_dtype)
        with engine_of(model, **settings) as engine:
            asked = [(each, options_of(method, i)) for i, each in enumerate(sources(6))]
            done = sorted(engine.run(asked), key=lambda request: request.number)
            return [request.result() for request in done]

    def rounded(projected, lengths):
        held, scales = quantised(projected, lengths)
        return held.float() * scales.repeat_interleave(torch.tensor(lengths), dim=0)[..., None]

    exact, held = results("exact"), results("fp8")
    put, alone = ProjectedMemory.put, ProjectedMemory.alone
    monkeypatch.setattr(
        ProjectedMemory, "put", lambda self, rows, slots, lengths: put(self, rounded(rows, lengths), slots, lengths)
    )
    monkeypatch.setattr(ProjectedMemory, "alone", lambda self, rows: alone(self, rounded(rows, [len(rows)])))
    assert any(not torch.equal(ours.scores, theirs.scores) for ours, theirs in zip(held, exact, strict=True))
    for ours, theirs in zip(held, results("exact"), strict=True):
        same(ours, theirs)


def test_sizes_count_what_is_held():
    decoder = tiny_model().decoder("text")
    sizes = dict(slots=3, beams=4, max_length=12, max_source=30)
    exact, held = (EngineConfig.for_decoder(decoder, **sizes, kv_dtype=kv_dtype) for kv_dtype in ("exact", "fp8"))
    runner = Runner(decoder, slots=3, beams=4, positions=13, max_source=30, kv_dtype="fp8")
    memory = runner.state.memory
    store = memory.store.nbytes + memory.scales.nbytes
    assert memory.store.dtype == FP8
    assert exact.bytes - held.bytes == 4 * memory.store.numel() - store
    assert held.halved().kv_dtype == "fp8"
    with pytest.raises(ValueError, match="kv_dtype must be one of exact, fp8, got 'int4'"):
        EngineConfig.for_decoder(decoder, **sizes, kv_dtype="int4")


def test_a_step_calls_the_same_ops():
    """Each of which is one launch on a GPU; the CPU's converts before it computes."""
    options = DecodingOptions(beam_size=4, max_length=20)
    exact, held = counted(6, options), counted(6, options, kv_dtype="fp8")
    assert {name: count for name, count in held.items() if name in exact} == exact


def test_admission_launches_as_much_for_many(monkeypatch):
    monkeypatch.setattr(ProjectedMemory, "copy", ProjectedMemory.scatter)

    def admitted(count):
        decoder = tiny_model(target_depth=3).to(torch.bfloat16).decoder("text")
        runner = Runner(decoder, slots=8, beams=2, positions=21, max_source=9, kv_dtype="fp8")
        memories = [torch.randn(n, decoder.dim, dtype=torch.bfloat16) for n in (3, 9, 1, 4, 4, 2, 7, 8)[:count]]
        found = launches_of(runner.admit, requests_of(memories, [OPTIONS["beam"]] * count))
        # the positions of each, on the host
        del found["aten::arange"]
        return found

    assert admitted(1) == admitted(8)


def test_the_whole_step_in_one_call_leaves_it_to_the_layers():
    model = tiny_model()
    if model.decoder("text").fused is None:
        pytest.skip("the extension has no vectors")
    with ops.forced("decode_step=cpu-fused"):
        with engine_of(model, slots=2, beams=2, max_length=5) as engine:
            engine.submit(sources(1)[0], DecodingOptions(beam_size=2, max_length=5)).result()
        with engine_of(model, slots=2, beams=2, max_length=5, kv_dtype="fp8") as engine:
            request = engine.submit(sources(1)[0], DecodingOptions(beam_size=2, max_length=5))
            with pytest.raises(RuntimeError, match="keys and values are held in 8 bits"):
                request.result()


def test_a_job_is_another_one_with_8_bits():
    exact, held = LabelOptions(), LabelOptions(kv_dtype="fp8")
    assert "kv_dtype" not in exact.identity()
    assert held.identity() == {**exact.identity(), "kv_dtype": "fp8"}
    with pytest.raises(LabellingError, match="kv_dtype must be exact or fp8, got 'int8'"):
        LabelOptions(kv_dtype="int8")


def test_the_committed_model_labels_alike(tmp_path):
    """Of its 20 recordings; examples/espeak/kv_dtype.py has the 600 sentences of its test."""
    found = {}
    for kv_dtype in ("exact", "fp8"):
        out = str(tmp_path / kv_dtype)
        arguments = [str(EXAMPLES / "recordings"), "--model", str(EXAMPLES / "model"), "--out", out, "--quiet"]
        assert main(["label", *arguments, "--kv-dtype", kv_dtype]) == 0
        found[kv_dtype] = {row.id: row for row in read_labels(out)}
    exact, held = found["exact"], found["fp8"]
    assert len(exact) == 20
    assert sum(exact[name].text == held[name].text for name in exact) >= 19
    moved = [abs(exact[name].score - held[name].score) for name in exact]
    assert 0 < max(moved) < 0.05
