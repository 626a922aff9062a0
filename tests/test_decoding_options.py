"""Options and arguments that do not fit: one sentence each. And the matmuls that decoding is made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine_models import tiny_model
from plain_decoding import build_memory, build_model
from tolerance import assert_within

from spear_fast.decoding import Decoder, DecodingOptions, EngineConfig, Request, decode
from spear_fast.decoding.packed import linear as packing
from spear_fast.decoding.packed.linear import Linear, PackedFeedForward, l2_normalize
from spear_fast.ops import extension

SAMPLING = "top_k and top_p are for sampling, got method '{}'; leave them out or sample."
RETURNS = "num_return_sequences must be from 1 to {} with method '{}', got {}."
REFERENCE = "{} is not part of the reference's search, got {}; use beam_mode='standard'."
WRONG = [
    (dict(method="beams"), "method must be one of greedy, sample, beam, speculative, got 'beams'."),
    (dict(beam_mode="fast"), "beam_mode must be 'standard' or 'reference', got 'fast'."),
    (dict(beam_size=0), "beam_size must be a whole number from 1 to 256, got 0."),
    (dict(beam_size=257), "beam_size must be a whole number from 1 to 256, got 257."),
    (dict(beam_size=True), "beam_size must be a whole number from 1 to 256, got True."),
    (dict(max_length=0), "max_length must be a whole number of at least 1, got 0."),
    (dict(max_length=2.5), "max_length must be a whole number of at least 1, got 2.5."),
    (dict(max_length=5, min_length=5), "min_length must be a whole number from 0 to below max_length 5, got 5."),
    (dict(min_length=-1), "min_length must be a whole number from 0 to below max_length 2048, got -1."),
    (dict(temperature=-0.1), "temperature must be 0 or more, got -0.1."),
    (dict(temperature=float("nan")), "temperature must be 0 or more, got nan."),
    (dict(cond_scale=0.5), "cond_scale must be 1 or more, got 0.5."),
    (dict(length_penalty=float("inf")), "length_penalty must be a finite number, got inf."),
    (dict(early_stopping="always"), "early_stopping must be True, False or 'never', got 'always'."),
    (dict(method="sample", top_k=0), "top_k must be a whole number of at least 1, got 0."),
    (dict(method="sample", top_p=0.0), "top_p must be above 0 and at most 1, got 0.0."),
    (dict(method="sample", top_p=1.1), "top_p must be above 0 and at most 1, got 1.1."),
    (dict(method="beam", top_k=3), SAMPLING.format("beam")),
    (dict(method="greedy", top_p=0.5), SAMPLING.format("greedy")),
    (dict(num_return_sequences=5), RETURNS.format(4, "beam", 5)),
    (dict(method="greedy", num_return_sequences=2), RETURNS.format(1, "greedy", 2)),
    (dict(method="speculative", gamma=0), "gamma must be a whole number of at least 1, got 0."),
    (dict(method="speculative", lenience=0.0), "lenience must be above 0 and at most 1, got 0.0."),
    (dict(method="speculative", lenience=1.5), "lenience must be above 0 and at most 1, got 1.5."),
    (dict(beam_mode="reference", length_penalty=2.0), REFERENCE.format("length_penalty", 2.0)),
    (dict(beam_mode="reference", early_stopping=True), REFERENCE.format("early_stopping", True)),
    (dict(beam_mode="reference", min_length=1), REFERENCE.format("min_length", 1)),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_wrong_options_say_what_is_wanted(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        DecodingOptions(**options)
    assert str(error.value) == message


def test_wrong_arguments_say_what_is_wanted() -> None:
    model = build_model()
    memory, mask = build_memory(model, 2)
    decoder, options = model.decoder("speech"), DecodingOptions(max_length=2)
    for arguments, message in (
        (
            (memory[..., :5], mask),
            r"memory must be floating-point \[batch, length, 32\], got torch.float64 \[2, 7, 5\]",
        ),
        ((memory.long(), mask), r"memory must be floating-point \[batch, length, 32\], got torch.int64 \[2, 7, 32\]"),
        (
            (memory, mask.long()),
            r"memory_mask must be bool \[2, 7\], as memory has positions, got torch.int64 \[2, 7\]",
        ),
        ((memory, mask[:, :4]), r"memory_mask must be bool \[2, 7\], as memory has positions, got torch.bool \[2, 4\]"),
        ((memory.to("meta"), mask), "memory must be on the decoder's device cpu, got meta; move it there"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(decoder, *arguments, options)
    with pytest.raises(
        ValueError, match="drafts with an early-exit head, and this model has none; use drafter='ngram'"
    ):
        decode(decoder, memory, mask, DecodingOptions(method="speculative"))
    with pytest.raises(ValueError, match="layers with cross-attention, got a transformer without"):
        Decoder.from_modules(
            model.source_transformer, model.token_emb["text"].weight, model.start_token["text"], eos_id=None, pad_id=0
        )
    with pytest.raises(TypeError, match="call Decoder"):
        Decoder()


SIZES = [(1, 8, 8), (3, 32, 21), (32, 40, 96), (33, 17, 5), (200, 64, 48)]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_packed_product(rows: int, inputs: int, outputs: int, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(packing, "packs", lambda weight: False)
    x, weight, bias, residual = (
        torch.randn(shape) for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    for b in (None, bias):
        linear = Linear(weight, b)
        assert (linear.packed is None) == (plain or extension.missing() is not None)
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        assert_within(linear(x), exact, F.linear(x, weight, b))
        assert_within(linear.add_to(residual.clone(), x), exact + residual.double(), F.linear(x, weight, b) + residual)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("inner", [1, 16, 37])
def test_feed_forward(inner: int, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(packing, "packs", lambda weight: False)
    first, second, x = torch.nn.Linear(24, 2 * inner), torch.nn.Linear(inner, 24), torch.randn(9, 24)

    def formula(x, *weights):
        w1, b1, w2, b2 = weights
        value, gate = F.linear(x, w1, b1).chunk(2, dim=-1)
        return F.linear(value * F.gelu(gate), w2, b2) + x

    weights = [w.detach() for w in (first.weight, first.bias, second.weight, second.bias)]
    truth = formula(x.double(), *(w.double() for w in weights))
    assert_within(PackedFeedForward(*weights).add_to(x.clone(), x), truth, formula(x, *weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_l2_normalize(dtype: torch.dtype) -> None:
    x = torch.randn(5, 40, dtype=dtype)
    x[1] = 0
    x[2] *= 1e-4
    out = l2_normalize(x)
    assert out.dtype == dtype
    assert not out[1].any()
    # in half types torch's own turns a row of zeros into NaN
    assert_within(
        out,
        F.normalize(x.double(), dim=-1),
        F.normalize(x.float(), dim=-1).to(dtype) if dtype.itemsize == 2 else F.normalize(x, dim=-1),
    )


def test_names_of_the_last_release_still_work_and_say_their_new_names() -> None:
    model = tiny_model()
    with pytest.warns(DeprecationWarning, match="is now EngineConfig"):
        from spear_fast.decoding import Plan
    with pytest.warns(DeprecationWarning, match="is now Request"):
        from spear_fast.decoding import Ticket
    assert Ticket is Request
    sizes = dict(beams=2, max_length=8, max_source=9)
    with pytest.warns(DeprecationWarning, match="EngineConfig.for_decoder"):
        old = Plan.of(model.decoder("text"), budget=10**9, **sizes)
    assert old == EngineConfig.for_decoder(model.decoder("text"), memory_budget=10**9, **sizes)
    with pytest.warns(DeprecationWarning, match="memory_budget"):
        engine = model.engine(budget=10**9, **sizes)
    with engine, pytest.warns(DeprecationWarning, match=r"Engine.config"):
        assert engine.plan == engine.config == old
    with pytest.raises(ImportError, match="Tickets"):
        from spear_fast.decoding import Tickets  # noqa: F401


@pytest.mark.parametrize("name", ["slots", "beams", "max_length", "max_source"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "4"])
def test_sizes_of_an_engine_are_whole_numbers(name: str, value) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got"):
        tiny_model().engine(**{name: value})
