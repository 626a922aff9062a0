"""A peer in a process of its own, asked for its work from this one.

Libraries that bring OpenMP share one count of threads in a process: once there are more than processors, threads no
longer wait for work but go to sleep, and whatever computes with torch becomes up to twice as slow, for good. So a peer
with threads of its own runs apart. There its threads wait actively, which makes it faster, up to 1.6 times; and it is
stopped while nobody asks, so that they take no time from others.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

WAITING = {"OMP_WAIT_POLICY": "ACTIVE"}


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
        _signal(process, "SIGSTOP")
        if error is not None:
            raise RuntimeError(error)
        return result

    def run() -> Any:
        _signal(process, "SIGCONT")
        here.send(True)
        return answer()

    # whoever lets go of it lets the process end
    weakref.finalize(run, _end, process, here)
    answer()
    return run


def _end(process: Any, pipe: Connection) -> None:
    pipe.close()
    _signal(process, "SIGCONT")


def _signal(process: Any, name: str) -> None:
    # some systems cannot stop a process
    if hasattr(signal, name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, getattr(signal, name))


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
