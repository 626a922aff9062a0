"""Why an engine cannot serve a request."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spear_fast.decoding.budget import Plan
from spear_fast.decoding.decoder import Decoder
from spear_fast.decoding.encoder import Encoder
from spear_fast.decoding.options import DecodingOptions


def refusal(
    source: Any, options: DecodingOptions, *, encoder: Encoder | None, decoder: Decoder, plan: Plan, guided: bool
) -> Exception | None:
    """Returns why an engine of this plan cannot serve a request, or None.

    source: ids `[n]` on the host, or an encoded memory `[n, dim]`; anything else is refused. guided: whether the engine
    decodes without the source too.
    """
    if is_memory(source):
        wrong = _memory_refusal(source, decoder, plan)
    else:
        wrong = _ids_refusal(source, encoder, plan)
    return wrong or _options_refusal(options, decoder, plan, guided)


def is_memory(source: Any) -> bool:
    """Returns whether a source is encoded already."""
    return isinstance(source, Tensor) and source.ndim == 2 and source.is_floating_point()


def _memory_refusal(memory: Tensor, decoder: Decoder, plan: Plan) -> Exception | None:
    if memory.shape[1] != decoder.dim or memory.device != decoder.device:
        return ValueError(
            f"a memory must be [n, {decoder.dim}] on {decoder.device}, got {list(memory.shape)} on {memory.device}; is "
            "it another model's?"
        )
    if len(memory) > plan.max_source:
        return ValueError(
            f"a memory may have up to {plan.max_source} positions, the engine's max_source, got {len(memory)}; make an "
            "engine with a larger one."
        )
    return None


def _ids_refusal(source: Any, encoder: Encoder | None, plan: Plan) -> Exception | None:
    if not isinstance(source, Tensor) or source.ndim != 1 or source.is_floating_point() or source.dtype == torch.bool:
        got = f"{source.dtype} {list(source.shape)}" if isinstance(source, Tensor) else type(source).__name__
        return ValueError(f"source must be a tensor of integer ids [n], or a memory [n, dim], got {got}.")
    if encoder is None:
        return ValueError("ids need an engine with an encoder, and this one has none; pass an encoded memory [n, dim].")
    if not 0 < len(source) <= plan.max_source:
        return ValueError(
            f"source must have 1 to {plan.max_source} ids, the engine's max_source, got {len(source)}; split it or "
            "make an engine with a larger one."
        )
    low, high = (int(bound) for bound in torch.aminmax(source))
    vocabulary = encoder.embedding.shape[0]
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        return ValueError(f"source ids must lie in 0..{vocabulary - 1}, got {wrong}; is it another model's?")
    return None


def _options_refusal(options: DecodingOptions, decoder: Decoder, plan: Plan, guided: bool) -> Exception | None:
    if options.hypotheses > plan.beams:
        return ValueError(
            f"a request may have up to {plan.beams} hypotheses, the engine's beams, got {options.hypotheses}; make "
            "an engine with more."
        )
    if options.max_length > plan.max_length:
        return ValueError(
            f"max_length may be up to {plan.max_length}, the engine's, got {options.max_length}; make an engine "
            "with a larger one."
        )
    if any(token >= decoder.vocab_size for token in options.prefix):
        return ValueError(
            f"prefix must hold ids in 0..{decoder.vocab_size - 1}, got {max(options.prefix)}; is it another model's?"
        )
    if options.guided and not guided:
        return ValueError("a request with cond_scale above 1 needs an engine made with guided=True.")
    if options.in_lockstep:
        return ValueError(
            "the engine serves greedy decoding, sampling and the standard beam search; for speculative decoding or "
            "the reference's search call decode()."
        )
    return None
