"""How many kernels a call launches on a GPU, counted by what is dispatched on the CPU."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# they make or describe memory, and compute nothing
FREE = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::detach", "aten::resolve_conj"}


class CountLaunches(TorchDispatchMode):
    """Within it, `counted` counts kernels by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        result = func(*args, **(kwargs or {}))
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        # a cast may give back what it was given
        launches = result is not args[0] if name == "aten::to" else not is_view and name not in FREE
        if launches:
            self.counted[name] += 1
        return result

    @property
    def total(self) -> int:
        return sum(self.counted.values())


def launches_of(function, *arguments) -> Counter[str]:
    """Returns what a call launches, by name."""
    with torch.inference_mode(), CountLaunches() as mode:
        function(*arguments)
    return mode.counted
