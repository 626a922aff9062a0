"""The arguments of `attention` and of its gradients, in their schemas' order, and what a provider is told of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class AttentionArgs(NamedTuple):
    """The arguments of `attention`; see there for shapes and dtypes."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    cu_query: Tensor | None
    cu_key: Tensor | None
    max_query: int
    max_key: int
    null_key: Tensor | None
    null_value: Tensor | None
    freqs: Tensor | None
    causal: bool
    modulo_heads: bool
    dropout: float
    seed: Tensor | None

    def backward(self, grad_out: Tensor, out: Tensor, lse: Tensor) -> AttentionBackwardArgs:
        """Returns the arguments of `attention_backward` for these, their results and the gradient of the output."""
        return AttentionBackwardArgs(grad_out=grad_out, out=out, lse=lse, **self._asdict())


class AttentionBackwardArgs(NamedTuple):
    """The arguments of `attention_backward`: those of `attention`, what it returned, and the gradient of its output."""

    grad_out: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    key_mask: Tensor | None
    cu_query: Tensor | None
    cu_key: Tensor | None
    max_query: int
    max_key: int
    null_key: Tensor | None
    null_value: Tensor | None
    freqs: Tensor | None
    causal: bool
    modulo_heads: bool
    dropout: float
    seed: Tensor | None


class AttentionOptions(NamedTuple):
    """What a provider of `attention` may refuse, beside device, dtype and head size; see `AttentionArgs`."""

    packed: bool = False
    masked: bool = False
    null: bool = False
    rotary: bool = False
    causal: bool = False
    grouped: bool = False
    modulo: bool = False
    dropout: bool = False


def _options(args: AttentionArgs | AttentionBackwardArgs) -> AttentionOptions:
    kv_heads = args.key.shape[-2]
    grouped = kv_heads != args.query.shape[-2]
    return AttentionOptions(
        args.cu_query is not None,
        args.key_mask is not None,
        args.null_key is not None,
        args.freqs is not None,
        args.causal,
        grouped,
        # one key head, or one for each query head, is read alike in either order
        args.modulo_heads and grouped and kv_heads > 1,
        args.dropout > 0,
    )


def options_of(*arguments: Any) -> AttentionOptions:
    """Returns the options of a call of `attention` with these arguments."""
    return _options(AttentionArgs(*arguments))


def backward_options_of(*arguments: Any) -> AttentionOptions:
    """Returns the options of a call of `attention_backward` with these arguments."""
    return _options(AttentionBackwardArgs(*arguments))
