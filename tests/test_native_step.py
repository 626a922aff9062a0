"""The CPU's packed matmuls and its whole step in C++: the same numbers as the ops one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine_models import requests_of
from plain_decoding import build_memory, build_model
from tolerance import assert_within
from torch import Tensor

from spear_fast import DecodingOptions, ops
from spear_fast.decoding import Decoder, decode, methods
from spear_fast.decoding import step as stepping
from spear_fast.decoding.packed.linear import packs
from spear_fast.decoding.runner import Runner
from spear_fast.ops import extension, providers

pytestmark = pytest.mark.skipif(
    not packs(torch.zeros(1)), reason=extension.missing() or "the extension was built without vectors"
)

# panels of unequal widths, a depth in two parts, rows in several groups, nothing
SIZES = [(1, 8, 8), (3, 32, 21), (33, 17, 5), (200, 64, 48), (7, 344, 512), (19, 1365, 70), (390, 24, 260), (0, 16, 4)]


def packed(weight: Tensor, bias: Tensor | None, kind: str):
    return torch.classes.spear_fast.PackedLinear(weight, bias, kind)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_matmuls(rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias, to = (
        torch.randn(shape) for shape in ((rows, 2 * inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    # every second column belongs to somebody else
    for given in (x[:, :inputs], x[:, ::2]):
        for b in (None, bias):
            linear = packed(weight, b, "float32")
            exact = F.linear(given.double(), weight.double(), None if b is None else b.double())
            plain = F.linear(given, weight, b)
            assert_within(linear.forward(given), exact, plain)
            assert_within(linear.added(given, to.clone()), exact + to.double(), plain + to)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_int8_is_the_rounded_matmul(rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias, to = (
        torch.randn(shape) for shape in ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    )
    weight[0] = 0
    if rows > 1:
        x[1] = 0
    linear = packed(weight, bias, "int8")
    assert linear.kind() == "int8"
    # filled up to whole vectors and to four numbers in the depth
    assert weight.numel() <= linear.bytes() < (outputs + 16) * (inputs + 4)

    def rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
        unit = matrix.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
        # in float32, as it is done there: halves are then the same ones
        return (matrix * (1 / unit)).add(128.5).floor().sub(128).double(), unit.double()

    (whole, unit), (whole_weight, weight_unit) = rounded(x), rounded(weight)
    whole_weight = (weight / weight_unit.float()).round().double()
    exact = (whole @ whole_weight.T) * unit * weight_unit.T + bias.double()
    # a rounding may fall to the other side: one unit of x times one weight
    slack = 1e-5 + float((unit.amax() if rows else torch.zeros(())) * weight.abs().amax())
    for result, wanted in ((linear.forward(x), exact), (linear.added(x, to.clone()), exact + to.double())):
        assert result.shape == wanted.shape
        assert not rows or (result.double() - wanted).abs().max() <= slack
        close = torch.isclose(result.double(), wanted, rtol=1e-5, atol=1e-5)
        assert not rows or close.float().mean() > 0.98
    if rows:
        full = F.linear(x.double(), weight.double(), bias.double())
        assert (linear.forward(x) - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_row_depends_on_no_other_row_nor_on_how_many_there_are(kind: str) -> None:
    linear, x = packed(torch.randn(70, 1365), torch.randn(70), kind), torch.randn(203, 1365)
    to = torch.randn(203, 70)
    whole, whole_added = linear.forward(x), linear.added(x, to.clone())
    for count in (1, 2, 5, 8, 9, 17, 100):
        for start in (0, 3, 203 - count):
            some = slice(start, start + count)
            assert torch.equal(linear.forward(x[some]), whole[some])
            assert torch.equal(linear.added(x[some], to[some].clone()), whole_added[some])
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert torch.equal(linear.forward(x), whole)
    finally:
        torch.set_num_threads(threads)


def test_int8_of_a_row_depends_on_no_other_row_and_says_what_is_no_number() -> None:
    weight, x = torch.randn(24, 40), torch.randn(6, 40)
    linear = packed(weight, None, "int8")
    together = linear.forward(x)
    louder = x.clone()
    louder[1:] *= 1000
    louder[2, 5] = torch.nan
    louder[3, 39] = torch.inf
    out = linear.forward(louder)
    torch.testing.assert_close(out[0], together[0], rtol=0, atol=0)
    assert out[2:4].isnan().all()
    assert out[4:].isfinite().all()


def test_wrong_arguments_are_refused() -> None:
    linear = packed(torch.randn(4, 8), None, "float32")
    for wrong in (torch.randn(3, 7), torch.randn(8), torch.randn(3, 8).double()):
        with pytest.raises(ValueError, match=r"x must be float32 \[rows, 8\]"):
            linear.forward(wrong)
    with pytest.raises(ValueError, match="added to must be dense"):
        linear.added(torch.randn(3, 8), torch.randn(3, 5))
    with pytest.raises(ValueError, match="kind must be"):
        packed(torch.randn(4, 8), None, "int4")
    with pytest.raises(ValueError, match=r"weight must be float32 \[outputs, features\]"):
        packed(torch.randn(4, 8).double(), None, "float32")


def provider_of(decoder: Decoder) -> str:
    options = decoder.fused is not None, True, False
    query = providers.ProviderQuery(decoder.device, decoder.dtype, decoder.head_dim, options)
    function = providers.choose("decode_step", query)
    return next(
        name for name in providers.names("decode_step") if providers.get("decode_step", name).function is function
    )


def decoders(guided: bool, weights: str = "exact"):
    model = build_model(2, dtype=torch.float32, heads=4, target_kv_heads=2)
    memory, mask = build_memory(model, 7)
    arguments = (model.target_transformer, model.token_emb["text"].weight, model.start_token["text"])
    decoder = Decoder.from_modules(*arguments, eos_id=model.eos_id["text"], pad_id=0, weights=weights)
    return model, decoder, memory, mask


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_step_is_that_of_the_ops(guided: bool, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, decoder, memory, mask = decoders(guided)
    options = DecodingOptions(beam_size=beams, max_length=9, cond_scale=1.5 if guided else 1.0)
    fused, calls, compared = stepping.decode_step, [], []

    def both(decoder: Decoder, view) -> Tensor:
        calls.append(1)
        before = [[buffer.clone() for buffer in buffers] for buffers in (view.keys, view.values)]
        by_fused = fused(decoder, view)
        after = [[buffer.clone() for buffer in buffers] for buffers in (view.keys, view.values)]
        for buffers, old in zip((view.keys, view.values), before, strict=True):
            for buffer, kept in zip(buffers, old, strict=True):
                buffer.copy_(kept)
        with ops.forced("decode_self_attention=reference"):
            assert provider_of(decoder) == "layered"
            by_ops = fused(decoder, view)
        compared.append((by_fused, by_ops))
        lengths = view.lengths.flatten()
        for ours, buffers in zip(after, (view.keys, view.values), strict=True):
            for mine, theirs in zip(ours, buffers, strict=True):
                rows = torch.arange(len(lengths))
                torch.testing.assert_close(mine[rows, :, lengths], theirs[rows, :, lengths], rtol=1e-4, atol=1e-5)
        return by_fused

    assert decoder.fused is not None
    assert provider_of(decoder) == "cpu-fused"
    monkeypatch.setattr(methods, "decode_step", both)
    decode(decoder, memory, mask, options)
    assert len(calls) > 3
    for mine, theirs in compared:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_another_provider_that_is_asked_for_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _, decoder, memory, mask = decoders(False)
    made = []
    embed = stepping.embed
    monkeypatch.setattr(stepping, "embed", lambda *arguments: made.append(1) or embed(*arguments))
    options = DecodingOptions(beam_size=2, max_length=4)
    decode(decoder, memory, mask, options)
    assert not made
    with ops.forced("append_kv=reference"):
        decode(decoder, memory, mask, options)
    assert made


def test_a_step_beyond_its_vocabulary_is_refused() -> None:
    _, decoder, memory, _ = decoders(False)
    runner = Runner(decoder, slots=1, beams=1, positions=4, max_source=memory.shape[1])
    runner.admit(requests_of([memory[0]], [DecodingOptions(beam_size=1, max_length=3)]))
    view = runner.view()
    view.inputs.fill_(decoder.vocab_size + 1)
    with pytest.raises(ValueError, match="inputs must lie in"):
        stepping.decode_step(decoder, view)


def test_int8_weights_decode_nearly_the_same() -> None:
    _, exact, memory, mask = decoders(False)
    _, rounded, _, _ = decoders(False, "int8")
    options = DecodingOptions(method="greedy", max_length=12)
    ours, theirs = (decode(each, memory, mask, options) for each in (rounded, exact))
    assert ours.tokens.shape[0] == theirs.tokens.shape[0]
    same = ours.tokens[:, 0, 0] == theirs.tokens[:, 0, 0]
    assert same.float().mean() > 0.5
    torch.testing.assert_close(
        ours.token_logprobs[same][:, 0, 0], theirs.token_logprobs[same][:, 0, 0], rtol=0.05, atol=0.1
    )


def test_a_build_without_vectors_leaves_the_matmuls_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {**extension.facts(), "capability": "DEFAULT", "machine": "x86_64"}
    monkeypatch.setattr(extension, "facts", lambda: built)
    _, decoder, memory, mask = decoders(False)
    assert decoder.fused is None
    assert not decoder.batch_invariant
    assert decode(decoder, memory, mask, DecodingOptions(beam_size=2, max_length=3)).tokens.numel()
    with pytest.raises(ValueError, match=r"built for AVX2 or AVX512, got .* an extension built for DEFAULT"):
        decoders(False, "int8")
    built["machine"] = "aarch64"
    assert decoders(False)[1].fused is not None


def test_int8_weights_are_refused_where_they_cannot_be() -> None:
    model, _, _, _ = decoders(False)
    arguments = (model.double().target_transformer, model.token_emb["text"].weight, model.start_token["text"])
    with pytest.raises(ValueError, match="needs a float32 model on a CPU"):
        Decoder.from_modules(*arguments, eos_id=None, pad_id=0, weights="int8")
    with pytest.raises(ValueError, match="weights must be 'exact' or 'int8'"):
        Decoder.from_modules(*arguments, eos_id=None, pad_id=0, weights="int4")
