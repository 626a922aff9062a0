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
    """Returns tensors of one device as arrays of the host, having waited for all of them once."""
    # what CUDA copies without waiting lands in page-locked memory
    copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return {name: copy.numpy() for name, copy in copies.items()}
