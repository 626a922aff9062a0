"""What speculative decoding may draw, and with which probability; the other methods have `ops.sample_step`."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_fast.decoding.options import DecodingOptions
from spear_fast.ops.reference.candidates import keep_top_k, keep_top_p


def allowed(logits: Tensor, generated: Tensor, eos_id: int | None, options: DecodingOptions) -> Tensor:
    """Returns logits with -inf where a token must not come next.

    logits: `[..., vocabulary]`, float. generated: `[...]` int64, tokens so far.
    """
    if options.min_length and eos_id is not None:
        logits = logits.clone()
        logits[..., eos_id] = logits[..., eos_id].masked_fill(generated < options.min_length, -torch.inf)
    if options.filter_logits is not None:
        logits = options.filter_logits(logits.flatten(0, -2)).view_as(logits)
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None:
        logits = keep_top_p(logits / max(options.temperature, 1e-10), options.top_p, logits)
    return logits


def probabilities(logits: Tensor, options: DecodingOptions) -> Tensor:
    """Returns the distribution `[..., vocabulary]` of the next token; all on the first maximum at temperature 0."""
    if options.deterministic:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return (logits / options.temperature).softmax(dim=-1)
