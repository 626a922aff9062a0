"""Defects of the reference in `generate`: each test shows the reference failing, and ours right."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from reference import build_pair, cut_after_eos, fake_speech_tokenizer, load_reference, pad_rows, random_ids
from torch import Tensor

TO_TEXT = dict(source_type="speech", target_type="text")
TO_SPEECH = dict(source_type="text", target_type="speech")


def score_of(model, source: Tensor, tokens: list[int], eos_id: int) -> float:
    """The log-probability of one text hypothesis up to and with its first EOS, by the reference's own forward."""
    kept = tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens
    logits = model(source, torch.tensor([kept]), **TO_TEXT)[0, : len(kept)]
    return logits.log_softmax(dim=-1)[torch.arange(len(kept)), torch.tensor(kept)].sum().item()


def test_rows_that_ended_stay_ended_at_the_length_limit() -> None:
    reference, ours = build_pair(0)
    source = random_ids(6, 7, 17, lowest=0)
    kwargs = dict(**TO_TEXT, max_length=12, temperature=0.0)
    shipped = reference.generate(source, **kwargs)
    assert not torch.equal(shipped, cut_after_eos(shipped, 13, 0)), "the case shows no tokens after EOS"
    tokens, mask = ours.generate(source, return_target_mask=True, **kwargs)
    assert torch.equal(tokens, cut_after_eos(shipped, 13, 0))
    for row, kept in zip(tokens.tolist(), mask.tolist(), strict=True):
        length = row.index(13) + 1 if 13 in row else len(row)
        assert kept == [True] * length + [False] * (len(row) - length)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gamma", [1, 4, 5])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_speculative_decoding_is_greedy_decoding(rows: int, gamma: int, kv_heads: int | None) -> None:
    reference, ours = build_pair(7, target_depth=3, target_early_exit_layer=1, target_kv_heads=kv_heads)
    source = pad_rows(random_ids(rows, 6, 13), [6, 3, 5][:rows], 0)
    kwargs = dict(**TO_SPEECH, max_length=14, filter_fn_kwargs=dict(k=1))
    right = cut_after_eos(reference.generate(source, **kwargs), 17, -1)
    torch.manual_seed(0)
    try:
        shipped = reference.generate(source, spec_decode=True, spec_decode_gamma=gamma, **kwargs)
        assert shipped.tolist() != right.tolist()
    except (IndexError, RuntimeError):
        assert rows > 1, "above one row it embeds the pad id -1"
    for seed in range(3):
        torch.manual_seed(seed)
        found = ours.generate(source, spec_decode=True, spec_decode_gamma=gamma, **kwargs)
        assert found.tolist() == right.tolist()


def test_speculative_decoding_draws_from_the_sampling_distribution() -> None:
    reference, ours = build_pair(2, target_early_exit_layer=1)
    source = random_ids(1, 5, 13).expand(2000, -1)
    kwargs = dict(**TO_SPEECH, max_length=2, temperature=1.5, filter_fn_kwargs=dict(k=3))
    torch.manual_seed(0)
    one_by_one = reference.generate(source, **kwargs)
    torch.manual_seed(1)
    drafted = ours.generate(source, spec_decode=True, spec_decode_gamma=2, **kwargs)
    counts = []
    for drawn in (one_by_one, drafted):
        drawn = torch.where((drawn[:, :1] == 17) & torch.tensor([[False, True]]), 0, drawn)
        counts.append(torch.bincount(drawn[:, 0] * 18 + drawn[:, 1], minlength=18 * 18).double())
    seen = counts[0] + counts[1] > 0
    assert seen.sum() <= 9
    # chi-squared with at most 8 degrees of freedom is above 32 once in 10,000
    assert float(((counts[0] - counts[1])[seen] ** 2 / (counts[0] + counts[1])[seen]).sum()) < 32


