"""Where hypotheses looked in their source: one pass of the decoder over what it found, and the penalty drawn from it.

No step is slowed down by it: the pass is made once an utterance is done, all tokens at once, on the keys and values of
its source that its slot still holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spear_fast import ops
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.packed.encoder import packed_bounds
from spear_fast.decoding.packed.linear import normalize
from spear_fast.decoding.packed.memory import ProjectedMemory
from spear_fast.decoding.result import DecodingResult

# weights of single heads that are held at once
CHUNK = 1 << 24


def aligned(
    decoder: Decoder,
    result: DecodingResult,
    options: DecodingOptions,
    memory: ProjectedMemory,
    length: int,
) -> DecodingResult:
    """Returns the result of one utterance with its alignment, or ranked again under a coverage penalty, as asked for.

    result: all hypotheses that are to be ranked. memory: of this utterance alone. length: source positions that are
    read, whatever the memory's lengths say.
    """
    ends = (result.lengths + result.finished)[0].tolist()
    hypotheses = [tokens[:end] for tokens, end in zip(result.tokens[0], ends, strict=True)]
    alignment = attended(decoder, hypotheses, memory, length).to(result.tokens.device)
    if options.coverage_penalty:
        scores = result.scores + (options.coverage_penalty * coverage(alignment)).to(result.scores)
        # ascending, so that NaN comes last
        order = (-scores[0]).argsort(stable=True)[: options.num_return_sequences]
        longest = max(ends[rank] for rank in order.tolist())
        alignment = alignment[order, :longest]
        result = replace(result, scores=scores).ranked(order, longest)
    return replace(result, alignment=alignment[None]) if options.return_alignment else result


def attended(decoder: Decoder, hypotheses: Sequence[Tensor], memory: ProjectedMemory, length: int) -> Tensor:
    """Returns the weights of the last layer's cross-attention, averaged over heads, `[R, T, length]` float32.

    Those with which each token was predicted, the source in view, also under guidance; the weight of the null position
    is left out, so that they sum up to less than 1. Zeros after the end of a hypothesis.

    hypotheses: R of `[n]` int64 each, the end of sequence included. memory, length: see `aligned`.
    """
    widths = [len(tokens) for tokens in hypotheses]
    count, device, heads = sum(widths), decoder.device, decoder.heads
    out = torch.zeros(len(widths), max(widths), length, dtype=torch.float32, device=device)
    if not count:
        return out
    start = torch.tensor([decoder.start_id], device="cpu")
    inputs = torch.cat([torch.cat((start, tokens[:-1].cpu())) for tokens in hypotheses if len(tokens)])
    bounds, longest = packed_bounds(torch.tensor(widths, device="cpu"))
    bounds, inputs = bounds.to(device), inputs.to(device)
    split = [heads, decoder.kv_heads, decoder.kv_heads]
    lengths = torch.tensor([length], device=device)
    x = decoder.embedding[inputs]
    for i, layer in enumerate(decoder.layers):
        projected = layer.query_key_value(normalize(x, layer.self_gamma)).unflatten(-1, (-1, decoder.head_dim))
        own_query, own_key, own_value = projected.split(split, dim=1)
        own = ops.attention(
            own_query, own_key, own_value, cu_query=bounds, cu_key=bounds, max_query=longest, max_key=longest,
            freqs=layer.freqs, causal=True,
        )  # fmt: skip
        x = layer.self_output.add_to(x, own.flatten(1))
        query = layer.cross_query(normalize(x, layer.cross_gamma)).view(1, -1, heads, decoder.head_dim)
        source = memory.keys[i], memory.values[i], layer.null_key, layer.null_value, lengths
        scales = memory.scales_of(i)
        if layer is decoder.layers[-1]:
            break
        seen = ops.decode_cross_attention(query, *source, scales=scales)
        x = layer.cross_output.add_to(x, seen.view(len(x), -1))
        x = layer.feed_forward.add_to(x, normalize(x, layer.feed_gamma))
    parts = []
    for some in query.split(max(1, CHUNK // (heads * (source[0].shape[2] + 1))), dim=1):
        weights = ops.decode_cross_attention(some.contiguous(), *source, return_weights=True, scales=scales)[1]
        precise = torch.promote_types(weights.dtype, torch.float32)
        parts.append(weights[0, :, :, 1 : 1 + length].to(precise).mean(dim=1).float())
    for i, part in enumerate(torch.cat(parts).split(widths)):
        out[i, : len(part)] = part
    return out


def coverage(alignment: Tensor) -> Tensor:
    """Returns `[R]` float64, `sum over source positions of log(min(1, attention received))` (arXiv 1609.08144, eq. 14).

    alignment: `[R, T, S]`. What receives nothing counts as the smallest number there is.
    """
    received = alignment.double().sum(dim=1)
    return received.clamp(min=torch.finfo(torch.float32).tiny, max=1).log().sum(dim=-1)
