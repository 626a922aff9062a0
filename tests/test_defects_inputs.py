"""Bad input to the model: where the reference fails deep inside or continues silently, ours says what is wrong."""

from __future__ import annotations

import re

import pytest
import torch
from reference import SMALL, ByteTokenizer, build_pair, fake_speech_tokenizer, random_ids

import spear_fast

TO_TEXT = dict(source_type="speech", target_type="text")
TO_SPEECH = dict(source_type="text", target_type="speech")
GOOD = {"source": random_ids(2, 5, 17), "target": random_ids(2, 4, 13)}


@pytest.fixture(scope="module")
def pair():
    return build_pair()


def refused(match: str, call, *arguments, **kwargs) -> None:
    """`call` raises ValueError, or TypeError for a wrong type, with `match` in one sentence of our own words."""
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        call(*arguments, **kwargs)
    assert type(caught.value) in (ValueError, TypeError)
    text = str(caught.value)
    assert "\n" not in text, text
    assert text.endswith("."), text
    assert len(text) < 300, text
    # one sentence, which may hold clauses, numbers and file names
    assert not re.search(r"[.!?] [A-Z]", text), text
    for foreign in ("NoneType", "Traceback", "einops", "size of tensor", "index out of range"):
        assert foreign not in text, text


BAD_IDS = {
    "past the vocabulary": (torch.tensor([[3, 18, 2]]), r"0 to 17.*18.*row 0, position 1"),
    "far past the vocabulary": (torch.tensor([[3, 2], [1, 2**40]]), r"row 1, position 1"),
    "negative": (torch.tensor([[3, -2, 2]]), r"-2.*position 1"),
    "pad id inside a row": (torch.tensor([[3, -5, -1]]), r"-5"),
    "floats": (torch.tensor([[0.5, 1.0]]), r"wav2vec|integer"),
    "booleans": (torch.tensor([[True, False]]), r"integer.*bool"),
    "complex numbers": (torch.tensor([[1j]]), r"integer.*complex"),
    "three dimensions": (torch.zeros(1, 2, 3).long(), r"\[batch, length\].*\[1, 2, 3\]"),
    "a number": (torch.tensor(3), r"\[batch, length\]"),
    "no rows": (torch.zeros(0, 3).long(), r"at least one row"),
    "a list of numbers": ([[1, 2, 3]], r"tensor.*list"),
    "nothing": (None, r"tensor.*NoneType|tensor"),
    "strings for speech": (["hello"], r"strings.*text"),
    "one string": ("hello", r"list of strings"),
}


@pytest.mark.parametrize("kind", BAD_IDS)
@pytest.mark.parametrize("where", ["encode", "forward", "generate", "beam"])
def test_bad_source(pair, kind: str, where: str) -> None:
    source, said = BAD_IDS[kind]
    reference, ours = pair
    rows = len(source) if isinstance(source, (list, torch.Tensor)) and kind != "a number" else 1
    target = GOOD["target"][:rows]
    calls = {
        "encode": lambda: ours.encode(source, source_type="speech"),
        "forward": lambda: ours(source, target, **TO_TEXT),
        "generate": lambda: ours.generate(source, max_length=2, **TO_TEXT),
        "beam": lambda: ours.generate(source, max_length=2, beam_search_decode=True, **TO_TEXT),
    }
    message = said if kind != "nothing" else "tensor"
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        calls[where]()
    text = str(caught.value)
    assert "source" in text, text
    assert "\n" not in text, text
    assert text.endswith("."), text
    if kind in ("past the vocabulary", "negative", "three dimensions"):
        with pytest.raises(Exception) as theirs:
            reference.generate(source, max_length=2, **TO_TEXT)
        assert "source" not in str(theirs.value).splitlines()[0]


@pytest.mark.parametrize(
    "kind", ["past the vocabulary", "negative", "floats", "booleans", "three dimensions", "a list of numbers"]
)
def test_bad_target(pair, kind: str) -> None:
    target, _ = BAD_IDS[kind]
    refused("target", pair[1], random_ids(1, 4, 17), target, **TO_TEXT)


def test_end_of_sequence_is_an_id_and_the_next_one_is_not(pair) -> None:
    _, ours = pair
    assert ours.encode(torch.tensor([[17, 3]]), source_type="speech")[2].tolist() == [[17, 3, 17]]
    refused("0 to 13.*14", ours, GOOD["source"], torch.tensor([[1], [14]]), **TO_TEXT)
    refused(
        "0 to 12.*13", build_pair(autoset_text_eos_id=False)[1], GOOD["source"], torch.tensor([[1], [13]]), **TO_TEXT
    )


def test_what_stands_outside_an_explicit_mask_is_not_read(pair) -> None:
    _, ours = pair
    mask = torch.tensor([[True, True, False]])
    found = ours.encode(torch.tensor([[3, 4, 999999]]), source_type="speech", source_mask=mask)
    expected = ours.encode(torch.tensor([[3, 4]]), source_type="speech")
    torch.testing.assert_close(found[0][:, :3], expected[0])


