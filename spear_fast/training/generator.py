"""The reference's generator of a pseudo-labelled dataset, resumable: one `.pt` row an utterance."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from spear_fast.checkpoints.model_config import read_json
from spear_fast.checkpoints.weights import fingerprint
from spear_fast.losses.gather import is_distributed
from spear_fast.model import TextToSemantic
from spear_fast.training.checkpoints import remove_unfinished, write_whole
from spear_fast.training.data import Collate, speech_ids
from spear_fast.training.trainer_arguments import check_trainer_arguments

JOB_NAME = "generator.json"
# arguments of `generate` whose results a row would not show, with their defaults
_NOT_SAVED = {"num_return_sequences": 1, "return_source": False, "return_target_mask": False, "return_alignment": False}


class SemanticToTextDatasetGenerator(nn.Module):
    """Labels a dataset of speech, ids or raw audio, and saves rows of speech ids, a delimiter, text ids.

    As the reference's class (reference line 1312), but resumable.

    A row's file is named by its index in the dataset, and is there whole or not at all. Started again it resumes after
    the rows that are there, also with a longer dataset or another number of processes, which share the work. Another
    model or other options on the same folder are an error. Pads and ends of sequence are left out: training appends
    its own. For large jobs `spear-fast label` is the better tool: batches by length, shards, scores, ids.

    dataset: gives a tensor, or a tuple that holds one, an utterance. delimiter_id: no token's id.
    audio_pad_id: pad at the end of the ids that the dataset gives, where it is not the model's.
    text_pad_id: taken for the reference's signature; the ends of texts are known from decoding.
    input_sample_hz: sample rate of raw audio, passed on to the model's `wav2vec`.
    """

    def __init__(
        self,
        model: TextToSemantic,
        *,
        dataset: Dataset[Any],
        folder: str | Path = "./generated-audio-text-pairs",
        batch_size: int = 4,
        delimiter_id: int = -1,
        audio_pad_id: int | None = None,
        text_pad_id: int | None = 0,
        input_sample_hz: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, TextToSemantic):
            raise TypeError(
                f"model must be a spear_fast.TextToSemantic, got {type(model).__name__}; spear_fast.accelerate makes "
                "one of the reference's."
            )
        if 0 <= delimiter_id < max(model.num_semantic_token_ids, model.num_text_token_ids) + 1:
            raise ValueError(f"delimiter_id must not be a token's id, got {delimiter_id}; take -1.")
        check_trainer_arguments({"batch_size": batch_size, "input_sample_hz": input_sample_hz})
        self.model = model
        self.dataset = dataset
        self.batch_size = batch_size
        self.delimiter_id = delimiter_id
        self.audio_pad_id = audio_pad_id
        self.text_pad_id = text_pad_id
        self.input_sample_hz = input_sample_hz
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True, parents=True)

    def path(self, index: int) -> Path:
        """Returns where the row of an utterance is, or will be."""
        return self.folder / f"{index}.pt"

    def remaining(self) -> list[int]:
        """Returns the indices of this process's utterances that have no row yet."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        present = {path.name for path in self.folder.glob("*.pt")}
        mine = range(rank, len(self.dataset), size)  # type: ignore[arg-type]
        return [index for index in mine if self.path(index).name not in present]

    def forward(self, max_length: int = 2048, beam_search_decode: bool = True, **generate_kwargs: Any) -> None:
        """Labels what is not labelled yet. The arguments are those of `TextToSemantic.generate`.

        Raises ValueError when the folder's rows are of another model or other options, or for an option whose result a
        row has no room for.
        """
        options = {"max_length": max_length, "beam_search_decode": beam_search_decode, **generate_kwargs}
        unused = [name for name, default in _NOT_SAVED.items() if options.get(name, default) != default]
        if unused:
            raise ValueError(f"a row has room for one text alone, got {unused[0]}; leave it out.")
        remove_unfinished(self.folder, "*.pt", seconds=3600)
        remove_unfinished(self.folder, JOB_NAME, seconds=3600)
        self._check_job(options)
        indices = self.remaining()
        pad_id = self.model.semantic_pad_id
        loader = DataLoader(Subset(self.dataset, indices), batch_size=self.batch_size, collate_fn=_rows)
        for number, rows in enumerate(loader):
            sources = [self._ids(row) for row in rows]
            batch = nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=pad_id)
            result = self.model.generate(batch, source_type="speech", target_type="text", return_result=True, **options)
            numbers = indices[number * self.batch_size : number * self.batch_size + len(rows)]
            texts = zip(result.tokens[:, 0].cpu(), result.lengths[:, 0].tolist(), strict=True)
            for index, source, (text, length) in zip(numbers, sources, texts, strict=True):
                row = torch.cat((source.cpu(), torch.tensor([self.delimiter_id]), text[:length]))
                write_whole(self.path(index), partial(torch.save, row))

    def _ids(self, row: Tensor) -> Tensor:
        """Returns the speech ids of one row of the dataset, `[n]`, without pads and end-of-sequence."""
        if row.is_floating_point():
            row = speech_ids(
                [row], self.model.wav2vec, self.model.device, pad_id=-1, input_sample_hz=self.input_sample_hz
            )[0]
        is_end = row == self.model.semantic_pad_id
        if self.model.autoset_eos_id["speech"]:
            is_end |= row == self.model.eos_id["speech"]
        if self.audio_pad_id is not None:
            is_end |= row == self.audio_pad_id
        tokens = (~is_end).nonzero().flatten()
        return row[: int(tokens[-1]) + 1].long() if len(tokens) else row[:0].long()

    def _check_job(self, options: dict[str, Any]) -> None:
        """Raises ValueError when the folder's rows are of another model or other options; else notes them there."""
        job = {"model": fingerprint(self.model), "delimiter_id": self.delimiter_id, "options": options}
        # functions and generators of random numbers by what they are
        job = json.loads(json.dumps(job, default=lambda value: getattr(value, "__qualname__", type(value).__name__)))
        path = self.folder / JOB_NAME
        if not path.exists():
            write_whole(path, lambda file: file.write(json.dumps(job, indent=1).encode() + b"\n"))
            return
        before = read_json(path)
        if not isinstance(before, dict):
            raise ValueError(f"{path} must hold an object, got {type(before).__name__}; give another folder.")
        other = [name for name in job if before.get(name) != job[name]]
        if other:
            raise ValueError(
                f"{self.folder} holds rows generated with another {' and '.join(other)}; give another folder, or "
                "delete this one."
            )


def _rows(batch: list[Any]) -> list[Tensor]:
    # a tuple of one, as the reference's loader makes of everything; and pads of others come off later
    Collate([0])(batch)
    return [row[0] if isinstance(row, (tuple, list)) else row for row in batch]
