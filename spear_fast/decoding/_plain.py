"""Plain torch in place of `spear_fast.ops` until that package is there."""

from __future__ import annotations

import torch
from torch import Tensor


def _rotate(x: Tensor, freqs: Tensor, positions: Tensor) -> Tensor:
    acc = torch.promote_types(x.dtype, torch.float32)
    angles = positions.to(acc)[..., None] * freqs.to(acc)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(acc).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2).to(x.dtype)


def append_kv(key: Tensor, value: Tensor, freqs: Tensor, positions: Tensor, cache_key: Tensor, cache_value: Tensor) -> None:
    rows = torch.arange(len(key), device=key.device)
    cache_key[rows, :, positions] = _rotate(key, freqs, positions[:, None])
    cache_value[rows, :, positions] = value


def decode_self_attention(
    query: Tensor, freqs: Tensor, cache_key: Tensor, cache_value: Tensor, ancestors: Tensor, lengths: Tensor
) -> Tensor:
    batch, beams, heads, size = query.shape
    groups = cache_key.shape[1]
    longest = int(lengths.max())
    query = _rotate(query, freqs, (lengths - 1)[..., None]).view(batch * beams, groups, -1, size)
    where = ancestors[:, :, :longest].long() + torch.arange(batch, device=query.device)[:, None, None] * beams
    positions = torch.arange(longest, device=query.device)
    key, value = (c[where.flatten(0, 1), :, positions].transpose(1, 2) for c in (cache_key, cache_value))
    scores = query @ key.transpose(-1, -2) * size**-0.5
    scores = scores.masked_fill((positions >= lengths.view(-1, 1))[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ value).view(batch, beams, heads, size)


def decode_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, null_key: Tensor, null_value: Tensor, lengths: Tensor
) -> Tensor:
    query = query.transpose(1, 2) * query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2)
    masked = torch.arange(key.shape[2], device=query.device) >= lengths[:, None]
    scores = scores.masked_fill(masked[:, None, None], -torch.inf)
    scores = torch.cat(((query * null_key[:, None]).sum(-1, keepdim=True), scores), -1).softmax(-1)
    return (scores[..., 1:] @ value + scores[..., :1] * null_value[:, None]).transpose(1, 2)