def test_batches_that_differ(pair) -> None:
    reference, ours = pair
    with pytest.raises(AssertionError):
        reference(GOOD["source"], GOOD["target"][:1], **TO_TEXT)
    refused("same batch size.*2 and 1", ours, GOOD["source"], GOOD["target"][:1], **TO_TEXT)


def test_empty_source() -> None:
    # with an automatic end of sequence an empty row is a source of its own; without, there is nothing to encode
    _, ours = build_pair()
    assert ours.generate(torch.zeros(2, 0).long(), max_length=3, **TO_TEXT).shape[0] == 2
    _, without = build_pair(autoset_semantic_eos_id=False)
    refused("source.*at least one id", without.generate, torch.zeros(2, 0).long(), max_length=3, **TO_TEXT)


def test_empty_target_in_training(pair) -> None:
    _, ours = pair
    ours.train()
    try:
        refused("target.*at least one id", ours, GOOD["source"], torch.zeros(2, 0).long(), return_loss=True, **TO_TEXT)
    finally:
        ours.eval()


@pytest.mark.parametrize("shape", [(2, 3), (1, 5), (2, 9), (5,)], ids=str)
@pytest.mark.parametrize("which", ["source_mask", "target_mask"])
def test_mask_of_another_shape(pair, shape: tuple, which: str) -> None:
    refused(f"{which}.*shape", pair[1], GOOD["source"], GOOD["target"], **TO_TEXT, **{which: torch.ones(shape).bool()})


@pytest.mark.parametrize("which", ["source_type", "target_type"])
@pytest.mark.parametrize("value", ["audio", "", None, 3], ids=str)
def test_unknown_modality(pair, which: str, value) -> None:
    _, ours = pair
    kwargs = {**TO_TEXT, which: value}
    refused("'speech' or 'text'", ours, GOOD["source"], GOOD["target"], **kwargs)
    refused("'speech' or 'text'", ours.generate, GOOD["source"], max_length=2, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(cond_scale=0.5), "cond_scale.*1 or more.*0.5"),
        (dict(cond_scale=2.0), "cond_scale.*cond_drop_prob"),
        (dict(beam_search_decode=True, spec_decode=True), "beam_search_decode and spec_decode"),
        (dict(spec_decode=True), "text to speech"),
        (dict(max_length=0), "max_length"),
        (dict(max_length=-3), "max_length"),
        (dict(max_length=2.5), "max_length"),
        (dict(beam_search_decode=True, beam_size=0), "beam_size"),
        (dict(beam_search_decode=True, beam_size=-1), "beam_size"),
        (dict(beam_search_decode=True, beam_size="4"), "beam_size"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(beam_search_decode=True, beam_mode="best"), "beam_mode"),
        (dict(beam_search_decode=True, beam_mode="standard", num_return_sequences=9), "num_return_sequences"),
        (dict(beam_search_decode=True, beam_mode="standard", early_stopping="sometimes"), "early_stopping"),
        (dict(beam_search_decode=True, beam_mode="standard", length_penalty=float("inf")), "length_penalty"),
    ],
    ids=str,
)
def test_bad_arguments_of_generate(pair, arguments: dict, said: str) -> None:
    refused(said, pair[1].generate, GOOD["source"], **{"max_length": 3, **TO_TEXT, **arguments})


def test_speculative_decoding_without_an_early_exit(pair) -> None:
    refused(
        "target_early_exit_layer|early exit",
        pair[1].generate,
        random_ids(1, 3, 13),
        max_length=3,
        spec_decode=True,
        **TO_SPEECH,
    )
    refused(
        "target_early_exit_layer",
        pair[1],
        random_ids(2, 3, 13),
        random_ids(2, 3, 17),
        return_loss=True,
        return_early_exit_loss=True,
        **TO_SPEECH,
    )
    exiting = build_pair(target_early_exit_layer=1)[1]
    refused(
        "text to speech",
        exiting,
        GOOD["source"],
        GOOD["target"],
        return_loss=True,
        return_early_exit_loss=True,
        **TO_TEXT,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(dim=0), "dim"),
        (dict(dim=31.5), "dim"),
        (dict(source_depth=0), "source_depth"),
        (dict(target_depth=-1), "target_depth"),
        (dict(heads=0), "heads"),
        (dict(target_kv_heads=3), "kv_heads"),
        (dict(target_kv_heads=0), "kv_heads"),
        (dict(dim_head=7), "dim_head"),
        (dict(num_text_token_ids=None), "num_text_token_ids"),
        (dict(num_text_token_ids=-3), "num_text_token_ids"),
        (dict(num_semantic_token_ids=None), "num_semantic_token_ids"),
        (dict(num_semantic_token_ids="512"), "num_semantic_token_ids"),
        (dict(cond_drop_prob=1.0), "cond_drop_prob"),
        (dict(cond_drop_prob=-0.1), "cond_drop_prob"),
        (dict(target_early_exit_layer=3), "target_early_exit_layer"),
        (dict(target_early_exit_layer=0), "target_early_exit_layer"),
        (dict(attn_dropout=1.5), "dropout"),
        (dict(use_openai_tokenizer=True), "use_openai_tokenizer"),
        (dict(use_openai_tokenizer=True, num_text_token_ids=None), "x-clip"),
    ],
    ids=str,
)
def test_bad_sizes(changes: dict, said: str) -> None:
    refused(said, spear_fast.TextToSemantic, **{**SMALL, **changes})


