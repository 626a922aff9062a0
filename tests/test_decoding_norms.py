"""A norm whose gamma is folded and whose scale comes after the matmul is as near to float64 as the norm before it."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_models import requests_of, tiny_model
from tolerance import assert_within

from spear_fast import DecodingOptions
from spear_fast.decoding.packed import layout
from spear_fast.decoding.packed.linear import normalize
from spear_fast.decoding.runner import Runner
from spear_fast.decoding.step import claim_positions, embed, run_layers

TOKENS = 5


def logits_of(model, memories, guided):
    """Returns what a decoder makes of fixed inputs, `[rows, vocabulary]`, several tokens at once."""
    decoder = model.decoder("text")
    runner = Runner(decoder, slots=3, beams=4, positions=21, max_source=9, guided=guided)
    options = DecodingOptions(beam_size=4, max_length=20, cond_scale=2.0 if guided else 1.0)
    with torch.inference_mode():
        runner.admit(requests_of([each.to(decoder.dtype) for each in memories], [options] * 3))
        state = runner.view()
        for token in range(TOKENS):
            claim_positions(state, state.lengths + token)
        inputs = torch.arange(3 * 4 * TOKENS).view(3, 4, TOKENS) % 20
        x = run_layers(decoder, state, embed(decoder, state, inputs), range(len(decoder.layers)))
        return decoder, decoder.logits(normalize(x, decoder.final_gamma))


@pytest.mark.parametrize("guided", [False, True])
# of the residual stream: bfloat16 has the range of float32
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_deferred_norms_are_as_near_to_float64(scale, guided, monkeypatch):
    model = tiny_model(target_depth=3, dim=64).to(torch.bfloat16)
    with torch.no_grad():
        for embedding in model.token_emb.values():
            embedding.weight.mul_(scale)
    memories = [torch.randn(n, 64, dtype=torch.bfloat16) for n in (3, 9, 1)]
    decoder, found = logits_of(model, memories, guided)
    assert all(layer.norm_deferred for layer in decoder.layers)
    # the truth too: it would share what is wrong
    monkeypatch.setattr(layout, "defers_norm", lambda weight: False)
    _, truth = logits_of(copy.deepcopy(model).double(), memories, guided)
    decoder, baseline = logits_of(copy.deepcopy(model), memories, guided)
    assert not any(layer.norm_deferred for layer in decoder.layers)
    assert_within(found, truth, baseline, what="logits")


def test_float16_keeps_its_norms():
    """Its largest number is 65504, which the raw result of a matmul can pass."""
    assert not any(layer.norm_deferred for layer in tiny_model().half().decoder("text").layers)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_encoder_s_deferred_norms_are_as_near_to_float64(scale, monkeypatch):
    model = tiny_model(source_depth=3, dim=64).to(torch.bfloat16)
    with torch.no_grad():
        for embedding in model.token_emb.values():
            embedding.weight.mul_(scale)
    ids, lengths = torch.randint(0, 20, (13,), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 9, 1])
    with torch.inference_mode():
        encoder = model.encoder("speech")
        found = encoder(ids, lengths)
        assert all(layer.feed_forward_gamma is None and len(layer.projections) == 1 for layer in encoder.layers)
        monkeypatch.setattr(layout, "defers_norm", lambda weight: False)
        truth = copy.deepcopy(model).double().encoder("speech")(ids, lengths)
        encoder = copy.deepcopy(model).encoder("speech")
        assert not any(layer.feed_forward_gamma is None for layer in encoder.layers)
        baseline = encoder(ids, lengths)
    assert_within(found, truth, baseline, what="memory")


def test_the_encoder_of_float32_on_a_cpu_lies_over_the_modules_weights():
    model = tiny_model()
    layer = model.encoder("speech").layers[0]
    attention = model.source_transformer.layers[0][0]
    own = [attention.to_q[0].weight, attention.to_kv[0].weight]
    assert [each.weight.data_ptr() for each in layer.projections] == [each.data_ptr() for each in own]
