"""Between host and device without making the host wait: on CUDA through page-locked memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the host on `device`; on CUDA it is there once the current stream has come so far."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Returns tensors of one device as arrays of the host; from another device in one copy, and with one wait."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return {name: tensor.numpy() for name, tensor in tensors.items()}
    held = packed(tensors)
    # what CUDA copies without waiting lands in page-locked memory
    copy = held.to("cpu", non_blocking=True)
    if held.is_cuda:
        torch.cuda.current_stream(held.device).synchronize()
    return unpacked(copy.numpy(), tensors)


def packed(tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns the bytes of tensors of one device one after the other, uint8, so ordered that each is aligned."""
    ordered = [tensors[name] for name in _widest_first(tensors)]
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in ordered])


def unpacked(held: np.ndarray, like: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Returns the arrays that `packed` made one of; like: the tensors that it was given."""
    arrays: dict[str, np.ndarray] = {}
    at = 0
    for name in _widest_first(like):
        tensor = like[name]
        end = at + tensor.numel() * tensor.element_size()
        dtype = torch.empty(0, dtype=tensor.dtype, device="cpu").numpy().dtype
        arrays[name] = held[at:end].view(dtype).reshape(tuple(tensor.shape))
        at = end
    return arrays


def _widest_first(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: -tensors[name].element_size())
