"""What training minimises, of padded and of packed batches: of tokens, of an early exit, and the regulariser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spear_fast import ids as token_ids
from spear_fast.inputs import InputMixin, Modality
from spear_fast.layers import is_plain
from spear_fast.losses.similarity import alignment_loss, pool, pool_packed
from spear_fast.losses.tokens import token_loss
from spear_fast.packing import PackedBatch, packed_batch, row_lengths
from spear_fast.transformer import Transformer, unpackable


class ObjectiveMixin(InputMixin):
    """The part of `TextToSemantic` that computes losses."""

    target_transformer: Transformer
    to_logits: nn.ModuleDict
    early_exit_layer: int | None
    detach_early_exit_embed: bool
    align_reg_loss_weight: float
    align_reg_use_logsumexp_pool: bool
    align_reg_logsumexp_pool_temp: float

    def pack(
        self,
        source: Tensor,
        source_mask: Tensor,
        target: Tensor,
        target_mask: Tensor,
        *,
        source_type: Modality,
        target_type: Modality,
        regularised: bool,
    ) -> PackedBatch | None:
        """Returns a batch without its padding, on the model's device; None where it must be computed padded.

        That is where ids are on an accelerator already, a row has a hole or there is nothing to predict, and where
        modules of the model have been replaced or are watched.

        source, target: ids `[batch, length]`, int64, ends of sequence included. Masks: bool, of the same shapes.
        regularised: whether the regulariser takes part: it looks at all positions of the decoder.
        """
        if torch.compiler.is_compiling() or any(map(unpackable, (self.source_transformer, self.target_transformer))):
            return None
        # hooks see what they saw before
        if not is_plain(self.to_logits[target_type]) or any(map(_is_watched, self.token_emb.values())):
            return None
        source_lengths, target_lengths = row_lengths(source_mask), row_lengths(target_mask)
        if source_lengths is None or target_lengths is None or not target_lengths.any():
            return None
        # the pool of a row without positions is no number
        if not source_lengths.any() or (regularised and not source_lengths.all()):
            return None
        source, target = (
            token_ids.embeddable(ids, self.pad_id[kind], self._vocabulary(kind))
            for ids, kind in ((source, source_type), (target, target_type))
        )
        return packed_batch(source, source_lengths, target, target_lengths, self.device, whole=regularised)

    def packed_loss(
        self,
        batch: PackedBatch,
        *,
        source_type: Modality,
        target_type: Modality,
        drop_prob: float = 0.0,
        regularised: bool = False,
        early_exit: bool = False,
    ) -> Tensor:
        """Returns the loss of a packed batch, [], which `forward` returns of the padded one; reads nothing back.

        batch: of `pack`, with the same `regularised`. drop_prob: probability of a row's training without its source.
        early_exit: adds the loss of the early-exit head.
        """
        source_ids, inputs = batch.source.shaped(batch.source_ids), self.token_emb[target_type](batch.inputs)
        memory = self.source_transformer(self.token_emb[source_type](source_ids), reads=batch.source.reads_itself())
        dropped = self._dropped(batch.source.rows, drop_prob)
        embedded = torch.where(batch.is_start[:, None], self.start_token[target_type], inputs)
        output = self.target_transformer(
            batch.target.shaped(embedded),
            context=memory,
            reads=batch.target.reads_itself(),
            context_reads=batch.target.reads(batch.source, dropped),
            hidden_of=self.early_exit_layer if early_exit else None,
        )
        hidden = output[0] if early_exit else output
        dim = hidden.shape[-1]

        def predicting(states: Tensor) -> Tensor:
            states = states.reshape(-1, dim)
            return states if batch.predicting is None else states.index_select(0, batch.predicting)

        loss = token_loss(predicting(hidden), self.to_logits[target_type], batch.labels)
        if early_exit:
            loss = loss + self._early_exit_loss(predicting(output[1]), batch.labels)
        if not regularised or dropped is None:
            return loss
        source = pool_packed(memory, batch.source, self._pool_temperature)
        target = pool_packed(hidden, batch.target, self._pool_temperature)
        return loss + alignment_loss(source, target, dropped) * self.align_reg_loss_weight

    def _padded_regulariser(
        self, memory: Tensor, source_mask: Tensor, hidden: Tensor, target_mask: Tensor, dropped: Tensor
    ) -> Tensor:
        source = pool(memory, source_mask, self._pool_temperature)
        target = pool(hidden, target_mask, self._pool_temperature)
        return alignment_loss(source, target, dropped) * self.align_reg_loss_weight

    @property
    def _pool_temperature(self) -> float | None:
        return self.align_reg_logsumexp_pool_temp if self.align_reg_use_logsumexp_pool else None

    def _dropped(self, rows: int, drop_prob: float) -> Tensor | None:
        """Returns which rows train without their source, `[rows]`, bool; None where none may."""
        return torch.rand(rows, device=self.device) < drop_prob if drop_prob > 0 else None

    def _early_exit_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self.detach_early_exit_embed:
            hidden = hidden.detach()
        residual, norm, to_logits = self.to_early_exit_semantic_logits  # type: ignore[misc]
        return token_loss(norm(residual(hidden)), to_logits, labels)

    def _check_early_exit(self, source_type: Modality, target_type: Modality) -> None:
        if self.early_exit_layer is None:
            raise ValueError("return_early_exit_loss needs a model built with target_early_exit_layer, got None.")
        if (source_type, target_type) != ("text", "speech"):
            raise ValueError(f"the early exit is from text to speech only, got {source_type} to {target_type}.")

    def _vocabulary(self, modality: Modality) -> int:
        embedding: Any = self.token_emb[modality]
        return int(embedding.num_embeddings)


def _is_watched(module: nn.Module) -> bool:
    return type(module) is not nn.Embedding or bool(module._forward_hooks or module._forward_pre_hooks)
