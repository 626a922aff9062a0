"""Datasets for training and the generator of pseudo-labelled rows."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from reference import load_reference

from spear_fast import GeneratedAudioTextDataset, SemanticToTextDatasetGenerator, TextToSemantic
from spear_fast.training import LabelledDataset
from spear_fast.training.data import Collate, EpochShuffle

SIZES = dict(
    dim=32, source_depth=1, target_depth=1, heads=2, dim_head=16, num_text_token_ids=12, num_semantic_token_ids=10
)


def model() -> TextToSemantic:
    torch.manual_seed(0)
    return TextToSemantic(**SIZES).eval()


def speech_rows(count: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 10, (4 + index,), generator=generator) for index in range(count)]


def test_rows_come_in_the_order_of_their_numbers_without_ends(tmp_path):
    for index in range(12):
        # as the reference saves them: an end in both halves, pads of speech that look like the delimiter
        torch.save(torch.tensor([index % 10, 3, 10, -1, -1, 5, 1 + index % 11, 12]), tmp_path / f"{index}.pt")
    data = GeneratedAudioTextDataset(str(tmp_path), speech_eos_id=10, text_eos_id=12)
    assert len(data) == 12
    for index, (speech, text) in enumerate(data):
        assert speech.tolist() == [index % 10, 3]
        assert text.tolist() == [5, 1 + index % 11]
    # the reference keeps a pad and the ends, so that training appends each end twice
    with_ends = load_reference().GeneratedAudioTextDataset(str(tmp_path))
    index = [path.name for path in with_ends.paths].index("0.pt")
    assert [half.tolist() for half in with_ends[index]] == [[0, 3, 10], [-1, 5, 1, 12]]


def test_a_folder_that_is_none_or_a_row_without_delimiter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        GeneratedAudioTextDataset(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"no \.pt row"):
        GeneratedAudioTextDataset(str(tmp_path))
    torch.save(torch.tensor([1, 2]), tmp_path / "0.pt")
    with pytest.raises(ValueError, match="has no delimiter -1"):
        GeneratedAudioTextDataset(str(tmp_path))[0]


def test_the_generator_goes_on_and_writes_what_a_single_run_writes(tmp_path):
    rows = speech_rows()
    options = dict(max_length=6, beam_size=2)
    whole = SemanticToTextDatasetGenerator(model(), dataset=rows, folder=str(tmp_path / "whole"), batch_size=3)
    whole(**options)
    parts = SemanticToTextDatasetGenerator(model(), dataset=rows[:4], folder=str(tmp_path / "parts"), batch_size=3)
    parts(**options)
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert len(stamps) == 4
    again = SemanticToTextDatasetGenerator(model(), dataset=rows, folder=str(tmp_path / "parts"), batch_size=3)
    assert again.remaining() == [4, 5, 6]
    again(**options)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [f"{index}.pt" for index in range(7)]
    for name, stamp in stamps.items():
        assert (tmp_path / "parts" / name).stat().st_mtime_ns == stamp
    data = [GeneratedAudioTextDataset(str(tmp_path / name)) for name in ("whole", "parts")]
    for index, source in enumerate(rows):
        speech, text = data[0][index]
        assert torch.equal(speech, source)
        assert 12 not in text
        # whatever batch a row was in
        assert torch.equal(text, data[1][index][1])


def test_the_reference_starts_again_at_zero(tmp_path):
    reference = load_reference()
    labeller = reference.TextToSemantic(**SIZES).eval()
    rows = torch.utils.data.TensorDataset(torch.arange(10).view(2, 5))
    for _ in range(2):
        reference.SemanticToTextDatasetGenerator(labeller, dataset=rows, folder=str(tmp_path), batch_size=2)(
            max_length=3, beam_size=2
        )
    # both runs wrote to the same two files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt"]


def test_labels_are_read_and_filtered(tmp_path):
    columns = {
        "source": [[1, 2], [3], [4, 5, 6]],
        "target": [[7], [8, 9], [10]],
        "mean_logprob": [-0.1, -2.0, -0.3],
        "finished": [True, True, False],
    }
    pq.write_table(pa.table(columns), tmp_path / "labels-00000.parquet")
    assert [[ids.tolist() for ids in pair] for pair in LabelledDataset(tmp_path)] == [[[1, 2], [7]], [[3], [8, 9]]]
    assert len(LabelledDataset(tmp_path, finished_only=False)) == 3
    assert [pair[0].tolist() for pair in LabelledDataset(tmp_path, min_mean_logprob=-1.0)] == [[1, 2]]
    with pytest.raises(ValueError, match="passes the filter"):
        LabelledDataset(tmp_path, min_mean_logprob=0.0)
    with pytest.raises(ValueError, match="no labels in"):
        LabelledDataset(tmp_path / "none")


def test_speech_is_padded_with_its_own_pad():
    speech, text = Collate([-1, 0])(
        [(torch.tensor([0, 4]), torch.tensor([3])), (torch.tensor([5]), torch.tensor([2, 1]))]
    )
    assert speech.tolist() == [[0, 4], [5, -1]]
    assert text.tolist() == [[3, 0], [2, 1]]
    with pytest.raises(ValueError, match="must give 2 tensors a row, got 1"):
        Collate([-1, 0])([torch.tensor([1])])


def test_every_epoch_has_every_index_in_its_own_order():
    order = EpochShuffle(50, seed=1)
    first = list(order)
    order.epoch = 1
    second = list(order)
    order.epoch = 0
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert list(order) == first
