"""The generator of pseudo-labelled rows: resumes, overwrites nothing, writes what training reads back right."""

from __future__ import annotations

import os

import pytest
import torch
from reference import fake_speech_tokenizer, load_reference
from training_jobs import Rows, model, reference_model, settings

import spear_fast
from spear_fast import GeneratedAudioTextDataset, SemanticToTextDatasetGenerator, TextToSemanticTrainer

# greedy search, so that a row's label does not hang on a draw
OPTIONS = dict(max_length=6, beam_size=2)


def speech_rows(count: int = 7) -> Rows:
    generator = torch.Generator().manual_seed(2)
    return Rows(torch.randint(0, 10, (4 + index,), generator=generator) for index in range(count))


def generate(folder, rows, trained=None, **options) -> SemanticToTextDatasetGenerator:
    made = {key: options.pop(key) for key in ("batch_size", "delimiter_id", "input_sample_hz") if key in options}
    generator = SemanticToTextDatasetGenerator(
        trained or model().eval(), dataset=rows, folder=str(folder), **{"batch_size": 3, **made}
    )
    generator(**{**OPTIONS, **options})
    return generator


def contents(folder) -> dict[str, list[int]]:
    return {path.name: torch.load(path).tolist() for path in folder.glob("*.pt")}


def test_it_goes_on_and_writes_what_a_single_run_writes(tmp_path):
    rows = speech_rows()
    generate(tmp_path / "whole", rows)
    generate(tmp_path / "parts", Rows(rows.rows[:4]))
    (tmp_path / "parts" / "2.pt").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert len(contents(tmp_path / "parts")) == 3
    generate(tmp_path / "parts", rows)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "overwritten"
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    data = GeneratedAudioTextDataset(tmp_path / "whole")
    assert [speech.tolist() for speech, _ in data] == [row.tolist() for row in rows]
    for index, row in enumerate(rows):
        # whatever batch a row was in, its label is what it gets alone; without the end, which training appends
        alone = (
            model()
            .eval()
            .generate(row[None], source_type="speech", target_type="text", beam_search_decode=True, **OPTIONS)
        )
        alone = alone[0].tolist()
        wanted = alone[: alone.index(12)] if 12 in alone else alone
        assert data[index][1].tolist() == wanted
        assert contents(tmp_path / "whole")[f"{index}.pt"] == [*row.tolist(), -1, *wanted]


def test_the_reference_begins_again_and_saves_ends(tmp_path):
    rows = Rows(torch.arange(5) for _ in range(2))
    theirs = reference_model(autoset_text_eos_id=True).eval()
    generator = load_reference().SemanticToTextDatasetGenerator(
        theirs, dataset=rows, folder=str(tmp_path), batch_size=2
    )
    for _ in range(2):
        generator(**OPTIONS)
        stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        if _ == 0:
            first = stamps
    assert first.keys() == stamps.keys() == {"0.pt", "1.pt"}
    assert first != stamps, "the second run wrote over the first"
    assert torch.load(tmp_path / "0.pt").tolist()[:7] == [0, 1, 2, 3, 4, 10, -1], "with the end of the speech"
    # ours resumes in its folder, and mends the ends when reading
    generate(tmp_path, Rows(torch.arange(5) for _ in range(3)), spear_fast.accelerate(theirs))
    data = GeneratedAudioTextDataset(tmp_path, speech_eos_id=10, text_eos_id=12)
    assert [speech.tolist() for speech, _ in data] == [[0, 1, 2, 3, 4]] * 3
    assert data[0][1].tolist() == data[1][1].tolist() == data[2][1].tolist()


def test_ends_and_pads_of_a_token_dataset_are_left_out(tmp_path):
    rows = Rows(
        [torch.tensor([3, 4, 10]), torch.tensor([5, -1, -1]), (torch.tensor([0, 0]),), torch.tensor([7, 8, 10, -1])]
    )
    generate(tmp_path, rows)
    found = [speech.tolist() for speech, _ in GeneratedAudioTextDataset(tmp_path)]
    assert found == [[3, 4], [5], [0, 0], [7, 8]]