def test_standard_beam_search_keeps_finished_hypotheses() -> None:
    # the reference ranks hypotheses by what follows their EOS too, so that the better of two finished ones can be lost
    worse = 0
    for seed in range(8):
        # a pad id of its own: the reference's forward would not see a generated 0
        reference, ours = build_pair(40 + seed, text_pad_id=-1)
        source = random_ids(1, 7, 17, seed=seed)
        kwargs = dict(**TO_TEXT, beam_search_decode=True, beam_size=3, max_length=10)
        shipped = score_of(reference, source, reference.generate(source, **kwargs)[0].tolist(), 13)
        result = ours.generate(source, beam_mode="standard", length_penalty=0.0, return_result=True, **kwargs)
        standard = score_of(reference, source, result.tokens[0, 0].tolist(), 13)
        assert float(result.sum_logprobs[0, 0]) == pytest.approx(standard, abs=1e-4)
        worse += shipped < standard - 1e-3
    assert worse >= 2


def test_padded_batch_of_speech() -> None:
    reference, ours = build_pair(3)
    source = pad_rows(random_ids(3, 8, 17), [8, 5, 2], -1)
    alone = [row[row != -1][None] for row in source]
    for options in (dict(temperature=0.0), dict(beam_search_decode=True, beam_size=3)):
        kwargs = dict(**TO_TEXT, max_length=9, **options)
        with pytest.raises(IndexError):
            reference.generate(source, **kwargs)
        found = ours.generate(source, **kwargs)
        for row, single in zip(found, alone, strict=True):
            right = cut_after_eos(reference.generate(single, **kwargs), 13, 0)[0].tolist()
            # a batch goes on until all its rows have ended; what matters is each up to its EOS
            wanted = right[: right.index(13) + 1] if 13 in right else right
            got = row.tolist()
            if options.get("beam_search_decode") and 13 in wanted:
                # reference mode keeps scoring past EOS, so the number of steps decides between finished hypotheses
                continue
            assert got[: len(wanted)] == wanted
            assert set(got[len(wanted) :]) <= {0}


@pytest.mark.parametrize("beam", [False, True])
def test_explicit_source_mask_as_wide_as_the_ids(beam: bool) -> None:
    reference, ours = build_pair(4)
    source = random_ids(2, 8, 17)
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    kwargs = dict(**TO_TEXT, max_length=8, temperature=1.0 if beam else 0.0, beam_search_decode=beam)
    with pytest.raises(RuntimeError):
        reference.generate(source, source_mask=mask, **kwargs)
    found = ours.generate(source, source_mask=mask, **kwargs)
    # the right answer is that of the padded ids
    assert found.tolist() == ours.generate(pad_rows(source, [8, 5], -1), **kwargs).tolist()


