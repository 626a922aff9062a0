"""The loss of tied-embedding logits without keeping the logits, and the log-probabilities of given labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spear_fast.ops import backends
from spear_fast.ops.checks import check_common, check_shapes, refuse, shape_of
from spear_fast.ops.providers import register
from spear_fast.ops.reference import cross_entropy as reference
from spear_fast.ops.registry import autocasts, define, differentiate


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Returns `-log_softmax(hidden @ weight.T)` at each label, in nats, `[...]`, float32 (float64 of float64).

    The logits are computed some at a time, forward and backward, and never rounded to a half type. Under autocast the
    product takes its operands in autocast's dtype, as a linear layer would.

    hidden: `[..., dim]`, floating point. weight: `[vocabulary, dim]`, like hidden: the embedding, where it is tied.
    labels: `[...]`, int64, ids of the vocabulary; where one is ignore_index, the loss and all gradients are zero.

    Raises ValueError where the arguments do not fit each other, or a label is neither an id nor ignore_index.
    Source: the loss of the reference, which keeps the logits (reference line 1095).
    """
    if labels.shape != hidden.shape[:-1]:
        check_shapes("cross_entropy", {"labels": (labels, "hidden's sizes but the last", hidden.shape[:-1])})
    if autocasts(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    losses, _ = _cross_entropy(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), ignore_index)
    return losses.view(labels.shape)


def label_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Returns `log_softmax(hidden @ weight.T)` at each label, in nats, `[...]`, float32 (float64 of float64).

    hidden: `[..., dim]`. weight: `[vocabulary, dim]`. labels: `[...]`, int64; zero where one is ignore_index.

    Raises ValueError as `cross_entropy` does, whose negative it is.
    """
    return -cross_entropy(hidden, weight, labels, ignore_index)


def _check_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, op: str = "cross_entropy"
) -> None:
    """Raises ValueError unless the arguments fit each other; providers check that labels lie in the vocabulary."""
    if hidden.dim() != 2:
        refuse(op, "hidden", "[n, dim]", shape_of(hidden), "flatten what comes before the last dimension")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        wanted = f"[vocabulary, dim] with dim {int(hidden.shape[1])}"
        refuse(op, "weight", wanted, shape_of(weight), "pass the embedding, a row for each id")
    if labels.shape != hidden.shape[:1]:
        check_shapes(op, {"labels": (labels, "n", (hidden.shape[0],))})
    check_common(op, "hidden", {"hidden": hidden, "weight": weight}, None, {"labels": (labels, torch.int64)})


def _check_cross_entropy_backward(
    grad_losses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, ignore_index: int
) -> None:
    op = "cross_entropy_backward"
    _check_cross_entropy(hidden, weight, labels, ignore_index, op)
    rows = (hidden.shape[0],)
    check_shapes(op, {"grad_losses": (grad_losses, "n", rows), "lse": (lse, "n", rows)})
    precision = torch.promote_types(torch.float32, hidden.dtype)
    for name, tensor in (("grad_losses", grad_losses), ("lse", lse)):
        if tensor.dtype != precision or tensor.device != hidden.device:
            found = f"{tensor.dtype} on {tensor.device}"
            refuse(op, name, f"{precision} on {hidden.device}", found, "pass what the forward returned")


def _fake_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    _check_cross_entropy(hidden, weight, labels, ignore_index)
    precision = torch.promote_types(torch.float32, hidden.dtype)
    return hidden.new_empty(hidden.shape[0], dtype=precision), hidden.new_empty(hidden.shape[0], dtype=precision)


def _fake_cross_entropy_backward(
    grad_losses: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    _check_cross_entropy_backward(grad_losses, hidden, weight, labels, lse, ignore_index)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


_cross_entropy = define(
    "cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor labels, int ignore_index) -> (Tensor losses, Tensor lse)",
    check=_check_cross_entropy,
    fake=_fake_cross_entropy,
    native=("cpu",),
)
_cross_entropy_backward = define(
    "cross_entropy_backward",
    "(Tensor grad_losses, Tensor hidden, Tensor weight, Tensor labels, Tensor lse, int ignore_index)"
    " -> (Tensor grad_hidden, Tensor grad_weight)",
    check=_check_cross_entropy_backward,
    fake=_fake_cross_entropy_backward,
    native=("cpu",),
)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, labels, ctx.ignore_index = inputs
    ctx.save_for_backward(hidden, weight, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_losses: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight = _cross_entropy_backward(grad_losses, *ctx.saved_tensors, ctx.ignore_index)
    return grad_hidden, grad_weight, None, None


differentiate("cross_entropy", _differentiate, _save)

for _op in ("cross_entropy", "cross_entropy_backward"):
    register(backends.cpu(_op))
    register(backends.triton(_op, "cross_entropy"))
    register(backends.reference(_op, reference))