def test_raw_audio_of_different_lengths(tmp_path):
    audio = fake_speech_tokenizer(10)
    waves = Rows(torch.randn(80 * tokens, generator=torch.Generator().manual_seed(tokens)) for tokens in (3, 6, 4))
    generate(tmp_path / "16", waves, model(wav2vec=audio).eval())
    generate(tmp_path / "8", waves, model(wav2vec=audio).eval(), input_sample_hz=8000)
    data = GeneratedAudioTextDataset(tmp_path / "16")
    assert [speech.tolist() for speech, _ in data] == [audio(wave[None])[0].tolist() for wave in waves]
    assert [len(speech) for speech, _ in GeneratedAudioTextDataset(tmp_path / "8")] == [6, 12, 8]


def test_another_job_on_the_same_folder_is_refused(tmp_path):
    rows = speech_rows(2)
    generate(tmp_path, rows)
    for changes, words in (
        (dict(trained=model(seed=9).eval()), "another model"),
        (dict(max_length=7), "another options"),
        (dict(delimiter_id=-2), "another delimiter_id"),
        (dict(trained=model(seed=9).eval(), temperature=2.0), "another model and options"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(tmp_path, rows, **changes)
    generate(tmp_path, rows)


def test_a_delimiter_of_its_own(tmp_path):
    generate(tmp_path, speech_rows(3), delimiter_id=-7)
    data = GeneratedAudioTextDataset(tmp_path, delimiter_id=-7)
    assert [speech.tolist() for speech, _ in data] == [row.tolist() for row in speech_rows(3)]
    with pytest.raises(ValueError, match="delimiter_id must not be a token's id, got 3; take -1"):
        generate(tmp_path, speech_rows(3), delimiter_id=3)


def test_text_id_zero_survives(tmp_path):
    class Zeros(spear_fast.TextToSemantic):
        def generate(self, source, **options):
            result = super().generate(source, **options)
            result.tokens[:], result.lengths[:] = torch.tensor([0, 5, 0, 0, 0, 0])[: result.tokens.shape[-1]], 3
            return result

    sizes = {key: value for key, value in model().config.items()}
    generate(tmp_path, speech_rows(2), Zeros(**{**sizes, "text_pad_id": -1}).eval())
    assert [text.tolist() for _, text in GeneratedAudioTextDataset(tmp_path)] == [[0, 5, 0]] * 2


def test_a_row_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    generator = generate(tmp_path, speech_rows(2))
    generator.dataset = speech_rows(4)
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*3\.pt: .*No space left on device"):
        generator(**OPTIONS)
    assert contents(tmp_path).keys() == {"0.pt", "1.pt", "2.pt"}
    monkeypatch.undo()
    assert generator.remaining() == [3]
    generator(**OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".pt") == [f"{i}.pt" for i in range(4)]


def test_a_model_of_the_reference_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"spear_fast\.accelerate makes one"):
        SemanticToTextDatasetGenerator(reference_model(), dataset=speech_rows(1), folder=str(tmp_path))


def test_what_it_writes_trains_with_one_end_each(tmp_path):
    generate(tmp_path / "rows", speech_rows(), max_length=3)
    seen = []

    class Spy(spear_fast.TextToSemantic):
        def encode(self, source, **options):
            memory, mask, ids = super().encode(source, **options)
            seen.append(ids)
            return memory, mask, ids

    trainer = TextToSemanticTrainer(
        Spy(**model().config),
        generated_audio_text_dataset_folder=str(tmp_path / "rows"),
        **settings(tmp_path / "results", num_train_steps=2),
    )
    trainer.train()
    assert all((ids == 12).sum(dim=1).tolist() == [1] * len(ids) for ids in seen)
