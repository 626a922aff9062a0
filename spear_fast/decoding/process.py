"""What tunes the whole process on a CPU: torch's threads shared out among workers, and free memory given back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import torch

# utterances that come at once whose encoding leaves memory that is worth giving back; it takes milliseconds
MANY = 8
# steps of workers between two times that free memory is given back: malloc holds some for each thread, 14 MB for 160
# rows
TRIM_EVERY = 64


def give_memory_back_after_admission(admitted: int, slots: int) -> None:
    """Gives free memory back to the system where so many came at once that what encoding them held is worth it.

    It would stay beside the caches, which fill up from then on.
    """
    if admitted >= max(MANY, slots // 2):
        torch.ops.spear_fast.give_memory_back()


def give_memory_back_after_step(step: int) -> None:
    """Gives back what malloc holds for the threads of workers, now and then. step: counts from 1."""
    if step % TRIM_EVERY == TRIM_EVERY // 2:
        torch.ops.spear_fast.give_memory_back()


def share_threads(pool: ThreadPoolExecutor, workers: int, threads: int) -> None:
    """Gives each of a pool's `workers` threads its share of torch's `threads`; everybody else keeps all of them."""
    together = threading.Barrier(workers)

    def set_share() -> None:
        # returns when all do, so that each of them has been here
        torch.ops.spear_fast.set_num_threads(max(1, threads // workers))
        together.wait()

    wait([pool.submit(set_share) for _ in range(workers)])
    # for libraries that know one number for all, and for threads to come
    torch.set_num_threads(threads)
