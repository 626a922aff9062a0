"""What the launches of the selection kernels share."""

from __future__ import annotations

from torch import Tensor

# as in csrc/cuda/selecting.h
THREADS = 256
_AXES = ("utterance", "beam", "token")


def logits_fields(name: str, logits: Tensor | None) -> dict[str, int]:
    """Returns the fields for one of the tensors of logits, which may be missing: its address and its strides.

    name: of the op's argument; the fields of the strides leave out its `_logits`.
    """
    stem, strides = name.removesuffix("_logits"), (0, 0, 0) if logits is None else logits.stride()
    values = {f"{stem}_{axis}": stride for axis, stride in zip(_AXES, strides, strict=True)}
    return {name: 0 if logits is None else logits.data_ptr()} | values


def state_fields(logits: Tensor, state: dict[str, Tensor]) -> dict[str, int]:
    """Returns the fields for parameters and buffers: addresses and sizes.

    logits: `[utterances, beams, vocabulary]`. state: the op's arguments after the logits, by their names.
    """
    utterances, beams, vocab = logits.shape
    values = {name: tensor.data_ptr() for name, tensor in state.items()}
    values |= {"utterances": utterances, "beams": beams, "vocab": vocab, "capacity": state["tokens"].shape[1]}
    values |= {"halves": state["lengths"].shape[0] // max(utterances, 1), "prefix_width": state["prefix"].shape[1]}
    return values
