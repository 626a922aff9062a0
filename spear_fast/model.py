"""TextToSemantic: the encoder-decoder of SPEAR-TTS between text and semantic speech tokens.

Same constructor, attributes, parameter names and numerics as spear-tts-pytorch 0.4.8, so that state dicts go both
ways. Sources are read in `spear_fast.inputs`, targets generated in `spear_fast.generation`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear_fast import ids as token_ids
from spear_fast.checkpoints.hub import HubModel
from spear_fast.checkpoints.model_config import check_arguments
from spear_fast.checkpoints.weights import load_into, read_package
from spear_fast.freezing import FreezingMixin, set_requires_grad
from spear_fast.generation import GenerationMixin
from spear_fast.inputs import Modality, Source
from spear_fast.layers import FeedForward, Residual, RMSNorm
from spear_fast.losses.tokens import token_loss
from spear_fast.objective import ObjectiveMixin
from spear_fast.transformer import Transformer


class TextToSemantic(HubModel, GenerationMixin, ObjectiveMixin, FreezingMixin):
    """Text ↔ semantic speech tokens (reference line 381; arXiv 2302.03540).

    dim: model width. source_depth, target_depth: layers of encoder and decoder.
    num_text_token_ids, num_semantic_token_ids: vocabulary sizes without end-of-sequence, which gets one id more
        wherever `autoset_*_eos_id` is on.
    wav2vec: module with `codebook_size` that returns ids `[batch, length]` for waves `[batch, samples]`; it is frozen.
    tokenizer_encode: function from a list of strings to ids `[batch, length]`. use_openai_tokenizer: takes that of the
        package x-clip, with its vocabulary.
    dim_head, heads: size and number of attention heads; the size is even.
    target_kv_heads: key/value heads of the decoder's self-attention, of which `heads` is a multiple; None for all.
    attn_dropout, ff_dropout: probabilities, in training. ff_mult: inner features of a feed-forward are
        `int(dim * ff_mult * 2 / 3)`.
    semantic_pad_id, text_pad_id: pad ids; an id that the vocabulary does not have (-1) leaves every real id usable.
    cond_drop_prob: probability, for each row, of training without its source (for guidance).
    autoset_semantic_eos_id, autoset_text_eos_id: whether an end-of-sequence is appended, with the id after the last.
    attn_flash: taken for the reference's signature; the fastest exact attention is chosen anyway.
    target_early_exit_layer: decoder layer with a head of its own, from 1, for speculative decoding.
        detach_early_exit_embed: that head's loss leaves the layers under it alone.
    align_reg_loss_weight: of the regulariser in `forward`; see `alignment_loss`. align_reg_use_logsumexp_pool: pools
        positions by a log-sum-exp of temperature align_reg_logsumexp_pool_temp instead of the maximum.

    Raises ValueError, one sentence, for an argument that is of no use, or where two do not fit together.
    """

    def __init__(
        self,
        dim: int,
        *,
        source_depth: int,
        target_depth: int,
        num_text_token_ids: int | None = None,
        tokenizer_encode: Callable[[list[str]], Tensor] | None = None,
        use_openai_tokenizer: bool = False,
        wav2vec: nn.Module | None = None,
        num_semantic_token_ids: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        target_kv_heads: int | None = None,
        attn_dropout: float = 0.0,
        ff_mult: float = 4,
        ff_dropout: float = 0.0,
        semantic_pad_id: int = -1,
        text_pad_id: int = 0,
        autoset_semantic_eos_id: bool = True,
        autoset_text_eos_id: bool = True,
        attn_flash: bool = False,
        cond_drop_prob: float = 0.0,
        target_early_exit_layer: int | None = None,
        detach_early_exit_embed: bool = False,
        align_reg_loss_weight: float = 0.1,
        align_reg_use_logsumexp_pool: bool = True,
        align_reg_logsumexp_pool_temp: float = 0.1,
    ) -> None:
        super().__init__()
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if use_openai_tokenizer:
            tokenizer_encode, num_text_token_ids = _openai_tokenizer(tokenizer_encode, num_text_token_ids)
        if num_text_token_ids is None:
            raise ValueError("num_text_token_ids must be given, got None; say how many ids the text tokenizer has.")
        if wav2vec is not None:
            if not isinstance(wav2vec, nn.Module):
                raise ValueError(f"wav2vec must be a torch module with codebook_size, got {type(wav2vec).__name__}.")
            num_semantic_token_ids = int(wav2vec.codebook_size)  # type: ignore[arg-type]
        if num_semantic_token_ids is None:
            raise ValueError("num_semantic_token_ids or wav2vec must be given, got neither.")
        self.config = {
            **arguments,
            "num_text_token_ids": num_text_token_ids,
            "num_semantic_token_ids": num_semantic_token_ids,
            "use_openai_tokenizer": False,
        }
        check_arguments(self.config)
        # modules and functions are no configuration
        del self.config["wav2vec"], self.config["tokenizer_encode"]

        self.dim = dim
        self.wav2vec = wav2vec
        if wav2vec is not None:
            set_requires_grad(wav2vec, False)
        self.tokenizer: Any = None
        self.tokenizer_encode = tokenizer_encode
        self.num_semantic_token_ids = num_semantic_token_ids
        self.num_text_token_ids = num_text_token_ids
        self.semantic_pad_id = semantic_pad_id
        self.text_pad_id = text_pad_id
        self.pad_id = {"speech": semantic_pad_id, "text": text_pad_id}
        self.autoset_eos_id = {"speech": autoset_semantic_eos_id, "text": autoset_text_eos_id}
        self.eos_id = {"speech": num_semantic_token_ids, "text": num_text_token_ids}

        semantic_token_emb = nn.Embedding(num_semantic_token_ids + int(autoset_semantic_eos_id), dim)
        text_token_emb = nn.Embedding(num_text_token_ids + int(autoset_text_eos_id), dim)
        self.semantic_token_emb = semantic_token_emb
        self.token_emb = nn.ModuleDict({"speech": semantic_token_emb, "text": text_token_emb})
        self.start_token = nn.ParameterDict(
            {"speech": nn.Parameter(torch.randn(dim)), "text": nn.Parameter(torch.randn(dim))}
        )
        self.to_logits = nn.ModuleDict(
            {
                "speech": nn.Linear(dim, semantic_token_emb.num_embeddings, bias=False),
                "text": nn.Linear(dim, text_token_emb.num_embeddings, bias=False),
            }
        )
        for name, linear in self.to_logits.items():
            linear.weight = self.token_emb[name].weight

        shared: dict[str, Any] = {
            "dim": dim,
            "dim_head": dim_head,
            "heads": heads,
            "attn_dropout": attn_dropout,
            "ff_mult": ff_mult,
            "ff_dropout": ff_dropout,
        }
        self.source_transformer = Transformer(**shared, depth=source_depth)
        self.target_transformer = Transformer(
            **shared, depth=target_depth, kv_heads=target_kv_heads, causal=True, cross_attend=True
        )

        self.cond_drop_prob = cond_drop_prob
        self.align_reg_loss_weight = align_reg_loss_weight
        self.align_reg_use_logsumexp_pool = align_reg_use_logsumexp_pool
        self.align_reg_logsumexp_pool_temp = align_reg_logsumexp_pool_temp

        self.target_has_early_exit = target_early_exit_layer is not None
        self.early_exit_layer = target_early_exit_layer
        self.detach_early_exit_embed = detach_early_exit_embed
        if self.target_has_early_exit:
            self.to_early_exit_semantic_logits = nn.Sequential(
                Residual(FeedForward(dim)),
                RMSNorm(dim),
                nn.Linear(dim, semantic_token_emb.num_embeddings, bias=False),
            )

    def load(self, path: str | Path, strict: bool = True) -> dict[str, Any]:
        """Loads the `model` entry of a reference checkpoint and returns the whole package (reference line 550).

        strict: every tensor must be there and no other; see `fitted`. The file may wrap the model as `load_model` says.
        Raises FileNotFoundError, or ValueError when the file is no checkpoint or does not fit this model.
        """
        package = read_package(path)
        if strict:
            load_into(self, package["model"], path)
        else:
            self.load_state_dict(package["model"], strict=False)
        return package

    def forward(
        self,
        source: Source,
        target: Source,
        *,
        source_type: Modality,
        target_type: Modality,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        return_loss: bool = False,
        return_logits: bool = False,
        cond_drop_prob: float | None = None,
        should_sim_regularize: bool = True,
        return_early_exit_loss: bool = False,
    ) -> Any:
        """Returns logits `[batch, target length + 1, vocabulary]`, or with `return_loss` the loss, [].

        Reference line 985.
        source, target: ids `[batch, length]` of any integer type, strings, or for the source raw audio; see `encode`.
        source_mask, target_mask: `[batch, length]`, bool, over the ids as given. The reference's form is taken
            too: over source and its end-of-sequence; over start vector, target and, with `return_loss`, its
            end-of-sequence.
            That one restricts attention only: the loss still counts every id but the pads.
        return_loss: mean cross-entropy in nats per token, end-of-sequence included.
        return_logits: with the loss also the logits it was taken of, `[batch, vocabulary, labels]` as in the reference.
        cond_drop_prob: overrides the model's; drawn for each row.
        should_sim_regularize: adds the alignment regulariser (arXiv 2309.08773) over rows that lost their source.
        return_early_exit_loss: adds the loss of the early-exit head.

        In training the loss alone is computed of real tokens alone: rows whose ids come in on the CPU, padded at their
        ends, are packed. Otherwise, and with the logits, all positions are, as the reference does; the loss then has
        the same bits with logits and without.

        Raises ValueError where shapes, ids or options do not fit; TypeError for what is neither tensor nor strings.
        """
        source, source_mask = self._given_source(source, source_type, source_mask)
        target = self._given_ids(target, target_type, "target", mask=target_mask)
        if target.shape[0] != source.shape[0]:
            raise ValueError(
                f"source and target must have the same batch size, got {source.shape[0]} and {target.shape[0]}."
            )
        if return_loss and self.training and not target.numel():
            raise ValueError("target must hold at least one id in training, got an empty one.")
        if return_loss and return_early_exit_loss:
            self._check_early_exit(source_type, target_type)
        add_eos = self.autoset_eos_id[target_type] and return_loss
        wide_mask = target_mask if token_ids.is_wide_mask(target_mask, target, 1 + int(add_eos)) else None
        given_mask = None if wide_mask is not None else target_mask
        target, target_mask = self._with_eos(target, given_mask, target_type, "target", add_eos)

        drop_prob = self.cond_drop_prob if cond_drop_prob is None else cond_drop_prob
        regularised = (
            should_sim_regularize and source_type != target_type and drop_prob > 0 and self.align_reg_loss_weight > 0
        )
        types: dict[str, Any] = {"source_type": source_type, "target_type": target_type}
        if self.training and return_loss and not return_logits and wide_mask is None:
            batch = self.pack(source, source_mask, target, target_mask, **types, regularised=regularised)
            if batch is not None:
                return self.packed_loss(
                    batch, **types, drop_prob=drop_prob, regularised=regularised, early_exit=return_early_exit_loss
                )

        source, source_mask, target, target_mask = (
            each.to(self.device) for each in (source, source_mask, target, target_mask)
        )
        memory = self.source_transformer(self._embed(source, source_mask, source_type), source_mask)
        dropped = self._dropped(memory.shape[0], drop_prob)
        context_mask = source_mask if dropped is None else source_mask & ~dropped[:, None]

        start = self.start_token[target_type].expand(memory.shape[0], 1, -1)
        embedded = torch.cat((start, self._embed(target, target_mask, target_type)), dim=1)
        decoder_mask = F.pad(target_mask, (1, 0), value=True)
        if wide_mask is not None:
            decoder_mask = wide_mask.to(self.device, torch.bool)
        early_exit = return_loss and return_early_exit_loss
        output = self.target_transformer(
            embedded,
            mask=decoder_mask,
            context=memory,
            context_mask=context_mask,
            hidden_of=self.early_exit_layer if early_exit else None,
        )
        hidden = output[0] if early_exit else output
        to_logits = self.to_logits[target_type]
        if not return_loss:
            return to_logits(hidden)

        labels = token_ids.labels_of(target, target_mask)
        # the last position predicts nothing
        predicting = hidden[:, :-1]
        loss = token_loss(predicting, to_logits, labels)
        if early_exit:
            loss = loss + self._early_exit_loss(output[1][:, :-1], labels)
        if regularised and dropped is not None:
            loss = loss + self._padded_regulariser(memory, source_mask, hidden, decoder_mask, dropped)
        return (loss, to_logits(predicting).transpose(1, 2)) if return_logits else loss


def _openai_tokenizer(
    tokenizer_encode: Callable[..., Tensor] | None, num_text_token_ids: int | None
) -> tuple[Callable[[list[str]], Tensor], int]:
    if tokenizer_encode is not None or num_text_token_ids is not None:
        raise ValueError("use_openai_tokenizer brings its own tokenizer_encode and num_text_token_ids; pass neither.")
    try:
        from x_clip.tokenizer import tokenizer  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(f"use_openai_tokenizer needs the package x-clip, which does not import: {error}.") from error
    return tokenizer.tokenize, tokenizer.vocab_size
