"""Whether modules whose weights were packed have changed since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# values of each parameter that show whether it has changed
SAMPLES = 16


class Watch:
    """Remembers the parameters of modules, and tensors of their own, as they are now."""

    def __init__(self, modules: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        self._modules, self._tensors = modules, tensors
        self._signature, self._samples = self._current_signature(), self._current_samples()

    def changed(self) -> bool:
        """Returns whether one of them has since been changed, moved or replaced.

        Writing through `.data`, as moving averages and some optimizers do, leaves no trace but the values: a sample of
        them is compared, which shows every change of whole tensors, not that of a single element by hand.
        """
        return self._signature != self._current_signature() or not torch.equal(self._samples, self._current_samples())

    def _current(self) -> list[Tensor]:
        return [*self._tensors, *(parameter for module in self._modules for parameter in module.parameters())]

    def _current_samples(self) -> Tensor:
        """Returns a few values of every parameter, `[values]` float32."""
        flat = [tensor.detach().reshape(-1) for tensor in self._current()]
        return torch.cat([values[:: max(1, len(values) // SAMPLES)].float() for values in flat])

    def _current_signature(self) -> list[tuple]:
        return [
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device)
            for tensor in self._current()
        ]
