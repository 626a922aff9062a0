"""Evaluation mode for a while, also where several threads use one module."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_LOCK = threading.Lock()
# of each module that is being used: by how many, and which of its parts were in training mode
_USERS: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = weakref.WeakKeyDictionary()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Inside, `module` is in evaluation mode: no dropout. Afterwards each part of it is in the mode that it was in.

    Several threads may be inside at once; the last one that leaves puts the modes back.
    """
    with _LOCK:
        count, training = _USERS.get(module, (0, []))
        if not count:
            training = [part for part in module.modules() if part.training]
            module.eval()
        _USERS[module] = (count + 1, training)
    try:
        yield
    finally:
        with _LOCK:
            count, training = _USERS.pop(module)
            if count > 1:
                _USERS[module] = (count - 1, training)
            else:
                for part in training:
                    part.training = True
