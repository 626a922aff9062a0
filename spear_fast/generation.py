"""What comes out of a model: packed weights, engines, and `generate` with the reference's arguments."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spear_fast import ids as token_ids
from spear_fast.decoding import (
    Decoder,
    DecodingOptions,
    DecodingResult,
    Encoder,
    Engine,
    EngineConfig,
    KvDtype,
    Weights,
    decode,
    decode_ids,
)
from spear_fast.evaluation import evaluation_mode
from spear_fast.filters import top_k as keep_top_k
from spear_fast.inputs import InputMixin, Modality, Source
from spear_fast.ops.registry import without_autocast
from spear_fast.transformer import Transformer, unpackable

# decoders packed from a model's weights, outside the model so that copies, pickles and state dicts do not carry them
_ENCODERS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], Encoder]] = weakref.WeakKeyDictionary()
_DECODERS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], Decoder]] = weakref.WeakKeyDictionary()


class GenerationMixin(InputMixin):
    """The part of `TextToSemantic` that decodes; runs on `spear_fast.decoding`."""

    target_transformer: Transformer
    cond_drop_prob: float
    early_exit_layer: int | None
    to_early_exit_semantic_logits: nn.Sequential

    def encoder(self, source_type: Modality, weights: Weights = "exact") -> Encoder:
        """Returns the packed encoder of a modality, packed again whenever a weight has changed.

        weights: "int8" for matmuls of 8 bits; see `Decoder.from_modules`.

        Raises ValueError where a module has been replaced or has a hook: its work would be left out.
        """
        _check_packable("source_transformer", self.source_transformer)
        packed, kind = _ENCODERS.setdefault(self, {}), (source_type, weights)
        if kind not in packed or packed[kind].is_stale():
            embedding: Tensor = self.token_emb[source_type].weight  # type: ignore[assignment]
            # weights keep their type, whatever the caller computes in
            with without_autocast(self.device.type):
                packed[kind] = Encoder.from_modules(self.source_transformer, embedding, weights=weights)
        return packed[kind]

    def decoder(self, target_type: Modality, weights: Weights = "exact") -> Decoder:
        """Returns the packed decoder of a modality, packed again whenever a weight has changed; see `encoder`."""
        _check_packable("target_transformer", self.target_transformer)
        packed, kind = _DECODERS.setdefault(self, {}), (target_type, weights)
        if kind not in packed or packed[kind].is_stale():
            early_exit = None
            if self.early_exit_layer is not None and target_type == "speech":
                early_exit = (self.early_exit_layer, self.to_early_exit_semantic_logits)
            with without_autocast(self.device.type):
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
        memory_budget: int | None = None,
        guided: bool = False,
        deterministic: bool = False,
        weights: Weights = "exact",
        workers: int | None = None,
        kv_dtype: KvDtype = "exact",
        budget: int | None = None,
    ) -> Engine:
        """Returns an engine that decodes many requests at once with this model's weights as they are now.

        slots: utterances in flight; beams, max_length, max_source: the most that a request may want; memory_budget:
        bytes for the buffers; see `EngineConfig.for_decoder`. guided, deterministic: see `Engine`. weights: "int8"
        makes the matmuls of 8 bits, on x86 CPUs: faster, and no longer exact. workers: on a CPU, that share slots and
        threads, see `EngineConfig.for_decoder`. kv_dtype: "fp8" holds cross-attention's keys and values in 8 bits: of
        long sources they are most of what a step on a GPU reads. budget: the name of memory_budget in the last release.
        Sources are ids `[n]`, with the end-of-sequence where the model sets one automatically: `encode` adds it, an
        engine takes them as they are.
        """
        if budget is not None:
            warnings.warn("budget is now memory_budget.", DeprecationWarning, stacklevel=3)
        decoder = self.decoder(target_type, weights)
        config = EngineConfig.for_decoder(
            decoder,
            slots=slots,
            beams=beams,
            max_length=max_length,
            max_source=max_source,
            memory_budget=budget if memory_budget is None else memory_budget,
            guided=guided,
            workers=workers,
            kv_dtype=kv_dtype,
        )
        return Engine(self.encoder(source_type, weights), decoder, config, guided=guided, deterministic=deterministic)

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
        """Returns target ids `[batch, length]`, pads after each end-of-sequence (reference line 597).

        source, source_mask, input_sample_hz: see `encode`.
        temperature, filter_logits_fn, filter_fn_kwargs: for sampling; a filter takes logits `[batch, vocabulary]`. In
            beam search the default filter does not count; another one is obeyed by the "standard" search and ignored,
            with a warning, by the "reference" one, as the reference does.
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
        is_default = filter_logits_fn is keep_top_k and not filter_fn_kwargs
        unused = is_default and (beam_search_decode or (top_k, top_p) != (None, None))
        if beam_search_decode and beam_mode == "reference" and not is_default:
            warnings.warn(
                "the reference's beam search ignores filter_logits_fn; pass beam_mode='standard' to have it obeyed.",
                UserWarning,
                stacklevel=3,
            )
            unused = True
        options = DecodingOptions(
            method="beam" if beam_search_decode else "speculative" if spec_decode else "sample",
            beam_size=beam_size,
            beam_mode=beam_mode,
            max_length=max_length,
            temperature=temperature,
            filter_logits=None if unused else partial(filter_logits_fn, **filter_fn_kwargs),
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
        source_ids, mask = self._source(source, source_type, source_mask, input_sample_hz)
        self._check_decoding(target_type, options)
        result = decode_ids(
            self.encoder(source_type) if unpackable(self.source_transformer) is None else None,
            self.decoder(target_type),
            self._embeddable(source_ids, mask, source_type),
            mask,
            options,
            encode=partial(self._encode_ids, source_type=source_type),
        )
        if return_result:
            return (source_ids, result) if return_source else result
        target = result.tokens.flatten(0, 1)
        returned = (source_ids, target) if return_source else (target,)
        if return_target_mask:
            # by length, not by id: a pad id that the vocabulary has may be a real token
            kept = result.lengths + result.finished
            returned = (*returned, torch.arange(target.shape[-1], device=target.device) < kept.flatten()[:, None])
        return returned if len(returned) > 1 else target

    def _encode_ids(self, ids: Tensor, mask: Tensor, *, source_type: Modality) -> Tensor:
        """Returns memory `[batch, length, dim]` by the modules themselves, without dropout; see `decode_ids`."""
        with evaluation_mode(self.source_transformer), evaluation_mode(self.token_emb):
            return self.source_transformer(self._embed(ids, mask, source_type), mask)


def _check_packable(name: str, transformer: Transformer) -> None:
    beyond = unpackable(transformer)
    if beyond is not None:
        raise ValueError(
            f"in the model's {name} {beyond}, which decoding from packed weights would leave out; merge adapters "
            "into the weights (PEFT: merge_and_unload()) and remove hooks."
        )
