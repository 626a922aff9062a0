"""Token ids on their way into a model: masks, end-of-sequence, range checks.

Padding stands at the end of a row. A pad id inside a row is an ordinary token when the vocabulary has it
(text id 0, say), and a hole otherwise (speech id -1); the reference cut rows at the first one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spear_fast.evaluation import evaluation_mode

IGNORED_LABEL = -100


def as_ids(ids: Tensor, name: str) -> Tensor:
    """Returns `ids` as int64 `[batch, length]`; a one-dimensional tensor is one row.

    Raises ValueError when the tensor is not of an integer type or not one- or two-dimensional.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must hold token ids of an integer type, got {ids.dtype}; pass int64 ids.")
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2:
        raise ValueError(f"{name} must have shape [batch, length], got {list(ids.shape)}; pad the rows to one length.")
    return ids.long()


def check_modality(modality: object, name: str) -> None:
    """Raises ValueError unless `modality` is "speech" or "text"."""
    if modality not in ("speech", "text"):
        raise ValueError(f"the type of {name} must be 'speech' or 'text', got {modality!r}.")


@torch.no_grad()
def from_audio(
    wav2vec: nn.Module | None, audio: Tensor, name: str, *, input_sample_hz: int | None = None, **kwargs: Any
) -> Tensor:
    """Returns what `wav2vec` makes of raw audio: ids `[batch, length]`.

    audio: `[batch, samples]` or `[samples]`, of any float type.
    input_sample_hz: its sample rate, passed on, as are `kwargs`.
    Raises ValueError when there is no `wav2vec`, or shape, rate or values are none of audio.
    """
    if wav2vec is None:
        raise ValueError(
            f"{name} is raw audio, but there is no wav2vec module; pass semantic token ids, or "
            "wav2vec= where the model is made or loaded."
        )
    if audio.ndim not in (1, 2):
        raise ValueError(f"{name} must be audio [batch, samples], got {list(audio.shape)}; mix channels down to one.")
    if not bool(torch.isfinite(audio).all()):
        raise ValueError(f"{name} must be finite, got audio with NaN or infinite samples; read the file again.")
    if input_sample_hz is not None:
        if not isinstance(input_sample_hz, int) or input_sample_hz < 1:
            raise ValueError(f"input_sample_hz must be a whole number of Hz, at least 1, got {input_sample_hz!r}.")
        kwargs["input_sample_hz"] = input_sample_hz
    dtypes = [parameter.dtype for parameter in wav2vec.parameters() if parameter.is_floating_point()]
    audio = audio[None] if audio.ndim == 1 else audio
    with evaluation_mode(wav2vec):
        return wav2vec(audio.to(dtypes[0] if dtypes else torch.float32), **kwargs)


def validity_mask(ids: Tensor, pad_id: int, vocab_size: int) -> Tensor:
    """Returns bool `[batch, length]`: True where a position holds a token rather than padding.

    ids: `[batch, length]`, int64. vocab_size: how many ids the embedding has.
    """
    is_token = ids != pad_id
    if not 0 <= pad_id < vocab_size:
        return is_token
    # true from the last token backwards: only trailing pads are padding
    return is_token.flip(-1).cumsum(dim=-1).flip(-1) > 0


def checked_mask(mask: Tensor, ids: Tensor, name: str) -> Tensor:
    """Returns `mask` as bool on the device of `ids`; raises ValueError unless it is `[batch, length]` like `ids`."""
    if mask.shape != ids.shape:
        raise ValueError(
            f"{name} must have the shape of its ids {list(ids.shape)}, got {list(mask.shape)}; "
            "give one flag per id, without end-of-sequence or start."
        )
    return mask.to(device=ids.device, dtype=torch.bool)


def is_wide_mask(mask: Tensor | None, ids: Tensor, extra: int) -> bool:
    """Returns whether `mask` also covers the `extra` positions that the model adds to `ids` `[batch, length]`.

    That is the only form of an explicit mask that the reference takes.
    """
    return mask is not None and extra > 0 and mask.shape == (ids.shape[0], ids.shape[1] + extra)


def append_eos(ids: Tensor, mask: Tensor, eos_id: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Returns ids and mask one position longer, with `eos_id` after each row's last token.

    ids: `[batch, length]`, int64. mask: `[batch, length]`, bool.
    """
    batch, length = ids.shape
    positions = torch.arange(1, length + 1, device=ids.device)
    # the index after the last token; 0 in a row without any
    ends = (positions * mask).amax(dim=-1, keepdim=True) if length else ids.new_zeros(batch, 1)
    ids = torch.cat((ids, ids.new_full((batch, 1), pad_id)), dim=-1)
    mask = torch.cat((mask, mask.new_zeros(batch, 1)), dim=-1)
    return ids.scatter(-1, ends, eos_id), mask.scatter(-1, ends, True)


def check_range(ids: Tensor, mask: Tensor, vocab_size: int, name: str) -> None:
    """Raises ValueError when a token lies outside `0..vocab_size - 1`.

    Ids on an accelerator are not looked at: that would stop the host at every call. Check them before they move.
    Nor are they while a graph is compiled, which it would break.
    """
    if ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling():
        return
    wrong = mask.to(ids.device, torch.bool) & ((ids < 0) | (ids >= vocab_size))
    if not wrong.any():
        return
    row, position = wrong.nonzero()[0].tolist()
    raise ValueError(
        f"{name} must hold ids from 0 to {vocab_size - 1}, got {int(ids[row, position])} at row {row}, position "
        f"{position}; check that the tokenizer is the model's own."
    )


def embeddable(ids: Tensor, pad_id: int, vocab_size: int) -> Tensor:
    """Returns `ids` with pads that the embedding does not have replaced by 0: their rows are masked, never read."""
    if 0 <= pad_id < vocab_size:
        return ids
    return ids.masked_fill(ids == pad_id, 0)


def labels_of(ids: Tensor, mask: Tensor) -> Tensor:
    """Returns `ids` with everything outside `mask` set to the label that cross-entropy ignores."""
    return ids.masked_fill(~mask, IGNORED_LABEL)
