"""`spear_fast.accelerate`: a live model of the reference made fast, and the packages that take one and call it."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import pkgutil
from collections.abc import Callable

import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintParamViolation
from beartype.typing import List, Optional, Union
from reference import (
    ByteTokenizer,
    build_reference,
    cut_after_eos,
    fake_speech_tokenizer,
    load_reference,
    pad_rows,
    random_ids,
)
from torch import Tensor, nn
from training_jobs import Rows

import spear_fast

TextToSemanticOfReference = load_reference().TextToSemantic
TO_TEXT = dict(source_type="speech", target_type="text")
TO_SPEECH = dict(source_type="text", target_type="speech")
VARIANTS = {
    "plain": {},
    "one kv head": dict(target_kv_heads=1),
    "early exit": dict(target_early_exit_layer=1, detach_early_exit_embed=True, target_depth=3),
    "guided": dict(cond_drop_prob=0.3),
    "odd": dict(dim=20, ff_mult=3, heads=3, dim_head=6, source_depth=3),
    "ratio that is no whole number": dict(dim=28, ff_mult=2.3),
    "no eos": dict(autoset_text_eos_id=False, autoset_semantic_eos_id=False),
    "other pads": dict(semantic_pad_id=-5, text_pad_id=3),
    "other regulariser": dict(
        align_reg_loss_weight=0.9, align_reg_use_logsumexp_pool=False, align_reg_logsumexp_pool_temp=0.7
    ),
    "dropout": dict(attn_dropout=0.3, ff_dropout=0.2),
    "flash": dict(attn_flash=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_model(variant: str) -> None:
    reference = build_reference(**VARIANTS[variant])
    fast = spear_fast.accelerate(reference)
    assert isinstance(fast, TextToSemanticOfReference)
    assert isinstance(fast, spear_fast.TextToSemantic)
    assert isinstance(fast, nn.Module)
    plain = build_reference(**{**VARIANTS[variant], "attn_flash": False})
    source, target = random_ids(2, 6, 17, lowest=4), random_ids(2, 5, 13, lowest=4)
    for kwargs in (
        dict(cond_drop_prob=0.0),
        dict(cond_drop_prob=0.0, return_loss=True),
        dict(cond_drop_prob=1.0, return_loss=True),
    ):
        torch.testing.assert_close(
            fast(source, target, **TO_TEXT, **kwargs), plain(source, target, **TO_TEXT, **kwargs), rtol=1e-4, atol=2e-5
        )
    for kwargs in (dict(temperature=0.0), dict(beam_search_decode=True)):
        found = fast.generate(source, max_length=8, **TO_TEXT, **kwargs)
        expected = plain.generate(source, max_length=8, **TO_TEXT, **kwargs)
        if VARIANTS[variant].get("autoset_text_eos_id") is not False:
            expected = cut_after_eos(expected, 13, plain.text_pad_id)
        assert found.tolist() == expected.tolist()
    for name in (
        "dim",
        "pad_id",
        "eos_id",
        "autoset_eos_id",
        "cond_drop_prob",
        "early_exit_layer",
        "target_has_early_exit",
        "align_reg_loss_weight",
        "align_reg_use_logsumexp_pool",
        "align_reg_logsumexp_pool_temp",
        "num_text_token_ids",
        "num_semantic_token_ids",
        "device",
    ):
        assert getattr(fast, name) == getattr(reference, name), name
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in reference.named_parameters()]


def test_every_parameter_is_the_same_object() -> None:
    reference = build_reference(target_early_exit_layer=1, wav2vec=fake_speech_tokenizer(17))
    fast = spear_fast.accelerate(reference)
    theirs = dict(reference.named_parameters(remove_duplicate=False))
    for name, parameter in fast.named_parameters(remove_duplicate=False):
        assert parameter is theirs[name], name
    assert fast.wav2vec is reference.wav2vec
    assert not any(tensor.is_meta for tensor in [*fast.parameters(), *fast.buffers()])


@pytest.mark.parametrize("who", ["reference", "fast"])
def test_a_training_step_on_either_side_shows_on_the_other(who: str) -> None:
    reference, untouched = build_reference(1), build_reference(1)
    fast = spear_fast.accelerate(reference)
    source, target = random_ids(3, 6, 17), random_ids(3, 5, 13)
    kwargs = dict(**TO_TEXT, max_length=8, temperature=0.0)
    before = fast.generate(source, **kwargs)
    trained = {"reference": reference, "fast": fast}[who]
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        trained(source, target, return_loss=True, **TO_TEXT).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
    expected = cut_after_eos(reference.generate(source, **kwargs), 13, 0)
    # packed weights from before the step would give the old tokens
    found = fast.generate(source, **kwargs)
    assert found.tolist() == expected.tolist() != before.tolist()
    assert (fast(source, target, **TO_TEXT) - untouched(source, target, **TO_TEXT)).abs().max() > 0.1
    torch.testing.assert_close(
        fast(source, target, **TO_TEXT), reference(source, target, **TO_TEXT), rtol=1e-4, atol=1e-4
    )


def test_moving_average_written_through_data_shows() -> None:
    # ema-pytorch and several optimizers write `.data`, which counts no version
    reference, other = build_reference(1), build_reference(2)
    fast = spear_fast.accelerate(reference)
    source, kwargs = random_ids(3, 6, 17), dict(**TO_TEXT, max_length=8, beam_search_decode=True)
    before = fast.generate(source, **kwargs)
    for average, parameter in zip(reference.parameters(), other.parameters(), strict=True):
        average.data.lerp_(parameter.data, 0.9)
    assert fast.generate(source, **kwargs).tolist() == reference.generate(source, **kwargs).tolist() != before.tolist()


def test_load_state_dict_on_either_side_shows_on_the_other() -> None:
    reference, other, third = build_reference(1), build_reference(2), build_reference(3)
    fast = spear_fast.accelerate(reference)
    source = random_ids(3, 6, 17)
    kwargs = dict(**TO_TEXT, max_length=8, beam_search_decode=True)
    fast.generate(source, **kwargs)
    reference.load_state_dict(other.state_dict())
    assert fast.generate(source, **kwargs).tolist() == other.generate(source, **kwargs).tolist()
    fast.load_state_dict(third.state_dict())
    assert reference.generate(source, **kwargs).tolist() == third.generate(source, **kwargs).tolist()
    assert fast.generate(source, **kwargs).tolist() == third.generate(source, **kwargs).tolist()


def test_state_dict_loads_into_both() -> None:
    reference = build_reference(1, wav2vec=fake_speech_tokenizer(17))
    fast = spear_fast.accelerate(reference)
    assert list(fast.state_dict()) == list(reference.state_dict())
    fresh = build_reference(2, wav2vec=fake_speech_tokenizer(17))
    fresh.load_state_dict(fast.state_dict(), strict=True)
    for name, value in reference.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_comes_along(training: bool) -> None:
    reference = build_reference(attn_dropout=0.5).train(training)
    fast = spear_fast.accelerate(reference)
    assert fast.training is training
    assert fast.target_transformer.training is training
    assert reference.training is training
    source, target = random_ids(2, 6, 17), random_ids(2, 5, 13)
    one, two = (fast(source, target, **TO_TEXT) for _ in range(2))
    assert torch.equal(one, two) is not training


def test_freezing_on_one_side_shows_on_the_other() -> None:
    reference = build_reference()
    fast = spear_fast.accelerate(reference)
    reference.freeze_decoder()
    assert not any(p.requires_grad for p in fast.target_transformer.parameters())
    fast.unfreeze_all()
    assert reference.target_transformer.final_norm.gamma.requires_grad


def test_sources_of_every_kind() -> None:
    reference = build_reference(
        4, wav2vec=fake_speech_tokenizer(17), num_text_token_ids=257, tokenizer_encode=ByteTokenizer().tokenize
    )
    fast = spear_fast.accelerate(reference)
    wave = torch.randn(2, 900, generator=torch.Generator().manual_seed(0))
    for source, types in (
        (wave, TO_TEXT),
        (["so", "it goes"], TO_SPEECH),
        (pad_rows(random_ids(2, 5, 257), [5, 2], 0), TO_SPEECH),
    ):
        kwargs = dict(**types, max_length=7, beam_search_decode=True, return_source=True)
        assert [value.tolist() for value in fast.generate(source, **kwargs)] == [
            value.tolist() for value in reference.generate(source, **kwargs)
        ]


def test_deepcopy_is_a_model_of_its_own() -> None:
    reference = build_reference()
    fast = spear_fast.accelerate(reference)
    source, target = random_ids(2, 6, 17), random_ids(2, 5, 13)
    expected, tokens = fast(source, target, **TO_TEXT), fast.generate(source, **TO_TEXT, max_length=6, temperature=0.0)
    copied = copy.deepcopy(fast)
    assert isinstance(copied, TextToSemanticOfReference)
    assert isinstance(copied, spear_fast.TextToSemantic)
    assert copied.to_logits["text"].weight is copied.token_emb["text"].weight
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(1.0)
    assert torch.equal(copied(source, target, **TO_TEXT), expected)
    assert torch.equal(copied.generate(source, **TO_TEXT, max_length=6, temperature=0.0), tokens)
    # an exponential moving average keeps such a copy
    with torch.no_grad():
        for average, parameter in zip(copied.parameters(), fast.parameters(), strict=True):
            average.lerp_(parameter, 0.5)
    assert not torch.equal(copied(source, target, **TO_TEXT), expected)


def test_pickling_gives_the_plain_fast_model() -> None:
    fast = spear_fast.accelerate(build_reference(wav2vec=None))
    source = random_ids(2, 6, 17)
    expected = fast.generate(source, **TO_TEXT, max_length=6, temperature=0.0)
    again = pickle.loads(pickle.dumps(fast))
    assert type(again) is spear_fast.TextToSemantic
    assert torch.equal(again.generate(source, **TO_TEXT, max_length=6, temperature=0.0), expected)
    assert again.to_logits["text"].weight is again.token_emb["text"].weight
    plain = pickle.loads(pickle.dumps(again))
    assert torch.equal(plain.generate(source, **TO_TEXT, max_length=6, temperature=0.0), expected)


def test_casting_casts_the_shared_weights() -> None:
    reference = build_reference(2)
    fast = spear_fast.accelerate(reference)
    source = random_ids(2, 6, 17)
    fast.generate(source, **TO_TEXT, max_length=5, temperature=0.0)
    truth = build_reference(2, dtype=torch.float64)
    fast.to(torch.float64)
    assert reference.start_token["text"].dtype == fast.start_token["text"].dtype == torch.float64
    kwargs = dict(**TO_TEXT, max_length=5, beam_search_decode=True)
    assert fast.generate(source, **kwargs).tolist() == truth.generate(source, **kwargs).tolist()
    assert fast.double() is fast


def test_accelerating_twice_is_once() -> None:
    fast = spear_fast.accelerate(build_reference())
    assert spear_fast.accelerate(fast) is fast
    ours = spear_fast.TextToSemantic(16, source_depth=1, target_depth=1, num_text_token_ids=3, num_semantic_token_ids=3)
    assert spear_fast.accelerate(ours) is ours


def test_saving_an_accelerated_model(tmp_path) -> None:
    fast = spear_fast.accelerate(build_reference(target_kv_heads=2))
    fast.save_pretrained(tmp_path)
    again = spear_fast.TextToSemantic.from_pretrained(tmp_path)
    for name, value in fast.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize(
    "wrong",
    [nn.Linear(2, 2), None, "model", nn.Transformer(8, 2, 1, 1, 8)],
    ids=["layer", "none", "text", "transformer"],
)
def test_anything_else_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="TextToSemantic") as caught:
        spear_fast.accelerate(wrong)
    assert "\n" not in str(caught.value)
    assert type(wrong).__name__ in str(caught.value)


def test_nothing_keeps_a_dropped_model_alive() -> None:
    import weakref

    fast = spear_fast.accelerate(build_reference())
    fast.generate(random_ids(1, 4, 17), **TO_TEXT, max_length=3)
    alive = weakref.ref(fast)
    del fast
    gc.collect()
    assert alive() is None


class SoundStormOf(nn.Module):
    """Calls a text-to-semantic model the way soundstorm-pytorch does."""

    @beartype
    def __init__(self, *, spear_tts_text_to_semantic: Optional[TextToSemanticOfReference] = None) -> None:
        super().__init__()
        model = spear_tts_text_to_semantic
        self.text_to_semantic = model
        assert model.wav2vec is not None or model.num_semantic_token_ids
        self.semantic_token_emb = model.semantic_token_emb
        self.num_semantic_token_ids = model.num_semantic_token_ids
        self.semantic_cond_to_model_dim = nn.Linear(model.dim, 24)
        self.semantic_pad_id = model.pad_id.get("speech")
        if model.autoset_eos_id["speech"]:
            self.num_semantic_token_ids += 1

    @beartype
    @torch.no_grad()
    def generate(
        self, texts: Union[List[str], Tensor], *, spec_decode: bool = False, spec_decode_gamma: int = 5, **kwargs
    ) -> tuple:
        if isinstance(texts, list):
            assert self.text_to_semantic.tokenizer_encode is not None
            texts = self.text_to_semantic.tokenizer_encode(texts)
        ids = self.text_to_semantic.generate(
            texts,
            source_type="text",
            target_type="speech",
            spec_decode=spec_decode,
            spec_decode_gamma=spec_decode_gamma,
            **kwargs,
        )
        mask = ids != self.semantic_pad_id
        condition = self.semantic_token_emb(ids.masked_fill(~mask, 0)) * mask[..., None]
        return ids, self.semantic_cond_to_model_dim(condition)


class VoiceBoxOf(nn.Module):
    """Calls a text-to-semantic model the way voicebox-pytorch does."""

    @beartype
    def __init__(self, text_to_semantic: Optional[TextToSemanticOfReference] = None) -> None:
        super().__init__()
        self.text_to_semantic = text_to_semantic
        assert text_to_semantic.wav2vec is not None, "the model must contain a wav2vec"
        self.dim_cond_emb = text_to_semantic.dim

    @beartype
    @torch.no_grad()
    def sample(
        self, texts: Union[List[str], Tensor], spec_decode: bool = False, max_length: int = 12, **kwargs
    ) -> tuple:
        return self.text_to_semantic.generate(
            source=texts,
            source_type="text",
            target_type="speech",
            max_length=max_length,
            return_target_mask=True,
            spec_decode=spec_decode,
            **kwargs,
        )


@pytest.fixture(scope="module")
def pair():
    kwargs = dict(
        wav2vec=fake_speech_tokenizer(17),
        num_text_token_ids=257,
        tokenizer_encode=ByteTokenizer().tokenize,
        target_early_exit_layer=1,
    )
    return build_reference(4, **kwargs), spear_fast.accelerate(build_reference(4, **kwargs))


def test_soundstorm(pair) -> None:
    reference, fast = (SoundStormOf(spear_tts_text_to_semantic=model) for model in pair)
    assert fast.num_semantic_token_ids == reference.num_semantic_token_ids == 18
    fast.semantic_cond_to_model_dim = reference.semantic_cond_to_model_dim
    texts, kwargs = ["so", "it goes"], dict(filter_fn_kwargs=dict(k=1), max_length=9)
    # rows that end together or not at all: the reference leaves tokens after an EOS
    expected = cut_after_eos(reference.generate(texts, **kwargs)[0], 17, -1)
    found, condition = fast.generate(texts, **kwargs)
    assert found.tolist() == expected.tolist()
    assert condition.shape == (*found.shape, 24)
    assert torch.isfinite(condition).all()
    drafted, _ = fast.generate(texts, spec_decode=True, spec_decode_gamma=3, **kwargs)
    assert drafted.tolist() == expected.tolist()
    # the model is a submodule there: its parameters appear, move and are saved with the whole
    assert any(name.startswith("text_to_semantic.") for name in fast.state_dict())


def test_voicebox(pair) -> None:
    reference, fast = (VoiceBoxOf(model) for model in pair)
    for kwargs in (dict(temperature=0.0), dict(beam_search_decode=True, beam_size=2)):
        tokens, mask = fast.sample(["so", "it goes"], **kwargs)
        expected = cut_after_eos(reference.sample(["so", "it goes"], **kwargs)[0], 17, -1)
        assert tokens.tolist() == expected.tolist()
        assert mask.tolist() == (expected != -1).tolist()
    tokens, mask = fast.sample(["so"], spec_decode=True)
    assert mask.dtype == torch.bool
    assert tokens.shape == mask.shape


def test_callers_that_check_types_refuse_our_plain_class() -> None:
    # why accelerate makes a class of both: theirs check for the reference's own
    ours = spear_fast.TextToSemantic(16, source_depth=1, target_depth=1, num_text_token_ids=3, num_semantic_token_ids=3)
    with pytest.raises(BeartypeCallHintParamViolation):
        VoiceBoxOf(ours)


def test_the_reference_s_own_wrappers_and_generator_take_it(pair, tmp_path) -> None:
    package = load_reference()
    reference, fast = build_reference(5), spear_fast.accelerate(build_reference(5))
    text, speech = random_ids(3, 5, 13), random_ids(3, 8, 17)
    for name, arguments in (("SemanticToTextWrapper", (speech, text)), ("SpeechSpeechPretrainWrapper", (speech,))):
        results = []
        for model in (reference, fast):
            torch.manual_seed(1)
            results.append(getattr(package, name)(model)(*arguments))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    waves = Rows(torch.randn(800, generator=torch.Generator().manual_seed(i)) for i in range(3))
    rows = {}
    for name, model in zip(("reference", "fast"), pair, strict=True):
        generator = package.SemanticToTextDatasetGenerator(
            model, dataset=waves, folder=str(tmp_path / name), batch_size=3
        )
        generator(max_length=6, beam_size=2)
        rows[name] = [torch.load(path).tolist() for path in sorted((tmp_path / name).iterdir())]
    assert rows["fast"] == rows["reference"]
    assert len(rows["fast"]) == 3


def test_annotation_of_callables() -> None:
    # callers read the functions off the model too
    fast = spear_fast.accelerate(build_reference(num_text_token_ids=257, tokenizer_encode=ByteTokenizer().tokenize))

    @beartype
    def takes(encode: Callable) -> Tensor:
        return encode(["a"])

    assert takes(fast.tokenizer_encode).tolist() == [[98]]


def test_no_module_takes_the_name_of_a_public_function() -> None:
    # importing a submodule sets its name in the package: a function of that name would be lost
    modules = {module.name for module in pkgutil.iter_modules(spear_fast.__path__)}
    assert not modules & set(spear_fast.__all__)
    importlib.import_module("spear_fast.checkpoints.accelerate")
    assert callable(spear_fast.accelerate)
