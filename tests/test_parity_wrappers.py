"""The three training wrappers against the reference's: same draws for a seed, same loss, logits and gradients."""

from __future__ import annotations

import pytest
import torch
from reference import assert_as_exact, build_pair, fake_speech_tokenizer, load_reference, pad_rows, random_ids

import spear_fast


def wrapped(name: str, pair: tuple, **kwargs) -> list:
    """The wrapper `name` of each package around its own model: `[theirs, ours]`."""
    return [
        getattr(package, name)(model, **kwargs)
        for package, model in zip((load_reference(), spear_fast), pair, strict=True)
    ]


def compare(wrappers: list, *arguments, seed: int = 0, **kwargs) -> None:
    """Runs both with one seed and compares loss, logits and gradients."""
    found = []
    for wrapper in wrappers:
        wrapper.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        loss, logits = wrapper(*arguments, **kwargs)
        loss.backward()
        found.append((loss, logits, {n: p.grad for n, p in wrapper.model.named_parameters() if p.grad is not None}))
    (theirs_loss, theirs_logits, theirs_gradients), (loss, logits, gradients) = found
    torch.testing.assert_close(loss, theirs_loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits, theirs_logits, rtol=1e-9, atol=1e-10)
    assert set(gradients) == set(theirs_gradients)
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, theirs_gradients[key], rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )


SEEDS = [0, 1, 2]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length", [2, 7, 20, 33])
@pytest.mark.parametrize(
    "options", [{}, dict(deletion_prob=0.3), dict(reconstruct_seq=True), dict(reconstruct_seq=True, mask_id=5)], ids=str
)
def test_pretraining(seed: int, length: int, options: dict) -> None:
    pair = build_pair(seed, dtype=torch.float64)
    compare(
        wrapped("SpeechSpeechPretrainWrapper", pair, **options),
        random_ids(4, length, 17, seed=seed, lowest=0),
        seed=seed,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_pretraining_single_row_and_nothing_deleted(seed: int) -> None:
    pair = build_pair(seed, dtype=torch.float64)
    compare(wrapped("SpeechSpeechPretrainWrapper", pair), random_ids(1, 9, 17, seed=seed), seed=seed)
    compare(
        wrapped("SpeechSpeechPretrainWrapper", pair, reconstruct_seq=True, deletion_prob=0.0),
        random_ids(2, 9, 17, seed=seed),
        seed=seed,
    )
    compare(
        wrapped("SpeechSpeechPretrainWrapper", pair, reconstruct_seq=True, mask_id=3, deletion_prob=1.0),
        random_ids(2, 9, 17, seed=seed),
    )


def test_pretraining_from_audio() -> None:
    tokenizer = fake_speech_tokenizer(17)
    pair = build_pair(wav2vec=tokenizer)
    wave = torch.randn(3, 1700, generator=torch.Generator().manual_seed(0))
    for wrappers in (
        wrapped("SpeechSpeechPretrainWrapper", pair),
        wrapped("SpeechSpeechPretrainWrapper", build_pair(), wav2vec=tokenizer),
    ):
        found = []
        for wrapper in wrappers:
            torch.manual_seed(3)
            found.append(wrapper(wave))
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_pretraining_with_dropped_conditions_and_early_exit_off() -> None:
    pair = build_pair(dtype=torch.float64, cond_drop_prob=1 - 1e-9)
    compare(wrapped("SpeechSpeechPretrainWrapper", pair), random_ids(3, 12, 17))


@pytest.mark.parametrize("drop", [0.0, 1 - 1e-9])
@pytest.mark.parametrize("training", [False, True])
def test_back_translation(drop: float, training: bool) -> None:
    pair = build_pair(5, dtype=torch.float64, cond_drop_prob=drop, target_kv_heads=2)
    wrappers = wrapped("SemanticToTextWrapper", pair)
    for wrapper in wrappers:
        wrapper.train(training)
    text = pad_rows(random_ids(3, 6, 13), [6, 2, 4], 0)
    compare(wrappers, random_ids(3, 9, 17), text)
    compare(wrappers, semantic_token_ids=random_ids(3, 9, 17), grapheme_token_ids=text)


@pytest.mark.parametrize("drop", [0.0, 1 - 1e-9])
@pytest.mark.parametrize("early_exit", [False, True])
def test_text_to_semantic(drop: float, early_exit: bool) -> None:
    pair = build_pair(6, dtype=torch.float64, cond_drop_prob=drop, target_early_exit_layer=1)
    wrappers = wrapped("TextToSemanticWrapper", pair)
    text, speech = pad_rows(random_ids(3, 6, 13), [6, 2, 4], 0), random_ids(3, 9, 17)
    compare(wrappers, text, speech, return_early_exit_loss=early_exit)
    compare(wrappers, text, speech)
    compare(wrappers, grapheme_token_ids=text, semantic_token_ids=speech)


def test_float32_is_as_exact_as_the_reference() -> None:
    text, speech = pad_rows(random_ids(3, 6, 13), [6, 2, 4], 0), random_ids(3, 9, 17)
    theirs, ours = wrapped("SemanticToTextWrapper", build_pair(7))
    truth, _ = wrapped("SemanticToTextWrapper", build_pair(7, dtype=torch.float64))
    for index in range(2):
        assert_as_exact(ours(speech, text)[index], theirs(speech, text)[index], truth(speech, text)[index])


def test_deletion_removes_the_asked_share_and_keeps_order() -> None:
    # through a model that records what it is given: source and target partition the row, each in the row's order
    class Recorder(torch.nn.Module):
        wav2vec, semantic_pad_id, num_semantic_token_ids, device = None, -1, 1000, torch.device("cpu")

        def forward(self, source, target, **kwargs):
            self.seen = source, target
            return torch.zeros(()), source

    recorder = Recorder()
    rows = torch.stack(
        [torch.randperm(1000, generator=torch.Generator().manual_seed(i))[:50].sort().values for i in range(3)]
    )
    spear_fast.SpeechSpeechPretrainWrapper(recorder, deletion_prob=0.5)(rows)
    source, target = recorder.seen
    assert source.shape == target.shape == (3, 25)
    for row, kept, deleted in zip(rows, source, target, strict=True):
        assert torch.equal(kept, kept.sort().values)
        assert torch.equal(deleted, deleted.sort().values)
        assert torch.equal(torch.cat((kept, deleted)).sort().values, row)
