"""A stand-in for a device whose numbers nobody may look at: meta tensors, and a guard over what is done with them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
# what these return, or its shape, is known on the host only after having waited for the device
ASKING = (
    "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal", "item", "_local_scalar_dense",
    "repeat_interleave.Tensor",
)  # fmt: skip


def tensors_of(thing: Any) -> list[Tensor]:
    """Returns all tensors in lists, records and objects with attributes."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, (list, tuple)):
        return [tensor for each in thing for tensor in tensors_of(each)]
    if isinstance(thing, dict):
        return tensors_of(list(thing.values()))
    if dataclasses.is_dataclass(thing) or type(thing).__module__.startswith("spear_fast."):
        return tensors_of(list(vars(thing).values()))
    return []


class NoHostReads(TorchDispatchMode):
    """Raises where something is read back from the stand-in, or copied to it from the host.

    known: what lies on the device before; a tensor that is neither that nor made of it has come from the host.
    """

    def __init__(self, *known: Any):
        super().__init__()
        # held on to, so that no other tensor is given the same identity
        self.known = {id(tensor): tensor for tensor in tensors_of(list(known))}
        self.made = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function)
        given = [each for each in tree_leaves((arguments, keywords or {})) if isinstance(each, Tensor)]
        masked = name.startswith("aten.index") and any(each.dtype == torch.bool for each in tensors_of(arguments[1]))
        asking = masked or any(f"aten.{word}" in name for word in ASKING)
        # with the size of its result said, it need not be asked for
        asking = asking and (keywords or {}).get("output_size") is None
        if asking and any(tensor.device == DEVICE for tensor in given):
            raise AssertionError(f"{name} waits for the device")
        for tensor in given:
            if tensor.device == DEVICE and id(tensor) not in self.known:
                raise AssertionError(f"{name} takes a tensor that comes from the host {list(tensor.shape)}")
        result = function(*arguments, **(keywords or {}))
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if len({tensor.device for tensor in (*given, *made)}) > 1:
            raise AssertionError(f"{name} copies between host and device")
        for tensor in made:
            self.known[id(tensor)] = tensor
        self.made += len(made)
        return result

    def send(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Stands for `transfer.to_device`, which makes nobody wait."""
        with _disable_current_modes():
            sent = tensor.to(device)
        self.known[id(sent)] = sent
        return sent
