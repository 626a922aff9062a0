"""Small models, data and settings that the tests of training share, and the reference's trainers made usable."""

from __future__ import annotations

import sys

import torch
from reference import load_reference
from torch.utils.data import Dataset, TensorDataset

from spear_fast import TextToSemantic

SIZES = dict(
    dim=32, source_depth=3, target_depth=1, heads=2, dim_head=16, num_text_token_ids=12, num_semantic_token_ids=10
)


def model(seed: int = 3, **changes) -> TextToSemantic:
    torch.manual_seed(seed)
    return TextToSemantic(**{**SIZES, **changes})


class Rows(Dataset):
    """A list as a dataset: the reference's trainers take nothing else."""

    def __init__(self, rows) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.rows[index]


def speech(rows: int = 8) -> Rows:
    return Rows(pairs(rows).tensors[0])


def pairs(rows: int = 8) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    speech = torch.randint(0, 10, (rows, 7), generator=generator)
    text = torch.randint(1, 12, (rows, 5), generator=generator)
    return TensorDataset(speech, text)


def uneven(rows: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of different lengths, with the real id 0 among those of speech."""
    return [(torch.arange(4 + row % 5) % 10, (torch.arange(2 + row % 3) + row) % 11 + 1) for row in range(rows)]


def settings(folder, **changes):
    base = dict(
        num_train_steps=6, num_warmup_steps=2, batch_size=4, valid_frac=0, results_folder=str(folder), log_every=1000
    )
    return {**base, **changes}


def reference_model(seed: int = 3, **changes):
    torch.manual_seed(seed)
    return load_reference().TextToSemantic(**{**SIZES, **changes})


def reference_trainers():
    """The reference's module of trainers; its flag that allows one a process is down again."""
    load_reference()
    trainers = sys.modules["spear_tts_pytorch.trainer"]
    trainers.ONE_TRAINER_INSTANTIATED = False
    return trainers


def same_weights(one, other) -> bool:
    """Whether two models hold the same bits."""
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())