def test_raw_audio_with_its_sample_rate() -> None:
    reference, ours = build_pair(5, wav2vec=fake_speech_tokenizer(17))
    time = torch.arange(16000) / 16000
    at_16k = (2 * torch.sin(2 * torch.pi * 31.0 * time))[None, :4000]
    at_48k = torch.nn.functional.interpolate(at_16k[:, None], scale_factor=3, mode="linear")[:, 0]
    kwargs = dict(**TO_TEXT, max_length=8, temperature=0.0, return_source=True)
    right, tokens = reference.generate(at_16k, **kwargs)
    assert right.shape == (1, 51)
    assert len(set(right[0].tolist())) > 3
    assert "input_sample_hz" not in str(reference.generate.__wrapped__.__code__.co_varnames)
    silently_wrong, _ = reference.generate(at_48k, **kwargs)
    assert silently_wrong.shape == (1, 151), "three times the tokens for the same second of speech"
    found, found_tokens = ours.generate(at_48k, input_sample_hz=48000, **kwargs)
    assert found.shape == right.shape
    assert (found == right).float().mean() > 0.95
    if torch.equal(found, right):
        assert found_tokens.tolist() == tokens.tolist()
    same, same_tokens = ours.generate(at_16k, input_sample_hz=16000, **kwargs)
    assert torch.equal(same, right)
    assert torch.equal(same_tokens, cut_after_eos(tokens, 13, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_raw_audio_of_other_float_types(dtype: torch.dtype) -> None:
    reference, ours = build_pair(5, wav2vec=fake_speech_tokenizer(17))
    wave = torch.randn(2, 800, generator=torch.Generator().manual_seed(0)).half()
    kwargs = dict(**TO_TEXT, max_length=4, temperature=0.0, return_source=True)
    with pytest.raises((RuntimeError, IndexError)):
        reference.generate(wave.to(dtype), **kwargs)
    assert ours.generate(wave.to(dtype), **kwargs)[0].tolist() == reference.generate(wave.float(), **kwargs)[0].tolist()


@pytest.mark.parametrize("beam", [False, True])
def test_no_progress_lines_in_other_people_s_logs(capfd, beam: bool) -> None:
    from tqdm import tqdm

    reference, ours = build_pair(6)
    kwargs = dict(**TO_TEXT, max_length=3, beam_search_decode=beam)
    inner = load_reference().spear_tts_pytorch
    silenced, inner.tqdm = inner.tqdm, tqdm
    try:
        reference.generate(random_ids(1, 4, 17), **kwargs)
    finally:
        inner.tqdm = silenced
    assert "it/s" in capfd.readouterr().err
    ours.generate(random_ids(1, 4, 17), **kwargs)
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out == ""


def test_text_id_zero_in_what_is_generated() -> None:
    # return_target_mask of the reference calls every generated text id 0 padding
    reference, ours = build_pair(7, autoset_text_eos_id=False)
    with torch.no_grad():
        for model in (reference, ours):
            model.token_emb["text"].weight.mul_(torch.tensor([4.0] + [1.0] * 12)[:, None])
    source = random_ids(4, 6, 17)
    kwargs = dict(**TO_TEXT, max_length=10, temperature=0.0, return_target_mask=True)
    shipped, shipped_mask = reference.generate(source, **kwargs)
    assert (shipped == 0).any(), "the case generates no id 0"
    assert not shipped_mask.all()
    tokens, mask = ours.generate(source, **kwargs)
    assert torch.equal(tokens, shipped)
    assert mask.all()


def test_row_without_a_source_token() -> None:
    # padded rows may be empty; with guidance off and EOS off the reference attends evenly to pads there
    _, ours = build_pair(8, autoset_text_eos_id=False)
    source = torch.tensor([[3, 4, 5], [0, 0, 0]])
    for options in (dict(temperature=0.0), dict(beam_search_decode=True)):
        found = ours.generate(source, **TO_SPEECH, max_length=6, **options)
        assert found.shape[0] == 2
        assert (found[:, 0] >= 0).all()


def test_importing_needs_none_of_the_reference_s_dependencies() -> None:
    blocked = [
        "audiolm_pytorch",
        "fairseq",
        "x_clip",
        "einops",
        "beartype",
        "rotary_embedding_torch",
        "accelerate",
        "spear_tts_pytorch",
        "torchaudio",
    ]
    program = f"""
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocker())
try:
    import spear_tts_pytorch
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the blocker does not block")
import torch
from spear_fast import SemanticToTextWrapper, SpeechSpeechPretrainWrapper, TextToSemanticWrapper, accelerate
from spear_fast import TextToSemantic
sizes = dict(source_depth=1, target_depth=1, dim_head=8, heads=2)
model = TextToSemantic(16, num_text_token_ids=5, num_semantic_token_ids=5, **sizes)
print(model.generate(torch.tensor([[1, 2]]), source_type="speech", target_type="text", max_length=3).shape[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]
    # and the reference as pip installs it does not import here without what its own dependencies break on
    done = subprocess.run(
        [sys.executable, "-c", "import spear_tts_pytorch"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "audiolm_pytorch" in done.stderr or "mutable default" in done.stderr
