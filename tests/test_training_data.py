"""Datasets for training, and which of their rows make a batch."""

from __future__ import annotations

import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from reference import load_reference
from torch.utils.data import ConcatDataset, DataLoader, Subset

from spear_fast import GeneratedAudioTextDataset, MockDataset
from spear_fast.training import LabelledDataset, ShuffledBatchSampler, TokenBudgetBatchSampler, lengths_of
from spear_fast.training.batches import EndlessBatches
from spear_fast.training.data import Collate


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
    for number, row in enumerate((torch.tensor([1, 2]), torch.rand(3), torch.zeros(2, 2).long(), [1, -1, 2])):
        torch.save(row, tmp_path / f"{number}.pt")
    (tmp_path / "4.pt").write_bytes(b"")
    (tmp_path / "5.pt").write_bytes((tmp_path / "0.pt").read_bytes()[:200])
    data = GeneratedAudioTextDataset(tmp_path)
    with pytest.raises(ValueError, match=r"0\.pt has no delimiter -1"):
        data[0]
    for number in (1, 2, 3):
        with pytest.raises(ValueError, match=rf"{number}\.pt must hold one row of integers"):
            data[number]
    for number in (4, 5):
        with pytest.raises(ValueError, match=rf"{number}\.pt is damaged"):
            data[number]


def test_a_row_is_read_without_running_what_is_in_it(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    (tmp_path / "0.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save(Bomb(), tmp_path / "1.pt")
    for index in range(2):
        with pytest.raises(ValueError, match="holds more than a tensor"):
            GeneratedAudioTextDataset(tmp_path)[index]
    assert not (tmp_path / "exploded").exists()


def test_a_delimiter_of_its_own_reads_back(tmp_path):
    torch.save(torch.tensor([3, 0, -1, -1, -2, 5, 0]), tmp_path / "0.pt")
    speech, text = GeneratedAudioTextDataset(tmp_path, delimiter_id=-2)[0]
    assert (speech.tolist(), text.tolist()) == ([3, 0], [5, 0])


def labels(folder, **changes) -> None:
    columns = {
        "source": [[1, 2], [3], [4, 5, 6], [7], []],
        "target": [[7], [8, 9], [10], [], [1]],
        "mean_logprob": [-0.1, -2.0, -0.3, -0.1, -0.1],
        "finished": [True, True, False, True, True],
    } | changes
    types = {"source": pa.list_(pa.int8()), "target": pa.list_(pa.uint16())}
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), folder / "labels-00000.parquet")


def test_labels_are_read_and_filtered(tmp_path):
    labels(tmp_path)
    pairs = [[ids.tolist() for ids in pair] for pair in LabelledDataset(tmp_path)]
    assert pairs == [[[1, 2], [7]], [[3], [8, 9]]], "empty ones teach nothing"
    assert all(ids.dtype == torch.int64 for ids in LabelledDataset(tmp_path)[0])
    assert len(LabelledDataset(tmp_path, finished_only=False)) == 3
    assert [pair[0].tolist() for pair in LabelledDataset(tmp_path, min_mean_logprob=-1.0)] == [[1, 2]]
    with pytest.raises(ValueError, match="passes the filter"):
        LabelledDataset(tmp_path, min_mean_logprob=0.0)
    with pytest.raises(ValueError, match="no labels in"):
        LabelledDataset(tmp_path / "none")
    # imported rows have no score, and rows of a model without end-of-sequence no end
    labels(tmp_path, mean_logprob=pa.nulls(5, pa.float32()), finished=pa.nulls(5, pa.bool_()))
    assert len(LabelledDataset(tmp_path)) == 3


def test_what_spear_fast_label_writes_is_read(tmp_path):
    from spear_fast.labelling import import_rows
    from spear_fast.labelling.rows_pt import RowFormat

    (tmp_path / "rows").mkdir()
    written = []
    for index in range(12):
        written.append(([index % 10, 3, 5], [1 + index % 11, 4]))
        torch.save(torch.tensor([*written[-1][0], 10, -1, *written[-1][1], 12]), tmp_path / "rows" / f"{index}.pt")
    import_rows(tmp_path / "rows", tmp_path / "labels", RowFormat(num_speech_ids=10, num_text_ids=12), rows_per_shard=5)
    assert [tuple(ids.tolist() for ids in pair) for pair in LabelledDataset(tmp_path / "labels")] == written


