"""Inputs for norm, gated activation, rotation and loss: random, of any size, with the corners that break kernels.

A maker a op, keyed by its name; it returns all of the schema's arguments, by position.
"""

from __future__ import annotations

import math

import torch
from ops_inputs import frequencies
from torch import Tensor

from spear_fast.ops.reference import cross_entropy as loss_reference
from spear_fast.ops.reference import pointwise as reference


def spread(tensor: Tensor) -> Tensor:
    """Returns the same numbers at twice the distance in every dimension, with NaN between."""
    wide = torch.full([2 * size for size in tensor.shape], torch.nan, dtype=tensor.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def rms_norm(shape=(2, 3, 8), *, dtype=torch.float32, residual=False, strided=False, scale=1.0):
    x = torch.randn(shape, dtype=dtype) * scale
    arguments = [x, torch.randn(shape[-1], dtype=dtype), torch.randn(shape, dtype=dtype) if residual else None]
    return tuple(spread(each) if strided and each is not None else each for each in arguments)


def rms_norm_backward(shape=(2, 3, 8), *, dtype=torch.float32, residual=False, strided=False, scale=1.0):
    x, gamma, _ = rms_norm(shape, dtype=dtype, strided=strided, scale=scale)
    _, _, inverse = reference.rms_norm(x, gamma, None)
    grads = [torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype) if residual else None]
    grads = [spread(each) if strided and each is not None else each for each in grads]
    return *grads, x, gamma, inverse


def geglu(shape=(2, 3), inner=8, extra=0, *, dtype=torch.float32, bias=False, strided=False, scale=1.0, dim=None):
    x = torch.randn(*shape, 2 * inner, dtype=dtype) * scale
    bias = torch.randn(2 * inner, dtype=dtype) if bias else None
    if strided:
        x, bias = spread(x), None if bias is None else spread(bias)
    residual = None
    if dim is not None:
        # the projection of rows that were not normed: as large as they are
        x, residual = x.mul_(30), torch.randn(math.prod(shape), dim, dtype=dtype) * 30
    return x, bias, inner + extra, residual


def geglu_backward(shape=(2, 3), inner=8, extra=0, *, dtype=torch.float32, bias=False, strided=False, scale=1.0):
    x, bias, width, _ = geglu(shape, inner, dtype=dtype, bias=bias, strided=strided, scale=scale)
    grad = torch.randn(*shape, width + extra, dtype=dtype)
    return spread(grad) if strided else grad, x, bias


def rotary(
    shape=(2, 5), heads=3, size=8, *, dtype=torch.float32, positions="none", inverse=False, strided=False, furthest=1000
):
    x = torch.randn(*shape, heads, size, dtype=dtype)
    where = {"none": None, "shared": shape[-1:], "own": shape}[positions]
    return (
        spread(x) if strided else x,
        frequencies(size),
        None if where is None else torch.randint(-furthest, furthest, where),
        inverse,
    )


def cross_entropy(rows=5, vocab=7, size=8, *, dtype=torch.float32, ignored="some", strided=False, ignore_index=-100):
    # logits of about unit variance, as models have them: the log-sum-exp of large ones is itself rounded
    hidden, weight = torch.randn(rows, size, dtype=dtype), torch.randn(vocab, size, dtype=dtype) * max(size, 1) ** -0.5
    labels = torch.randint(vocab, (rows,))
    if ignored != "none":
        labels[torch.rand(rows) < {"some": 0.4, "all": 2.0}[ignored]] = ignore_index
    if strided:
        hidden, weight, labels = spread(hidden), spread(weight), labels.repeat_interleave(2)[::2]
    return hidden, weight, labels, ignore_index


def cross_entropy_backward(rows=5, vocab=7, size=8, *, dtype=torch.float32, **options):
    hidden, weight, labels, ignore_index = cross_entropy(rows, vocab, size, dtype=dtype, **options)
    _, lse = loss_reference.cross_entropy(hidden, weight, labels, ignore_index)
    return torch.randn(rows, dtype=lse.dtype), hidden, weight, labels, lse, ignore_index


MAKE = {
    "rms_norm": rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "geglu": geglu,
    "geglu_backward": geglu_backward,
    "rotary": rotary,
    "cross_entropy": cross_entropy,
    "cross_entropy_backward": cross_entropy_backward,
}
