"""Attention of the newest tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_fast.ops.reference.ranges import check_range
from spear_fast.ops.reference.residual import normed_after


def rotate(heads: Tensor, freqs: Tensor, positions: Tensor) -> Tensor:
    """Returns `heads` rotated by their positions: the pair (2i, 2i + 1) by the angle `position * freqs[i]`.

    heads: `[..., heads, head_dim]`.
    freqs: `[head_dim / 2]`; angles are computed in float32, or in float64 where heads are.
    positions: `[...]`, int64.
    """
    precision = torch.promote_types(torch.float32, heads.dtype)
    angle = (positions[..., None].to(precision) * freqs.to(precision)).unsqueeze(-2)
    even, odd = heads.to(precision).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(heads.dtype)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(scores.dtype)


def append_kv(
    key: Tensor, value: Tensor, freqs: Tensor, positions: Tensor, cache_key: Tensor, cache_value: Tensor
) -> None:
    rows, tokens = key.shape[:2]
    last = cache_key.shape[2] - tokens
    check_range("append_kv", "positions", positions, last, "make the caches longer or end the row")
    row = torch.arange(rows, device=key.device)[:, None]
    written = positions[:, None] + torch.arange(tokens, device=key.device)
    cache_key[row, :, written] = rotate(key, freqs, written)
    cache_value[row, :, written] = value


def decode_self_attention(
    query: Tensor,
    freqs: Tensor,
    cache_key: Tensor,
    cache_value: Tensor,
    ancestors: Tensor,
    lengths: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    op, advice = "decode_self_attention", "make the caches longer or end the hypothesis"
    buffer, tokens = cache_key.shape[2], query.shape[2]
    check_range(op, "lengths", lengths, buffer, advice, least=0 if key is None else tokens)
    if query.numel() == 0:
        return query.clone(memory_format=torch.contiguous_format)
    query = normed_after(query, 3, residual)
    if key is not None and value is not None:
        new = normed_after(key, 3, residual).flatten(0, 1), normed_after(value, 3, residual).flatten(0, 1)
        append_kv(*new, freqs, (lengths - tokens).flatten(), cache_key, cache_value)
    # each as if the tokens after it were not there yet
    counts = [(lengths - (tokens - 1 - token)).clamp(min=0) for token in range(tokens)]
    caches = cache_key, cache_value
    outs = [_attend_one(query[:, :, t], freqs, *caches, ancestors, count) for t, count in enumerate(counts)]
    return torch.stack(outs, dim=2)


def _attend_one(
    query: Tensor, freqs: Tensor, cache_key: Tensor, cache_value: Tensor, ancestors: Tensor, lengths: Tensor
) -> Tensor:
    utterances, beams, _, size = query.shape
    groups, buffer = cache_key.shape[1], cache_key.shape[2]
    # positions past the longest hypothesis were never written; on a GPU asking for it would wait for the device
    longest = int(lengths.max()) if lengths.device.type == "cpu" else buffer
    position = torch.arange(longest, device=query.device)
    valid = position < lengths[..., None]
    beam = torch.where(valid, ancestors[..., :longest], 0).long()
    check_range(
        "decode_self_attention", "ancestors", beam, beams - 1, "write each position's beam index before it is read"
    )

    def follow(cache: Tensor) -> Tensor:
        by_position = cache.view(utterances, beams, groups, buffer, size).transpose(2, 3)
        utterance = torch.arange(utterances, device=cache.device)[:, None, None]
        # unwritten memory may hold NaN, which a weight of zero does not remove
        return by_position[utterance, beam, position].masked_fill_(~valid[..., None, None], 0).transpose(2, 3)

    rotated = rotate(query, freqs, (lengths - 1).clamp(min=0)) * size**-0.5
    scores = rotated.unflatten(2, (groups, -1)) @ follow(cache_key).mT
    weights = _softmax(scores.masked_fill_(~valid[:, :, None, None], torch.finfo(scores.dtype).min))
    out = (weights @ follow(cache_value)).flatten(2, 3)
    return out.masked_fill_(lengths[..., None, None] == 0, 0)


def dequantised(key: Tensor, value: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns keys and values `[utterances, heads, source, head_dim]` in `dtype`, multiplied by their scales.

    key, value: float8_e4m3fn. scales: `[2, utterances, heads]`, float32.
    """
    precision = torch.promote_types(torch.float32, dtype)
    of_key, of_value = scales.to(precision)[..., None, None].unbind()
    return (key.to(precision) * of_key).to(dtype), (value.to(precision) * of_value).to(dtype)


def decode_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    lengths: Tensor,
    return_weights: bool,
    residual: Tensor | None,
    arrivals: Tensor | None,
    split: int,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_range(
        "decode_cross_attention", "lengths", lengths, key.shape[2], "pass each utterance's number of source positions"
    )
    if scales is not None:
        key, value = dequantised(key, value, scales, query.dtype)
    scaled = normed_after(query, 2, residual).transpose(1, 2) * query.shape[-1] ** -0.5
    valid = torch.arange(key.shape[2], device=query.device) < lengths[:, None]
    scores = (scaled @ key.mT).masked_fill_(~valid[:, None, None], torch.finfo(query.dtype).min)
    weights = _softmax(torch.cat((scaled @ null_key[:, :, None], scores), dim=-1))
    # a source's padding may hold NaN, which a weight of zero does not remove
    read = value.masked_fill(~valid[:, None, :, None], 0)
    out = weights[..., 1:] @ read + weights[..., :1] * null_value[:, None]
    returned = weights.transpose(1, 2).contiguous() if return_weights else query.new_empty(0)
    return out.transpose(1, 2).contiguous(), returned
