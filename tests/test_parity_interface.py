"""Names: signatures, attributes, parameters and freezing of ours against the reference's own."""

from __future__ import annotations

import inspect

import pytest
import torch
from reference import SMALL, build_pair, build_reference, fake_speech_tokenizer, load_reference, random_ids

import spear_fast

VARIANTS = {
    "plain": {},
    "one kv head": dict(target_kv_heads=1),
    "two kv heads": dict(target_kv_heads=2),
    "no eos": dict(autoset_semantic_eos_id=False, autoset_text_eos_id=False),
    "text eos only": dict(autoset_semantic_eos_id=False),
    "early exit": dict(target_early_exit_layer=1),
    "odd sizes": dict(dim=24, dim_head=10, heads=3, ff_mult=5, source_depth=1, target_depth=3),
    "guided": dict(cond_drop_prob=0.25),
    "flash": dict(attn_flash=True),
}


def undecorated(function):
    """The function under beartype, `torch.no_grad` and the reference's eval decorator, which hides the signature."""
    while True:
        if hasattr(function, "__wrapped__"):
            function = function.__wrapped__
            continue
        inner = [cell.cell_contents for cell in function.__closure__ or () if inspect.isfunction(cell.cell_contents)]
        if not inner or list(inspect.signature(function).parameters) != ["self", "args", "kwargs"]:
            return function
        function = inner[0]


def described(parameter: inspect.Parameter) -> tuple:
    default = parameter.default
    return (
        parameter.name,
        parameter.kind,
        default.__name__ if callable(default) and default is not inspect.Parameter.empty else default,
    )


METHODS = {
    "TextToSemantic": [
        "__init__",
        "forward",
        "generate",
        "load",
        "unfreeze_all",
        "freeze_encoder",
        "freeze_encoder_below_layer",
        "freeze_decoder",
        "freeze_speech_emb",
        "freeze_text_emb",
    ],
    "SpeechSpeechPretrainWrapper": ["__init__", "forward"],
    "SemanticToTextWrapper": ["__init__", "forward"],
    "TextToSemanticWrapper": ["__init__", "forward"],
}


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in METHODS.items() for name in names])
def test_signature_begins_with_the_reference_s(owner: str, name: str) -> None:
    theirs = list(inspect.signature(undecorated(getattr(getattr(load_reference(), owner), name))).parameters.values())
    ours = list(inspect.signature(undecorated(getattr(getattr(spear_fast, owner), name))).parameters.values())
    assert [described(p) for p in ours[: len(theirs)]] == [described(p) for p in theirs]
    for extra in ours[len(theirs) :]:
        assert extra.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD), extra
        assert extra.kind is inspect.Parameter.VAR_KEYWORD or extra.default is not inspect.Parameter.empty, extra


def plain_attributes(model: torch.nn.Module) -> dict:
    """The public attributes that the reference's constructor sets, with modules and functions by kind only."""
    values = {key: value for key, value in vars(model).items() if not key.startswith("_") and key != "training"}
    values.update({name: type(module).__name__ for name, module in model.named_children()})
    return values


@pytest.mark.parametrize("variant", VARIANTS)
def test_attributes(variant: str) -> None:
    reference, ours = build_pair(**VARIANTS[variant])
    for name, value in plain_attributes(reference).items():
        assert hasattr(ours, name), f"the attribute {name} is missing"
        if name not in dict(reference.named_children()):
            assert getattr(ours, name) == value, name
    assert ours.device == reference.device
    assert ours.to_logits["speech"].weight is ours.token_emb["speech"].weight is ours.semantic_token_emb.weight
    assert ours.to_logits["text"].weight is ours.token_emb["text"].weight