def test_speech_is_padded_with_its_own_pad():
    speech, text = Collate([-1, 0])(
        [(torch.tensor([0, 4]), torch.tensor([3])), (torch.tensor([5]), torch.tensor([2, 1]))]
    )
    assert speech.tolist() == [[0, 4], [5, -1]]
    assert text.tolist() == [[3, 0], [2, 1]]
    with pytest.raises(ValueError, match="must give 2 tensors a row, got 1"):
        Collate([-1, 0])([torch.tensor([1])])


def test_raw_audio_and_strings_are_not_padded():
    audio, text = Collate([-1, 0])([(torch.zeros(5), "one"), (torch.zeros(3), "two")])
    assert [len(wave) for wave in audio] == [5, 3]
    assert text == ["one", "two"]


def rows_of(batches) -> list[int]:
    return [row for batch in batches for row in batch]


def test_every_epoch_has_every_row_in_its_own_order():
    sampler = ShuffledBatchSampler(50, 8, seed=1)
    first = list(sampler)
    assert [len(batch) for batch in first] == [8] * 6 + [2]
    assert len(sampler) == 7
    sampler.epoch = 1
    second = list(sampler)
    sampler.epoch = 0
    assert sorted(rows_of(first)) == sorted(rows_of(second)) == list(range(50))
    assert first != second
    assert list(sampler) == first
    assert [len(batch) for batch in ShuffledBatchSampler(50, 8, drop_last=True)] == [8] * 6
    assert list(ShuffledBatchSampler(50, 8, seed=2)) != first


@pytest.mark.parametrize("budget", [1, 60, 300, 10_000])
def test_a_token_budget_is_kept_and_used(budget):
    lengths = torch.randint(1, 120, (500,), generator=torch.Generator().manual_seed(0))
    sampler = TokenBudgetBatchSampler(lengths, budget, seed=3)
    epochs = [list(sampler.batches(epoch)) for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    for batches in epochs:
        assert sorted(rows_of(batches)) == list(range(500))
        tokens = [int(lengths[batch].sum()) for batch in batches]
        assert all(len(batch) == 1 or count <= budget for batch, count in zip(batches, tokens, strict=True))
    if budget == 300:
        padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
        assert padded < 1.1 * int(lengths.sum()), "rows of about one length"
        assert sum(tokens) > 0.8 * 300 * len(batches), "and as many as fit, padding not counted"


def test_the_batches_of_processes_are_those_of_one_dealt_out():
    def taken(start, stride, count=20):
        endless = EndlessBatches(ShuffledBatchSampler(10, 3, seed=1), stride=stride)
        endless.start = start
        return [batch for batch, _ in zip(endless, range(count), strict=False)]

    whole = taken(0, 1, 60)
    # 4 batches an epoch
    assert sorted(rows_of(whole[:4])) == sorted(rows_of(whole[4:8])) == list(range(10))
    assert whole[:4] != whole[4:8]
    for rank in range(3):
        assert taken(rank, 3) == whole[rank::3]
    assert taken(13, 1) == whole[13:33]


def test_a_sampler_serves_a_loader():
    data = [(torch.arange(length), torch.arange(2)) for length in (3, 9, 4, 10, 5)]
    loader = DataLoader(data, batch_sampler=TokenBudgetBatchSampler(lengths_of(data), 24), collate_fn=Collate([-1, 0]))
    assert sum(len(speech) for speech, _ in loader) == 5


def test_lengths_are_those_of_all_columns(tmp_path):
    data = [(torch.arange(length), torch.arange(2)) for length in (3, 9, 4)]
    assert lengths_of(data).tolist() == [5, 11, 6]
    assert lengths_of([torch.arange(3), torch.arange(1)]).tolist() == [3, 1]
    assert lengths_of(Subset(ConcatDataset([data, data[:1]]), [3, 1])).tolist() == [5, 11]
    labels(tmp_path)
    labelled = LabelledDataset(tmp_path, finished_only=False)
    assert lengths_of(labelled).tolist() == [sum(map(len, pair)) for pair in labelled]


def test_mock_dataset():
    data = MockDataset(3)
    assert len(data) == 3
    assert data[0].shape == (1024,)
    assert data[0].dtype == torch.float32
