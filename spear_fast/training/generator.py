"""The reference's generator of a pseudo-labelled dataset, resumable: one `.pt` row an utterance."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from spear_fast.distributed import is_distributed
from spear_fast.model import TextToSemantic
from spear_fast.training.data import Collate


class SemanticToTextDatasetGenerator(nn.Module):
    """Labels a dataset of speech (ids or raw audio) and saves `<speech ids> <delimiter> <text ids>` rows.

    A row's file is named by its index in the dataset. Files that are there are kept: started again, it goes on, and
    several processes share the work. For large jobs `spear-fast label` is the better tool: shards, scores, ids.

    dataset: gives a tensor, or a tuple that holds one, an utterance. audio_pad_id, text_pad_id: removed from the ends
    of rows (default: the model's); end-of-sequence ids are removed too, since training appends its own.
    """

    def __init__(
        self,
        model: TextToSemantic,
        *,
        dataset: Dataset[Any],
        folder: str = "./generated-audio-text-pairs",
        batch_size: int = 4,
        delimiter_id: int = -1,
        audio_pad_id: int | None = None,
        text_pad_id: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.dataset = dataset
        self.batch_size = batch_size
        self.delimiter_id = delimiter_id
        self.audio_pad_id = model.pad_id["speech"] if audio_pad_id is None else audio_pad_id
        self.text_pad_id = model.pad_id["text"] if text_pad_id is None else text_pad_id
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True, parents=True)

    def path(self, index: int) -> Path:
        return self.folder / f"{index}.pt"

    def remaining(self) -> list[int]:
        """Returns the indices of this process's utterances that have no row yet."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)
        return [index for index in range(rank, len(self.dataset), size) if not self.path(index).exists()]  # type: ignore[arg-type]

    def forward(self, max_length: int = 2048, beam_search_decode: bool = True, **generate_kwargs: Any) -> None:
        """Labels what is not labelled yet. The arguments are those of `TextToSemantic.generate`."""
        indices = self.remaining()
        loader = DataLoader(
            Subset(self.dataset, indices), batch_size=self.batch_size, collate_fn=Collate([self.audio_pad_id])
        )
        done = 0
        for (audio,) in loader:
            sources = [audio] if isinstance(audio, Tensor) else [wave[None] for wave in audio]
            for source in sources:
                speech, text = self.model.generate(
                    source=source,
                    source_type="speech",
                    target_type="text",
                    return_source=True,
                    max_length=max_length,
                    beam_search_decode=beam_search_decode,
                    **generate_kwargs,
                )
                for speech_ids, text_ids in zip(speech, text, strict=True):
                    self._save(indices[done], speech_ids, text_ids)
                    done += 1

    def _save(self, index: int, speech_ids: Tensor, text_ids: Tensor) -> None:
        halves = [
            _stripped(speech_ids, self.audio_pad_id, self.model.eos_id["speech"]),
            _stripped(text_ids, self.text_pad_id, self.model.eos_id["text"]),
        ]
        if any((half == self.delimiter_id).any() for half in halves):
            raise ValueError(
                f"delimiter_id must not be a token, got {self.delimiter_id}, which row {index} holds; take -1."
            )
        row = torch.cat((halves[0], torch.tensor([self.delimiter_id]), halves[1]))
        # renamed only when whole: a killed run leaves no half row that the next would take for done
        unfinished = self.path(index).with_suffix(f".tmp{os.getpid()}")
        torch.save(row, unfinished)
        unfinished.replace(self.path(index))


def _stripped(ids: Tensor, pad_id: int, eos_id: int) -> Tensor:
    ids = ids.cpu()
    kept = (ids != pad_id) & (ids != eos_id)
    return ids[: int(kept.nonzero().max()) + 1] if kept.any() else ids[:0]