def test_attributes_with_functions_and_audio() -> None:
    encode, audio = lambda texts: torch.zeros(len(texts), 1).long(), fake_speech_tokenizer(11)
    reference, ours = build_pair(tokenizer_encode=encode, wav2vec=audio)
    assert ours.tokenizer_encode is encode
    assert ours.wav2vec is audio
    assert ours.num_semantic_token_ids == reference.num_semantic_token_ids == 11
    assert ours.eos_id == reference.eos_id == {"speech": 11, "text": 13}
    assert not any(parameter.requires_grad for parameter in ours.wav2vec.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_goes_both_ways(variant: str) -> None:
    reference, ours = build_pair(**VARIANTS[variant])
    theirs_state, ours_state = reference.state_dict(), ours.state_dict()
    assert list(ours_state) == list(theirs_state)
    assert {k: (v.shape, v.dtype) for k, v in ours_state.items()} == {
        k: (v.shape, v.dtype) for k, v in theirs_state.items()
    }
    for name, value in theirs_state.items():
        assert torch.equal(ours_state[name], value), name
    fresh = spear_fast.TextToSemantic(**{**SMALL, **VARIANTS[variant]})
    with torch.no_grad():
        for index, parameter in enumerate(fresh.parameters()):
            parameter.copy_(parameter + 0.01 * index)
    reference.load_state_dict(fresh.state_dict(), strict=True)
    for name, value in fresh.state_dict().items():
        assert torch.equal(reference.state_dict()[name], value), name


def test_state_dict_with_audio_tokenizer() -> None:
    reference, ours = build_pair(wav2vec=fake_speech_tokenizer(17))
    assert list(ours.state_dict()) == list(reference.state_dict())
    assert {"wav2vec.projection", "wav2vec.centres"} <= set(ours.state_dict())


@pytest.mark.parametrize("variant", ["plain", "early exit", "one kv head"])
def test_parameters_have_the_reference_s_names_order_and_training_flags(variant: str) -> None:
    reference, ours = build_pair(**VARIANTS[variant])
    assert [(n, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.requires_grad) for n, p in reference.named_parameters()
    ]


def test_fresh_weights_are_drawn_like_the_reference_s() -> None:
    sizes = dict(SMALL, dim=64, target_early_exit_layer=1)
    torch.manual_seed(0)
    theirs = load_reference().TextToSemantic(**sizes)
    torch.manual_seed(0)
    ours = spear_fast.TextToSemantic(**sizes)
    for (name, ours_value), theirs_value in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if theirs_value.numel() == 1 or theirs_value.std() == 0:
            assert torch.equal(ours_value, theirs_value), name
            continue
        spread = 4 / theirs_value.numel() ** 0.5
        assert abs(ours_value.std() / theirs_value.std() - 1) < spread, name
        assert abs(ours_value.mean() - theirs_value.mean()) < 2 * spread * theirs_value.std(), name


FREEZING = [
    ("freeze_encoder",),
    ("freeze_encoder_below_layer", 0),
    ("freeze_encoder_below_layer", 1),
    ("freeze_encoder_below_layer", 2),
    ("freeze_decoder",),
    ("freeze_speech_emb",),
    ("freeze_text_emb",),
]


@pytest.mark.parametrize("call", FREEZING, ids=str)
@pytest.mark.parametrize("then", [(), ("unfreeze_all",), ("freeze_encoder_below_layer", 1)], ids=str)
def test_freezing(call: tuple, then: tuple) -> None:
    reference, ours = build_pair(target_early_exit_layer=1)
    for name, *arguments in filter(None, (call, then)):
        getattr(reference, name)(*arguments)
        getattr(ours, name)(*arguments)
    # rotary frequencies are left out: the reference's helpers switch them to trainable, which they never were
    expected = {name: p.requires_grad for name, p in reference.named_parameters() if not name.endswith("freqs")}
    assert {name: p.requires_grad for name, p in ours.named_parameters() if not name.endswith("freqs")} == expected


def test_load_takes_the_reference_s_checkpoint(tmp_path) -> None:
    reference = build_reference(3)
    torch.save({"model": reference.state_dict(), "version": "0.4.8", "steps": 12}, tmp_path / "speech.to.text.12.pt")
    _, ours = build_pair(4)
    package = ours.load(tmp_path / "speech.to.text.12.pt")
    assert package["steps"] == 12
    assert set(package) == {"model", "version", "steps"}
    for name, value in reference.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_load_can_be_lenient(tmp_path) -> None:
    state = build_reference(3).state_dict()
    del state["start_token.text"]
    torch.save({"model": state}, tmp_path / "part.pt")
    _, ours = build_pair(4)
    before = ours.start_token["text"].clone()
    ours.load(str(tmp_path / "part.pt"), strict=False)
    assert torch.equal(ours.start_token["text"], before)
    assert torch.equal(ours.start_token["speech"], state["start_token.speech"])
    with pytest.raises((RuntimeError, ValueError), match=r"start_token\.text"):
        ours.load(str(tmp_path / "part.pt"))


def test_generate_leaves_the_training_mode_as_it_was() -> None:
    _, ours = build_pair()
    source = random_ids(1, 4, 17)
    for training in (True, False):
        ours.train(training)
        ours.generate(source, source_type="speech", target_type="text", max_length=2)
        assert ours.training is training
        assert ours.target_transformer.training is training
