"""A peer in a process of its own: its results, its errors, its end."""

from __future__ import annotations

import gc
import multiprocessing
import os

import pytest
import torch

from benchmarks.apart import apart


def counting(step: int):
    """Returns what counts on with each call, and tells where and with how many threads."""
    made = []

    def run():
        made.append(step)
        if len(made) == 3:
            raise ValueError("three is too many")
        return sum(made), os.getpid(), torch.get_num_threads()

    return run


def impossible():
    raise ImportError("no module of that name")


def test_it_is_made_once_and_runs_there():
    run = apart(counting, 5)
    (first, process, threads), (second, same, _) = run(), run()
    assert (first, second) == (5, 10)
    assert process == same != os.getpid()
    assert threads == 1
    with pytest.raises(RuntimeError, match="three is too many"):
        run()
    assert run()[0] == 20
    child = next(each for each in multiprocessing.active_children() if each.pid == process)
    del run
    gc.collect()
    child.join(timeout=20)
    assert child.exitcode == 0


def test_what_cannot_be_made_says_why():
    with pytest.raises(RuntimeError, match="no module of that name"):
        apart(impossible)
