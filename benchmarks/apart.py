"""A peer in a process of its own, asked for its work from this one.

Libraries that bring OpenMP share one count of threads in a process: once there are more than processors, threads no
longer wait for work but go to sleep, and whatever computes with torch becomes up to twice as slow, for good. So a peer
with threads of its own runs apart, and is told to let them wait awake for a while, with which CTranslate2 on two cores
is up to 1.6 times as fast as without (and half as fast where they may wait so for ever).
"""

from __future__ import annotations

import multiprocessing
import os
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

# for GNU's OpenMP
WAITING = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "100000"}


def apart(make: Callable[..., Callable[[], Any]], *arguments: Any) -> Callable[[], Any]:
    """Returns what runs `make(*arguments)()` in a process of its own, where `make` is called now.

    make: a function of a module; it and its arguments are sent there, and so is each result back. torch has one thread
    there. Raises RuntimeError with the other side's words where it fails.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
    before = {name: os.environ.get(name) for name in WAITING}
    os.environ.update(WAITING)
    try:
        process.start()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    there.close()

    def answer() -> Any:
        try:
            error, result = here.recv()
        except EOFError:
            raise RuntimeError("the process of a peer has ended unasked") from None
        if error is not None:
            raise RuntimeError(error)
        return result

    def run() -> Any:
        here.send(True)
        return answer()

    # whoever lets go of it lets the process end
    weakref.finalize(run, here.close)
    answer()
    return run


def _serve(pipe: Connection, make: Callable[..., Callable[[], Any]], arguments: tuple) -> None:
    torch.set_num_threads(1)
    run = None
    while True:
        try:
            result = None
            if run is None:
                run = make(*arguments)
            else:
                result = run()
            pipe.send((None, result))
        except Exception as error:
            pipe.send((str(error) or type(error).__name__, None))
        try:
            pipe.recv()
        except EOFError:
            return
