"""TextToSemantic: the encoder-decoder of SPEAR-TTS between text and semantic speech tokens.

Same constructor, attributes, parameter names and numerics as spear-tts-pytorch 0.4.8, so that state dicts go both
ways; generation runs on `spear_fast.decoding`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spear_fast import ids as token_ids
from spear_fast.alignment import alignment_loss
from spear_fast.decoding import (
    Decoder,
    DecodingOptions,
    DecodingResult,
    Encoder,
    Engine,
    Plan,
    Weights,
    decode,
    decode_ids,
)
from spear_fast.filters import top_k as keep_top_k
from spear_fast.hub import HubModel
from spear_fast.loss import token_loss
from spear_fast.transformer import FeedForward, Residual, RMSNorm, Transformer, is_packable
from spear_fast.weights import load_into, read_package

Modality = Literal["speech", "text"]
Source = Tensor | list[str]

# decoders packed from a model's weights, outside the model so that copies, pickles and state dicts do not carry them
_ENCODERS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], Encoder]] = weakref.WeakKeyDictionary()
_DECODERS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], Decoder]] = weakref.WeakKeyDictionary()


class TextToSemantic(HubModel):
    """Text ↔ semantic speech tokens (reference line 380; arXiv 2302.03540).

    dim: model width. source_depth, target_depth: layers of encoder and decoder.
    num_text_token_ids, num_semantic_token_ids: vocabulary sizes without end-of-sequence, which gets one id more
        wherever `autoset_*_eos_id` is on.
    wav2vec: module with `codebook_size` that turns waves `[batch, samples]` into ids `[batch, length]`.
    tokenizer_encode: function from a list of strings to ids `[batch, length]`.
    target_kv_heads: fewer key/value heads in the decoder's self-attention.
    semantic_pad_id, text_pad_id: pad ids; an id that the vocabulary does not have (-1) leaves every real id usable.
    cond_drop_prob: probability, for each row, of training without its source (for guidance).
    target_early_exit_layer: decoder layer with a head of its own, for speculative decoding.

    Raises ValueError when the sizes do not fit together.
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
            num_semantic_token_ids = int(wav2vec.codebook_size)  # type: ignore[arg-type]
        if num_semantic_token_ids is None:
            raise ValueError("num_semantic_token_ids or wav2vec must be given, got neither.")
        if not 0 <= cond_drop_prob < 1:
            raise ValueError(f"cond_drop_prob must be in [0, 1), got {cond_drop_prob}.")
        if target_early_exit_layer is not None and not 0 < target_early_exit_layer <= target_depth:
            raise ValueError(
                f"target_early_exit_layer must be from 1 to target_depth {target_depth}, got {target_early_exit_layer}."
            )
        self.config = {
            **arguments,
            "num_text_token_ids": num_text_token_ids,
            "num_semantic_token_ids": num_semantic_token_ids,
            "use_openai_tokenizer": False,
        }
        _check_sizes(self.config)
        # modules and functions are no configuration
        del self.config["wav2vec"], self.config["tokenizer_encode"]

        self.dim = dim
        self.wav2vec = wav2vec
        if wav2vec is not None:
            _set_requires_grad(wav2vec, False)
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

    @property
    def device(self) -> torch.device:
        return self.start_token["speech"].device

    def load(self, path: str | Path, strict: bool = True) -> dict[str, Any]:
        """Loads the `model` entry of a reference checkpoint and returns the whole package.

        Raises FileNotFoundError, or ValueError when the file is no checkpoint or does not fit this model.
        """
        package = read_package(path)
        if strict:
            load_into(self, package["model"], path)
        else:
            self.load_state_dict(package["model"], strict=False)
        return package

    def unfreeze_all(self) -> None:
        _set_requires_grad(self, True)

    def freeze_encoder(self) -> None:
        _set_requires_grad(self.source_transformer, False)

    def freeze_encoder_below_layer(self, layer: int) -> None:
        """Trains the encoder but for its layers 1 to `layer`."""
        _set_requires_grad(self.source_transformer, True)
        for module in self.source_transformer.layers[:layer]:  # type: ignore[union-attr]
            _set_requires_grad(module, False)

    def freeze_encoder_above_layer(self, layer: int) -> None:
        """Trains the encoder's layers 1 to `layer` and freezes those above, as the paper fine-tunes."""
        _set_requires_grad(self.source_transformer, False)
        for module in self.source_transformer.layers[:layer]:  # type: ignore[union-attr]
            _set_requires_grad(module, True)

    def freeze_decoder(self) -> None:
        _set_requires_grad(self.target_transformer, False)

    def freeze_speech_emb(self) -> None:
        self._freeze_embedding("speech")

    def freeze_text_emb(self) -> None:
        self._freeze_embedding("text")

    def _freeze_embedding(self, modality: Modality) -> None:
        _set_requires_grad(self.token_emb[modality], False)
        self.start_token[modality].requires_grad = False

    def to_ids(self, source: Source, modality: Modality, name: str, input_sample_hz: int | None = None) -> Tensor:
        """Returns int64 ids `[batch, length]` on the model's device, from ids, strings or (for speech) raw audio.

        input_sample_hz: sample rate of raw audio; passed on to `wav2vec`, which resamples.
        Raises TypeError on anything else, ValueError on strings or audio without the module that reads them.
        """
        token_ids.check_modality(modality, name)
        if isinstance(source, (list, tuple)) and all(isinstance(text, str) for text in source):
            if modality != "text":
                raise ValueError(f"{name} is a list of strings, which is text, but its type is {modality!r}.")
            if self.tokenizer_encode is None:
                raise ValueError(f"{name} is a list of strings, but the model has no tokenizer_encode; pass token ids.")
            source = self.tokenizer_encode(list(source))
        if not isinstance(source, Tensor):
            raise TypeError(f"{name} must be a tensor of ids or a list of strings, got {type(source).__name__}.")
        source = source.to(self.device)
        if source.is_floating_point() and modality == "speech":
            source = token_ids.from_audio(self.wav2vec, source, name, input_sample_hz=input_sample_hz)
        checked = token_ids.as_ids(source, name)
        if not checked.shape[0]:
            raise ValueError(f"{name} must have at least one row, got an empty batch.")
        return checked

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
        token_ids.check_range(ids, mask, vocab_size, name)  # type: ignore[arg-type]
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
        end-of-sequence where that is set automatically; a mask of that length is used as it is, as the reference does.
        """
        ids, mask = self._source(source, source_type, source_mask, input_sample_hz)
        return self.source_transformer(self._embed(ids, mask, source_type), mask), mask, ids

    def _source(
        self, source: Source, source_type: Modality, mask: Tensor | None, input_sample_hz: int | None
    ) -> tuple[Tensor, Tensor]:
        """Returns what the encoder reads: ids and mask `[batch, length]`, the end-of-sequence included."""
        ids = self.to_ids(source, source_type, "source", input_sample_hz)
        ids, mask = self._with_eos(ids, mask, source_type, "source", self.autoset_eos_id[source_type])
        if not ids.shape[-1]:
            raise ValueError("source must hold at least one id, got an empty one and no automatic end-of-sequence.")
        return ids, mask

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
        """Returns logits `[batch, target length + 1, vocabulary]`, or with `return_loss` the loss.

        source, target: ids, strings, or for the source raw audio; see `encode`.
        source_mask, target_mask: `[batch, length]`, bool, over the ids as given. The reference's form is taken
            too: over source and its end-of-sequence; over start vector, target and, with `return_loss`, its
            end-of-sequence.
            That one restricts attention only: the loss still counts every id but the pads.
        return_loss: mean cross-entropy in nats per token, end-of-sequence included.
        return_logits: with the loss also the logits it was taken of, `[batch, vocabulary, labels]` as in the reference.
        cond_drop_prob: overrides the model's; drawn for each row.
        should_sim_regularize: adds the alignment regulariser (arXiv 2309.08773) over rows that lost their source.
        return_early_exit_loss: adds the loss of the early-exit head.
        """
        memory, source_mask, _ = self.encode(source, source_type=source_type, source_mask=source_mask)
        target = self.to_ids(target, target_type, "target")
        if target.shape[0] != memory.shape[0]:
            raise ValueError(
                f"source and target must have the same batch size, got {memory.shape[0]} and {target.shape[0]}."
            )
        if return_loss and self.training and not target.numel():
            raise ValueError("target must hold at least one id in training, got an empty one.")
        add_eos = self.autoset_eos_id[target_type] and return_loss
        wide_mask = target_mask if token_ids.is_wide_mask(target_mask, target, 1 + int(add_eos)) else None
        given_mask = None if wide_mask is not None else target_mask
        target, target_mask = self._with_eos(target, given_mask, target_type, "target", add_eos)

        drop_prob = self.cond_drop_prob if cond_drop_prob is None else cond_drop_prob
        dropped = torch.rand(memory.shape[0], device=memory.device) < drop_prob if drop_prob > 0 else None
        context_mask = source_mask if dropped is None else source_mask & ~dropped[:, None]

        start = self.start_token[target_type].expand(memory.shape[0], 1, -1)
        embedded = torch.cat((start, self._embed(target, target_mask, target_type)), dim=1)
        decoder_mask = F.pad(target_mask, (1, 0), value=True)
        if wide_mask is not None:
            decoder_mask = wide_mask.to(self.device, torch.bool)
        # each layer's output is kept for the early exit alone
        output = self.target_transformer(
            embedded,
            mask=decoder_mask,
            context=memory,
            context_mask=context_mask,
            return_hiddens=return_early_exit_loss,
        )
        hidden = output[0] if return_early_exit_loss else output
        to_logits = self.to_logits[target_type]
        if not return_loss:
            return to_logits(hidden)

        labels = token_ids.labels_of(target, target_mask)
        # the last position predicts nothing
        predicting = hidden[:, :-1]
        loss = token_loss(predicting, to_logits, labels)
        if return_early_exit_loss:
            loss = loss + self._early_exit_loss(output[1], labels, source_type, target_type)
        if (
            should_sim_regularize
            and source_type != target_type
            and dropped is not None
            and self.align_reg_loss_weight > 0
        ):
            temperature = self.align_reg_logsumexp_pool_temp if self.align_reg_use_logsumexp_pool else None
            regulariser = alignment_loss(memory, source_mask, hidden, decoder_mask, dropped, temperature)
            loss = loss + regulariser * self.align_reg_loss_weight
        return (loss, to_logits(predicting).transpose(1, 2)) if return_logits else loss

    def _early_exit_loss(self, hiddens: Tensor, labels: Tensor, source_type: Modality, target_type: Modality) -> Tensor:
        if self.early_exit_layer is None:
            raise ValueError("return_early_exit_loss needs a model built with target_early_exit_layer, got None.")
        if (source_type, target_type) != ("text", "speech"):
            raise ValueError(f"the early exit is from text to speech only, got {source_type} to {target_type}.")
        embedded = hiddens[self.early_exit_layer - 1]
        if self.detach_early_exit_embed:
            embedded = embedded.detach()
        residual, norm, to_logits = self.to_early_exit_semantic_logits
        return token_loss(norm(residual(embedded[:, :-1])), to_logits, labels)

    def encoder(self, source_type: Modality, weights: Weights = "exact") -> Encoder:
        """Returns the packed encoder of a modality, packed again whenever a weight has changed.

        weights: "int8" for products of 8 bits; see `Decoder.from_modules`.
        """
        packed, kind = _ENCODERS.setdefault(self, {}), (source_type, weights)
        if kind not in packed or packed[kind].is_stale():
            embedding: Tensor = self.token_emb[source_type].weight  # type: ignore[assignment]
            packed[kind] = Encoder.from_modules(self.source_transformer, embedding, weights=weights)
        return packed[kind]

    def decoder(self, target_type: Modality, weights: Weights = "exact") -> Decoder:
        """Returns the packed decoder of a modality, packed again whenever a weight has changed; see `encoder`."""
        packed, kind = _DECODERS.setdefault(self, {}), (target_type, weights)
        if kind not in packed or packed[kind].is_stale():
            early_exit = None
            if self.early_exit_layer is not None and target_type == "speech":
                early_exit = (self.early_exit_layer, self.to_early_exit_semantic_logits)
            packed[kind] = Decoder.from_modules(
                self.target_transformer,
                self.token_emb[target_type].weight,  # type: ignore[arg-type]
                self.start_token[target_type],
                eos_id=self.eos_id[target_type] if self.autoset_eos_id[target_type] else None,
                pad_id=self.pad_id[target_type],
                early_exit=early_exit,
                weights=weights,
            )
        return packed[kind]

    @torch.no_grad()
    def engine(
        self,
        *,
        source_type: Modality = "speech",
        target_type: Modality = "text",
        slots: int | None = None,
        beams: int = 4,
        max_length: int = 512,
        max_source: int = 2048,
        budget: int | None = None,
        guided: bool = False,
        deterministic: bool = False,
        weights: Weights = "exact",
    ) -> Engine:
        """Returns an engine that decodes many requests at once with this model's weights as they are now.

        slots: utterances in flight; beams, max_length, max_source: the most that a request may want; budget: bytes for
        the buffers; see `Plan.of`. guided, deterministic: see `Engine`. weights: "int8" makes the products of 8 bits,
        on x86 CPUs: several times as fast, and no longer exact. Sources are ids `[n]`, with the end-of-sequence where
        the model sets one automatically: `encode` adds it, an engine takes them as they are.
        """
        decoder = self.decoder(target_type, weights)
        plan = Plan.of(
            decoder,
            slots=slots,
            beams=beams,
            max_length=max_length,
            max_source=max_source,
            budget=budget,
            guided=guided,
        )
        return Engine(self.encoder(source_type, weights), decoder, plan, guided=guided, deterministic=deterministic)

    def decode(
        self, memory: Tensor, memory_mask: Tensor, *, target_type: Modality, options: DecodingOptions
    ) -> DecodingResult:
        """Returns the decoded hypotheses of each row of an encoded source; see `encode` and `DecodingResult`."""
        self._check_decoding(target_type, options)
        return decode(self.decoder(target_type), memory, memory_mask, options)

    def _check_decoding(self, target_type: Modality, options: DecodingOptions) -> None:
        token_ids.check_modality(target_type, "target")
        if options.cond_scale > 1 and self.cond_drop_prob == 0:
            raise ValueError(
                f"cond_scale must be 1 for a model trained with cond_drop_prob 0, got {options.cond_scale}; guidance "
                "needs training with condition dropout."
            )
        if options.method == "speculative" and target_type != "speech":
            raise ValueError("speculative decoding is from text to speech only, since only speech has an early exit.")

    @torch.no_grad()
    def generate(
        self,
        source: Source,
        *,
        source_type: Modality,
        target_type: Modality,
        temperature: float = 1.0,
        filter_logits_fn: Callable[..., Tensor] = keep_top_k,
        filter_fn_kwargs: dict[str, Any] = {},  # noqa: B006 (the reference's signature)
        source_mask: Tensor | None = None,
        max_length: int = 2048,
        beam_search_decode: bool = False,
        spec_decode: bool = False,
        spec_decode_gamma: int = 5,
        spec_decode_lenience: float = 1.0,
        beam_size: int = 4,
        return_source: bool = False,
        return_target_mask: bool = False,
        cond_scale: float = 1.0,
        beam_mode: Literal["reference", "standard"] = "reference",
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        num_return_sequences: int = 1,
        generator: torch.Generator | None = None,
        return_result: bool = False,
        input_sample_hz: int | None = None,
        min_length: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        prefix: tuple[int, ...] = (),
        patience: float = 1.0,
        coverage_penalty: float = 0.0,
        return_alignment: bool = False,
    ) -> Any:
        """Returns target ids `[batch, length]`, pads behind each end-of-sequence (reference line 620).

        source, source_mask, input_sample_hz: see `encode`.
        temperature, filter_logits_fn, filter_fn_kwargs: for sampling; a filter takes logits `[batch, vocabulary]`.
        beam_search_decode: beam search instead of sampling, by `beam_mode`: "reference" gives the reference's tokens,
            "standard" keeps a pool of finished hypotheses and knows `length_penalty`, `early_stopping` and
            `num_return_sequences` (ids then `[batch * num_return_sequences, length]`, best first).
        spec_decode: drafts with the early exit, `spec_decode_gamma` tokens at a time; same distribution as sampling.
        return_source: ids of the source, end-of-sequence included, come first.
        return_target_mask: what is no padding comes last.
        cond_scale: classifier-free guidance; needs a model trained with condition dropout.
        generator: for reproducible draws. return_result: return the whole `DecodingResult` instead of ids.
        top_k, top_p: for sampling, instead of the default filter; a filter that is given comes first.
        min_length, repetition_penalty, no_repeat_ngram_size, prefix, patience, coverage_penalty: see `DecodingOptions`;
            neither the reference's search nor speculative decoding has them, but for `min_length` in the latter.
        return_alignment: where each token looked in the source; in the result, so with `return_result`.

        Raises ValueError, one sentence, for arguments that do not fit together.
        """
        if beam_search_decode and spec_decode:
            raise ValueError("beam_search_decode and spec_decode exclude each other, got both.")
        if spec_decode and source_type != "text":
            raise ValueError("speculative decoding is from text to speech only.")
        if return_alignment and not return_result:
            raise ValueError("return_alignment needs return_result=True, since ids alone have no place for it.")
        replaced = filter_logits_fn is keep_top_k and not filter_fn_kwargs and (top_k, top_p) != (None, None)
        options = DecodingOptions(
            method="beam" if beam_search_decode else "speculative" if spec_decode else "sample",
            beam_size=beam_size,
            beam_mode=beam_mode,
            max_length=max_length,
            temperature=temperature,
            filter_logits=None if replaced else partial(filter_logits_fn, **filter_fn_kwargs),
            top_k=top_k,
            top_p=top_p,
            cond_scale=cond_scale,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_return_sequences,
            gamma=spec_decode_gamma,
            lenience=spec_decode_lenience,
            generator=generator,
            min_length=min_length,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            prefix=tuple(prefix),
            patience=patience,
            coverage_penalty=coverage_penalty,
            return_alignment=return_alignment,
        )
        was_training = self.training
        self.eval()
        try:
            source_ids, mask = self._source(source, source_type, source_mask, input_sample_hz)
            self._check_decoding(target_type, options)
            result = decode_ids(
                self.encoder(source_type) if is_packable(self.source_transformer) else None,
                self.decoder(target_type),
                self._embeddable(source_ids, mask, source_type),
                mask,
                options,
                encode=lambda ids, mask: self.source_transformer(self._embed(ids, mask, source_type), mask),
            )
        finally:
            self.train(was_training)
        if return_result:
            return (source_ids, result) if return_source else result
        target = result.tokens.flatten(0, 1)
        returned = (source_ids, target) if return_source else (target,)
        if return_target_mask:
            # by length, not by id: a pad id that the vocabulary has may be a real token
            kept = result.lengths + result.finished
            returned = (*returned, torch.arange(target.shape[-1], device=target.device) < kept.flatten()[:, None])
        return returned if len(returned) > 1 else target


def _check_sizes(config: dict[str, Any]) -> None:
    vocabularies = ("num_text_token_ids", "num_semantic_token_ids")
    for name in ("dim", "source_depth", "target_depth", "dim_head", "heads", *vocabularies):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {config[name]!r}.")
    if config["dim_head"] % 2:
        raise ValueError(f"dim_head must be even, since rotary positions turn pairs, got {config['dim_head']}.")
    for name in ("attn_dropout", "ff_dropout"):
        if not 0 <= config[name] < 1:
            raise ValueError(f"{name} must be in [0, 1), got {config[name]}.")


def _set_requires_grad(module: nn.Module, requires_grad: bool) -> None:
    for name, parameter in module.named_parameters():
        # rotary frequencies are constants that the state dict carries
        if not name.endswith("rotary_emb.freqs"):
            parameter.requires_grad = requires_grad


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