def test_raw_audio_without_a_tokenizer(pair) -> None:
    refused("wav2vec", pair[1].generate, torch.randn(1, 500), max_length=2, **TO_TEXT)
    refused("wav2vec", spear_fast.SpeechSpeechPretrainWrapper(pair[1]), torch.randn(1, 500))


def test_audio_too_short_for_a_token() -> None:
    _, ours = build_pair(wav2vec=fake_speech_tokenizer(17), autoset_semantic_eos_id=False)
    refused("source.*at least one id", ours.generate, torch.randn(1, 30), max_length=2, **TO_TEXT)


@pytest.mark.parametrize("rate", [0, -16000, "16k", 16000.5], ids=str)
def test_bad_sample_rate(rate) -> None:
    _, ours = build_pair(wav2vec=fake_speech_tokenizer(17))
    refused("input_sample_hz", ours.generate, torch.randn(1, 800), max_length=2, input_sample_hz=rate, **TO_TEXT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_audio_with_nan(value: float) -> None:
    _, ours = build_pair(wav2vec=fake_speech_tokenizer(17))
    wave = torch.randn(1, 800)
    wave[0, 3] = value
    refused("source.*(NaN|finite)", ours.generate, wave, max_length=2, **TO_TEXT)


def test_tokenizer_that_returns_rubbish() -> None:
    for encode, said in (
        (lambda texts: [[1, 2]], "tensor"),
        (lambda texts: torch.full((len(texts), 2), 99), "99"),
        (lambda texts: torch.zeros(len(texts), 2), "integer"),
    ):
        _, ours = build_pair(tokenizer_encode=encode)
        refused(said, ours.generate, ["abc"], max_length=2, **TO_SPEECH)


def test_strings_without_a_tokenizer_or_for_speech(pair) -> None:
    refused("source.*tokenizer_encode", pair[1].generate, ["abc"], max_length=2, **TO_SPEECH)
    refused("target.*tokenizer_encode", pair[1], GOOD["source"], ["abc", "d"], **TO_TEXT)
    _, ours = build_pair(num_text_token_ids=257, tokenizer_encode=ByteTokenizer().tokenize)
    refused("source.*text", ours.generate, ["abc"], max_length=2, **TO_TEXT)


def test_failed_call_leaves_the_model_usable(pair) -> None:
    _, ours = pair
    ours.train()
    try:
        with pytest.raises(ValueError):
            ours.generate(torch.tensor([[99]]), max_length=2, **TO_TEXT)
        assert ours.training
    finally:
        ours.eval()
    assert ours.generate(GOOD["source"], max_length=2, **TO_TEXT).shape[0] == 2


def test_bad_arguments_of_the_pretraining_wrapper(pair) -> None:
    _, ours = pair
    wrapper = spear_fast.SpeechSpeechPretrainWrapper
    refused("reconstruct_seq", wrapper, ours, mask_id=3)
    refused("deletion_prob", wrapper, ours, deletion_prob=1.5)
    refused("deletion_prob", wrapper, ours, deletion_prob=-0.1)
    refused("mask_id", wrapper, ours, mask_id=99, reconstruct_seq=True)
    refused("17", wrapper(ours), torch.tensor([[3, 99, 4, 5, 6]]))


def test_ids_are_looked_at_before_they_leave_the_host() -> None:
    # on the meta device, as on an accelerator, values cannot be looked at any more
    model = build_pair()[1].to("meta")
    good, bad = torch.tensor([[1, 2, -1]]), torch.tensor([[1, 99, -1]])
    assert model.to_ids(good, "speech", "source").device.type == "meta"
    wrong = "got 99 at row 0, position 1"
    refused(wrong, model.encode, bad, source_type="speech")
    refused(wrong, model, good, torch.tensor([[3, 99]]), **TO_TEXT)
    refused(wrong, spear_fast.SpeechSpeechPretrainWrapper(model), bad)
    # outside an explicit mask anything may stand
    mask = torch.tensor([[True, False, True]])
    ids = model.to_ids(torch.tensor([[1, 99, 2]]), "speech", "source", mask=mask)
    assert ids.device.type == "meta"
