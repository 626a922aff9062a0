"""The three training wrappers of the reference: pretraining, speech to text, text to speech tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spear_fast.ids import check_range, from_audio, validity_mask
from spear_fast.model import TextToSemantic


def subset_mask(mask: Tensor, fraction: float) -> Tensor:
    """Returns a bool mask like `mask` `[batch, length]` with `fraction` of each row's True positions, at random."""
    count = mask.sum(dim=-1, keepdim=True) * fraction
    order = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1).argsort(dim=-1)
    # in a full row the order is a random permutation, and the reference's draw for the same seed; where pads sort
    # first only ranks count right
    ranks = order.argsort(dim=-1) - (~mask).sum(dim=-1, keepdim=True)
    return (torch.where(mask.all(dim=-1, keepdim=True), order, ranks) < count) & mask


def _pack_left(ids: Tensor, keep: Tensor, pad_id: int) -> Tensor:
    """Returns the ids of each row where `keep` is True, in order, padded at the end to the longest row."""
    order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)
    counts = keep.sum(dim=-1, keepdim=True)
    packed = ids.gather(-1, order).masked_fill(torch.arange(ids.shape[-1], device=ids.device) >= counts, pad_id)
    return packed[:, : int(counts.max())] if ids.numel() else packed


class SpeechSpeechPretrainWrapper(nn.Module):
    """Denoising pretraining on speech tokens: the target is what was deleted, or the whole (reference line 1183).

    wav2vec: of raw audio; by default the model's. deletion_prob: fraction of each row's tokens that is deleted (the
        paper: 0.6). reconstruct_seq: the target is the whole sequence. mask_id: deleted tokens become this id instead.

    Raises ValueError when a probability or the id is out of range, or `mask_id` comes without `reconstruct_seq`.
    """

    def __init__(
        self,
        model: TextToSemantic,
        wav2vec: nn.Module | None = None,
        deletion_prob: float = 0.6,
        reconstruct_seq: bool = False,
        mask_id: int | None = None,
    ) -> None:
        super().__init__()
        if mask_id is not None and not reconstruct_seq:
            raise ValueError("mask_id needs reconstruct_seq=True, got False.")
        if not 0 <= deletion_prob <= 1:
            raise ValueError(f"deletion_prob must be in [0, 1], got {deletion_prob}.")
        if mask_id is not None and not 0 <= mask_id < model.semantic_token_emb.num_embeddings:
            raise ValueError(f"mask_id must be an id that the model has, got {mask_id}.")
        self.model = model
        self.wav2vec = model.wav2vec if wav2vec is None else wav2vec
        self.deletion_prob = deletion_prob
        self.reconstruct_seq = reconstruct_seq
        self.mask_id = mask_id

    def forward(self, x: Tensor, return_early_exit_loss: bool = False, *, return_logits: bool = True) -> Any:
        """Returns loss `[]`, in nats per token, and logits `[batch, vocabulary, labels]`; the loss alone is quicker.

        x: semantic ids `[batch, length]`, padded at the end with the model's `semantic_pad_id`, or raw audio
        `[batch, samples]`.
        """
        pad_id = self.model.semantic_pad_id
        if x.is_floating_point():
            x = from_audio(self.wav2vec, x.to(self.model.device), "x", flatten=False)
        # an end of sequence may be among them
        check_range(x, x != pad_id, self.model.num_semantic_token_ids + 1, "x")
        # ids stay where they are: the model packs those that come in on the CPU, and nothing waits for a GPU
        x = x.long()
        mask = validity_mask(x, pad_id, self.model.num_semantic_token_ids)
        deleted = subset_mask(mask, self.deletion_prob)
        if self.mask_id is not None:
            source = x.masked_fill(deleted, self.mask_id)
        else:
            source = _pack_left(x, mask & ~deleted, pad_id)
        target = x if self.reconstruct_seq else _pack_left(x, deleted, pad_id)
        return self.model(
            source,
            target,
            source_type="speech",
            target_type="speech",
            return_loss=True,
            return_logits=return_logits,
            return_early_exit_loss=return_early_exit_loss,
        )


class SemanticToTextWrapper(nn.Module):
    """Speech tokens to text: back-translation, and what labels speech (reference line 1250)."""

    def __init__(self, model: TextToSemantic) -> None:
        super().__init__()
        self.model = model

    def forward(self, semantic_token_ids: Tensor, grapheme_token_ids: Tensor, *, return_logits: bool = True) -> Any:
        """Returns loss and logits as `TextToSemantic.forward` does, or the loss alone. Ids: `[batch, length]`."""
        return self.model(
            semantic_token_ids,
            grapheme_token_ids,
            source_type="speech",
            target_type="text",
            return_loss=True,
            return_logits=return_logits,
        )


class TextToSemanticWrapper(nn.Module):
    """Text to speech tokens, with the loss of the early exit where there is one (reference line 1280)."""

    def __init__(self, model: TextToSemantic) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        grapheme_token_ids: Tensor,
        semantic_token_ids: Tensor,
        return_early_exit_loss: bool = True,
        *,
        return_logits: bool = True,
    ) -> Any:
        """Returns loss and logits as `TextToSemantic.forward` does, or the loss alone. Ids: `[batch, length]`."""
        return self.model(
            grapheme_token_ids,
            semantic_token_ids,
            source_type="text",
            target_type="speech",
            return_loss=True,
            return_logits=return_logits,
            return_early_exit_loss=return_early_exit_loss,
        )
