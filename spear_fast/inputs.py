"""What goes into a model: ids of it, strings or audio, with masks, ends of sequence and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spear_fast import ids as token_ids
from spear_fast.transformer import Transformer

Modality = Literal["speech", "text"]
Source = Tensor | list[str]


class InputMixin(nn.Module):
    """The part of `TextToSemantic` that reads what it is given."""

    wav2vec: nn.Module | None
    tokenizer_encode: Callable[[list[str]], Tensor] | None
    token_emb: nn.ModuleDict
    start_token: nn.ParameterDict
    source_transformer: Transformer
    pad_id: dict[str, int]
    eos_id: dict[str, Any]
    autoset_eos_id: dict[str, bool]

    @property
    def device(self) -> torch.device:
        """The device of the parameters, to which sources are moved."""
        return self.start_token["speech"].device

    def to_ids(
        self,
        source: Source,
        modality: Modality,
        name: str,
        input_sample_hz: int | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns int64 ids `[batch, length]` on the model's device, from ids, strings or (for speech) raw audio.

        input_sample_hz: sample rate of raw audio in Hz; passed on to `wav2vec`, which resamples.
        mask: `[batch, length]`, bool, False where an id may have any value; by default the pads may.

        Raises TypeError on anything else, ValueError on strings or audio without the module that reads them, and for
        ids outside the vocabulary that are on the CPU.
        """
        return self._given_ids(source, modality, name, input_sample_hz, mask=mask).to(self.device)

    def _given_ids(
        self,
        source: Source,
        modality: Modality,
        name: str,
        input_sample_hz: int | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns what `to_ids` does, where it has been given."""
        token_ids.check_modality(modality, name)
        if isinstance(source, (list, tuple)) and all(isinstance(text, str) for text in source):
            if modality != "text":
                raise ValueError(f"{name} is a list of strings, which is text, but its type is {modality!r}.")
            if self.tokenizer_encode is None:
                raise ValueError(f"{name} is a list of strings, but the model has no tokenizer_encode; pass token ids.")
            source = self.tokenizer_encode(list(source))
        if not isinstance(source, Tensor):
            raise TypeError(f"{name} must be a tensor of ids or a list of strings, got {type(source).__name__}.")
        if source.is_floating_point() and modality == "speech":
            audio = source.to(self.device)
            source = token_ids.from_audio(self.wav2vec, audio, name, input_sample_hz=input_sample_hz)
        ids = token_ids.as_ids(source, name)
        if not ids.shape[0]:
            raise ValueError(f"{name} must have at least one row, got an empty batch.")
        if mask is None or mask.shape != ids.shape:
            mask = ids != self.pad_id[modality]
        # before the move: an accelerator that embeds a wrong id is lost to its whole process
        token_ids.check_range(ids, mask, self.token_emb[modality].num_embeddings, name)  # type: ignore[arg-type]
        return ids

    def _with_eos(
        self, ids: Tensor, mask: Tensor | None, modality: Modality, name: str, add_eos: bool
    ) -> tuple[Tensor, Tensor]:
        vocab_size = self.token_emb[modality].num_embeddings
        pad_id = self.pad_id[modality]
        if token_ids.is_wide_mask(mask, ids, int(add_eos)):
            return self._with_eos(ids, None, modality, name, add_eos)[0], mask.to(ids.device, torch.bool)  # type: ignore[union-attr]
        if mask is None:
            mask = token_ids.validity_mask(ids, pad_id, vocab_size)  # type: ignore[arg-type]
        else:
            mask = token_ids.checked_mask(mask, ids, f"{name}_mask")
        return token_ids.append_eos(ids, mask, self.eos_id[modality], pad_id) if add_eos else (ids, mask)

    def _embeddable(self, ids: Tensor, mask: Tensor, modality: Modality) -> Tensor:
        vocab_size: int = self.token_emb[modality].num_embeddings  # type: ignore[assignment]
        safe = token_ids.embeddable(ids, self.pad_id[modality], vocab_size)
        # under an explicit mask anything may stand outside it
        return torch.where(mask, safe, safe.clamp(0, vocab_size - 1))

    def _embed(self, ids: Tensor, mask: Tensor, modality: Modality) -> Tensor:
        return self.token_emb[modality](self._embeddable(ids, mask, modality))

    def encode(
        self,
        source: Source,
        *,
        source_type: Modality,
        source_mask: Tensor | None = None,
        input_sample_hz: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns memory `[batch, length, dim]`, its mask `[batch, length]` bool and the ids `[batch, length]`.

        source: ids `[batch, n]` of any integer type, a list of strings, or raw audio `[batch, samples]`.
        source_mask: `[batch, n]`, bool; by default every id but the trailing pads. `length` is n plus the
            end-of-sequence where that is set automatically; a mask of that length is used as it is, as the reference
            does. input_sample_hz: sample rate of raw audio in Hz; see `to_ids`.

        The memory has the parameters' type, under autocast what a norm gives there. Raises as `to_ids`, and ValueError
        for ids outside the vocabulary (on a CPU), a mask of another shape, or an empty source.
        """
        ids, mask = self._source(source, source_type, source_mask, input_sample_hz)
        return self.source_transformer(self._embed(ids, mask, source_type), mask), mask, ids

    def _source(
        self, source: Source, source_type: Modality, mask: Tensor | None, input_sample_hz: int | None
    ) -> tuple[Tensor, Tensor]:
        """Returns what the encoder reads: ids and mask `[batch, length]`, the end-of-sequence included."""
        ids, mask = self._given_source(source, source_type, mask, input_sample_hz)
        return ids.to(self.device), mask.to(self.device)

    def _given_source(
        self, source: Source, source_type: Modality, mask: Tensor | None, input_sample_hz: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns what `_source` does, where it has been given."""
        ids = self._given_ids(source, source_type, "source", input_sample_hz, mask=mask)
        ids, mask = self._with_eos(ids, mask, source_type, "source", self.autoset_eos_id[source_type])
        if not ids.shape[-1]:
            raise ValueError("source must hold at least one id, got an empty one and no automatic end-of-sequence.")
        return ids, mask
