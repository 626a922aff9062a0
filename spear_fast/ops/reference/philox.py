"""Philox-4x32-10, a counter-based generator, in plain torch; the same numbers as csrc/philox.h.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the upper and lower 32 bits of a product of two words; halves keep it within int64."""
    lower = factor * (word & 0xFFFF)
    upper = factor * (word >> 16) + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Returns four random words for each counter.

    counter: four tensors, int64, each in 0..2**32 - 1, of shapes that broadcast.
    key: two tensors like them.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(10):
        even_high, even_low = _product(0xD2511F53, c0)
        odd_high, odd_low = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = odd_high ^ c1 ^ key0, odd_low, even_high ^ c3 ^ key1, even_low
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def uniform(counter: tuple[Tensor, Tensor, Tensor, Tensor], seeds: Tensor) -> Tensor:
    """Returns a number in [0, 1) of 53 bits for each counter, float64.

    counter: see `philox`. seeds: int64, the keys, of a shape that broadcasts with theirs.
    """
    first, second, *_ = philox(counter, (seeds & _WORD, (seeds >> 32) & _WORD))
    return ((first >> 5) * 2**26 + (second >> 6)).double() * 2.0**-53


def dropout_mask(seed: Tensor, shape: tuple[int, ...], dropout: float) -> Tensor:
    """Returns which attention weights dropout keeps, bool, of the shape `[rows, heads, length, keys]`.

    seed: `[]`, int64.
    dropout: the probability with which a weight is dropped.
    """
    rows, heads, length, keys = shape
    count = lambda size: torch.arange(size, device=seed.device)  # noqa: E731
    row = count(rows * heads).view(rows, heads, 1, 1)
    word = philox(
        (count(keys), count(length)[:, None], row, torch.zeros_like(seed)), (seed & _WORD, (seed >> 32) & _WORD)
    )[0]
    return (word >> 8) >= math.ceil(dropout * 2**24)
