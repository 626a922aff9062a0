"""`generate` and `decode` are clients of the engine: packed weights, no padding, sources encoded once or not at all."""

from __future__ import annotations

import pytest
import torch
from engine_models import alone, engine_of, sources, tiny_model
from test_engine import options_of, same

from spear_fast import DecodingOptions
from spear_fast.decoding import Encoder, Engine, EngineConfig, decode, runner, scheduler
from spear_fast.decoding import padded as padded_batches
from spear_fast.transformer import Transformer

HOW = {
    "greedy": dict(temperature=0.0),
    "drawn": dict(),
    "standard": dict(beam_search_decode=True, beam_mode="standard"),
    "reference": dict(beam_search_decode=True),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def generated(model, ids, how: str, **changes):
    common = dict(source_type="speech", target_type="text", max_length=10, return_result=True)
    return model.generate(ids, **{**common, **HOW[how], **changes, "generator": torch.Generator().manual_seed(1)})


def decoded(model, ids, how: str, mask=None):
    """What `decode` makes of the memory that the modules give, padding and all."""
    with torch.no_grad():
        memory, mask, _ = model.encode(ids, source_type="speech", source_mask=mask)
    method = {"greedy": "greedy", "drawn": "sample"}.get(how, "beam")
    own = dict(beam_mode=how) if method == "beam" else {}
    if how == "drawn":
        from spear_fast.filters import top_k

        own = dict(filter_logits=top_k, generator=torch.Generator().manual_seed(1))
    return model.decode(memory, mask, target_type="text", options=DecodingOptions(method=method, max_length=10, **own))


@pytest.mark.parametrize("how", HOW)
def test_prefixes_are_encoded_packed_and_the_rest_by_the_modules(model, how, monkeypatch):
    rows = sources(6, seed=3)
    ids = padded(rows)
    expected = decoded(model, ids, how)
    encoded, through = [], []
    encode = Encoder.__call__
    monkeypatch.setattr(
        Encoder, "__call__", lambda self, ids, lengths: encoded.append(lengths) or encode(self, ids, lengths)
    )
    forward = Transformer.forward

    def watched(self, x, *arguments, **others):
        if self is model.source_transformer:
            through.append(x.shape[0])
        return forward(self, x, *arguments, **others)

    monkeypatch.setattr(Transformer, "forward", watched)
    same(generated(model, ids, how), expected)
    assert not through
    # every id and end of sequence once, no pad
    assert sum(int(lengths.sum()) for lengths in encoded) == sum(len(row) + 1 for row in rows)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    mask[2, 0] = mask[4, 0] = False
    expected = decoded(model, ids, how, mask)
    through.clear()
    same(generated(model, ids, how, source_mask=mask), expected)
    assert through == [2]


class Adapter(torch.nn.Module):
    """Something in a linear's place, with the weights of the linear and more."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.weight = linear.weight

    def forward(self, x):
        return self.linear(x) - 0.3 * x[..., : self.linear.out_features]


@pytest.mark.parametrize("how", HOW)
def test_modules_that_were_replaced_or_are_watched_encode_by_themselves(how):
    model, ids = tiny_model(), padded(sources(5, seed=8))
    attention = model.source_transformer.layers[0][0]
    attention.to_q[0] = Adapter(attention.to_q[0])
    changed = generated(model, ids, how)
    same(changed, decoded(model, ids, how))
    attention.to_q[0] = attention.to_q[0].linear
    assert not torch.equal(generated(model, ids, how).scores, changed.scores)
    seen = []
    hook = attention.to_out.register_forward_hook(lambda *given: seen.append(1))
    generated(model, ids, how)
    hook.remove()
    assert seen == [1]


def test_what_packed_weights_would_leave_out_is_refused():
    """Decoding reads the target's weights, an engine the source's too: adapters and hooks would do nothing, unsaid."""
    model, ids = tiny_model(), padded(sources(2, seed=8))
    for side in ("source", "target"):
        attention = getattr(model, f"{side}_transformer").layers[0][0]
        attention.to_q[0] = Adapter(attention.to_q[0])
        with pytest.raises(ValueError, match=rf"{side}_transformer layers.0.0.to_q.0 is a Adapter, which .* merge"):
            model.engine()
        if side == "target":
            with pytest.raises(ValueError, match="merge_and_unload"):
                generated(model, ids, "greedy")
        attention.to_q[0] = attention.to_q[0].linear
        hook = attention.to_out.register_forward_hook(lambda *given: None)
        with pytest.raises(ValueError, match=rf"{side}_transformer layers.0.0.to_out has a forward hook"):
            model.engine()
        hook.remove()
        model.engine().close()


@pytest.mark.parametrize("how", HOW)
def test_many_ids_are_encoded_in_groups(model, how, monkeypatch):
    ids = padded(sources(9, seed=4))
    whole, groups = generated(model, ids, how), []
    encode = Encoder.__call__
    monkeypatch.setattr(
        Encoder, "__call__", lambda self, ids, lengths: groups.append(len(ids)) or encode(self, ids, lengths)
    )
    monkeypatch.setattr(scheduler, "tokens_together", lambda device: 40)
    same(generated(model, ids, how), whole)
    if how == "reference":
        assert len(groups) > 2
        assert max(groups) <= 40


@pytest.mark.parametrize("how", HOW)
def test_results_of_generate_can_be_written_to(model, how):
    result = generated(model, padded(sources(3)), how)
    result.tokens[0] = 0
    assert not result.scores.is_inference()


def test_out_of_memory_generate_goes_on_with_fewer_rows_at_a_time(model, monkeypatch):
    ids = padded(sources(9, seed=5))
    whole, real_step = generated(model, ids, "standard"), runner.step

    def failing(decoder, view, mix):
        if view.batch > 2:
            raise torch.OutOfMemoryError("no memory")
        return real_step(decoder, view, mix)

    monkeypatch.setattr(runner, "step", failing)
    same(generated(model, ids, "standard"), whole)


def test_ids_and_memories_share_an_engine(model):
    asked, expected = [], []
    for i, source in enumerate(sources(24, seed=6)):
        with torch.no_grad():
            memory = model.source_transformer(model.token_emb["speech"](source)[None])[0]
        # without any position a memory is the unconditional branch
        memory = memory[:0] if i % 6 == 5 else memory
        asked.append((memory if i % 3 == 2 else source, options_of(i)))
        mask = torch.ones(1, len(memory), dtype=torch.bool)
        expected.append(model.decode(memory[None], mask, target_type="text", options=options_of(i)))
    with engine_of(model, slots=4, beams=4, max_length=12) as engine:
        for request in engine.run(asked):
            same(request.result(), expected[request.number])


def test_a_memory_is_kept_when_memory_runs_out(model, monkeypatch):
    real_step, (source,) = runner.step, sources(1, seed=7)
    with torch.no_grad():
        memory = model.source_transformer(model.token_emb["speech"](source)[None])[0]
    calls = []

    def failing(decoder, view, mix):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return real_step(decoder, view, mix)

    options = DecodingOptions(beam_size=2, max_length=8)
    expected = alone(model, source, options)
    monkeypatch.setattr(runner, "step", failing)
    config = EngineConfig.for_decoder(model.decoder("text"), slots=2, beams=2, max_length=8, max_source=30)
    with Engine(None, model.decoder("text"), config) as engine:
        same(engine.submit(memory, options).result(), expected)
        assert engine.config.slots == 1


def test_wrong_memories_are_refused(model):
    config = EngineConfig.for_decoder(model.decoder("text"), slots=2, beams=4, max_length=8, max_source=30)
    options = DecodingOptions(max_length=8)
    with Engine(None, model.decoder("text"), config) as engine:
        for source, said in (
            (torch.randn(4, 31), r"a memory must be \[n, 32\] on cpu, got \[4, 31\] on cpu"),
            (torch.randn(31, 32), "a memory may have up to 30 positions"),
            (torch.randn(4), r"integer ids \[n\], or a memory \[n, dim\]"),
            (torch.tensor([1, 2]), "ids need an engine with an encoder"),
        ):
            with pytest.raises(ValueError, match=said):
                engine.submit(source, options).result()


def test_a_config_for_a_batch_has_a_slot_for_each(model, monkeypatch):
    from spear_fast.decoding import config

    sizes = dict(beams=4, max_length=12, max_source=30)
    decoder = model.decoder("text")
    assert EngineConfig.for_batch(decoder, 3000, **sizes).slots == 3000
    each = EngineConfig.for_batch(decoder, 1, **sizes).slot_bytes
    for room, slots in ((3 * each, 3), (each - 1, 1)):
        monkeypatch.setattr(config, "free_bytes", lambda device, room=room: room)
        assert EngineConfig.for_batch(decoder, 8, **sizes).slots == slots


def test_decode_serves_each_row_as_alone(model):
    memory = torch.randn(5, 9, 32)
    mask = torch.rand(5, 9) < 0.6
    mask[1] = False
    options = DecodingOptions(beam_size=3, max_length=10, num_return_sequences=2)
    together = decode(model.decoder("text"), memory, mask, options)
    for row in range(5):
        own = memory[row, mask[row]][None]
        one = decode(model.decoder("text"), own, torch.ones(own.shape[:2], dtype=torch.bool), options)
        width = one.tokens.shape[-1]
        assert one.tokens.tolist() == together.tokens[row : row + 1, :, :width].tolist()
        torch.testing.assert_close(one.scores, together.scores[row : row + 1], rtol=1e-4, atol=1e-4)


def test_a_second_call_reuses_the_engine_where_it_fits(model, monkeypatch):
    """On CUDA, where it keeps what it has captured; not for another encoder, other beams, or a much larger batch."""
    made = []
    make = padded_batches.Engine
    monkeypatch.setattr(padded_batches, "Engine", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    monkeypatch.setattr(padded_batches, "keeps_engine", lambda decoder, config: True)
    rows = padded(sources(6, seed=9))
    wanted = [generated(model, rows, how) for how in ("greedy", "standard", "reference")]
    fresh = len(made)
    # greedy has one beam, the searches have as many each
    assert fresh == 2
    for how, expected in zip(("standard", "reference"), wanted[1:], strict=True):
        same(generated(model, rows, how), expected)
        same(generated(model, rows[:3], how, max_length=5), generated(model, rows[:3], how, max_length=5))
    assert len(made) == fresh
    same(generated(model, rows, "greedy"), wanted[0])
    assert len(made) == fresh + 1
    assert made[fresh - 1]._closed
    generated(model, padded(sources(7, seed=9)), "greedy")
    assert len(made) == fresh + 2
    with torch.no_grad():
        model.token_emb["text"].weight.mul_(1.5)
    changed = generated(model, rows, "greedy")
    assert len(made) == fresh + 3
    monkeypatch.undo()
    same(generated(model, rows, "greedy"), changed)
    assert model.decoder("text").idle_engine is None
    with torch.no_grad():
        model.token_emb["text"].weight.div_(1.5)


def test_an_engine_that_a_call_left_in_an_error_is_not_used_again(model, monkeypatch):
    monkeypatch.setattr(padded_batches, "keeps_engine", lambda decoder, config: True)
    ids = padded(sources(3, seed=9))
    generated(model, ids, "greedy")

    def failing(decoder, view, mix):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as broken:
        broken.setattr(runner, "step", failing)
        with pytest.raises(RuntimeError, match="the device is gone"):
            generated(model, ids, "greedy")
    assert model.decoder("text").idle_engine is None
    assert generated(model, ids, "greedy").tokens.numel()


def test_engines_are_kept_on_cuda_if_they_are_small(model, monkeypatch):
    class Properties:
        total_memory = 1000

    class OnCuda:
        device = torch.device("cuda:0")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    sizes = EngineConfig(slots=1, beams=1, max_length=1, max_source=1, slot_bytes=100)
    assert padded_batches.keeps_engine(OnCuda, sizes)
    assert not padded_batches.keeps_engine(OnCuda, EngineConfig(2, 1, 1, 1, 100))
    assert not padded_batches.keeps_engine(model.decoder("text"), sizes)


@pytest.mark.parametrize("how", [*HOW, "aligned"])
def test_torchs_default_device_does_not_matter(how):
    """As after `torch.set_default_device("cuda")` with a model on the CPU: everything says where it belongs."""
    changes = (
        {"how": "standard", "return_alignment": True, "coverage_penalty": 0.5} if how == "aligned" else {"how": how}
    )
    ids = padded(sources(4, seed=10))
    wanted = generated(tiny_model(), ids, **changes)
    model, generator = tiny_model(), torch.Generator().manual_seed(1)
    assert generator.device.type == "cpu"
    with torch.device("meta"):
        how_asked = {**HOW[changes.pop("how")], **changes, "generator": generator}
        found = model.generate(
            ids, source_type="speech", target_type="text", max_length=10, return_result=True, **how_asked
        )
    same(found, wanted)
