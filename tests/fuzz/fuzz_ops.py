"""Ops and native classes with hostile arguments, in children under an electric fence: `make fuzz`.

A call may compute or raise; it must not crash, hang, or fail an assertion inside torch. Its seed says all of a case.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
GUARD = ROOT / "build" / "fuzz" / "guard.so"
BATCH = 50
# a case's seconds, and bytes of memory of a child
PATIENCE, MEMORY = 20, 8 << 30
# a batch's progress through a pipe: a case's seed, and what came of it; RUNNING is written before it
RECORD = struct.Struct("<qi")
RUNNING, COMPUTED, RAISED, ASSERTED = range(4)


def build_guard() -> None:
    """Compiles the fence where it is not there or older than its source."""
    source = Path(__file__).parent / "guard.c"
    if GUARD.is_file() and GUARD.stat().st_mtime >= source.stat().st_mtime:
        return
    compiler = shutil.which(os.environ.get("CC", "cc").split()[0])
    if compiler is None:
        raise SystemExit("make fuzz compiles an electric fence and found no C compiler: install gcc or set CC")
    GUARD.parent.mkdir(parents=True, exist_ok=True)
    unfinished = GUARD.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, "-O1", "-shared", "-fPIC", "-fno-builtin", "-o", str(unfinished), str(source), "-ldl"]
    subprocess.run(command, check=True)
    unfinished.replace(GUARD)


def fenced(argument: object) -> object:
    """Returns a plain tensor in fenced memory, with its strides; anything else as it is."""
    import torch

    if isinstance(argument, list):
        return [fenced(each) for each in argument]
    if not isinstance(argument, torch.Tensor) or argument.is_nested or argument.layout != torch.strided:
        return argument
    if argument.device.type != "cpu" or argument.requires_grad or argument.is_neg() or argument.is_conj():
        return argument
    if 0 in argument.stride() or argument._is_zerotensor():
        return argument
    return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype).copy_(argument)


def run_cases(seeds: list[int], pipe: int) -> None:
    """Runs cases in this process, and writes what came of each into the pipe."""
    from fuzz_cases import case_of

    guard = ctypes.CDLL(str(GUARD))
    for seed in seeds:
        os.write(pipe, RECORD.pack(seed, RUNNING))
        signal.alarm(PATIENCE)
        case = case_of(seed)
        guard.guard_arm(1)
        # an argument that comes twice stays one
        once = {id(argument): fenced(argument) for argument in case.arguments}
        outcome = COMPUTED
        try:
            case.function(*(once[id(argument)] for argument in case.arguments))
        except Exception as error:
            outcome = ASSERTED if "INTERNAL ASSERT" in str(error) else RAISED
        guard.guard_arm(0)
        os.write(pipe, RECORD.pack(seed, outcome))


def run_batch(seeds: list[int]) -> tuple[dict[int, int], int]:
    """Runs cases in a child; returns what came of each that was begun, and how the child ended (0, or -signal)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = 1
        try:
            run_cases(seeds, writing)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    whole = len(data) // RECORD.size * RECORD.size
    return dict(RECORD.iter_unpack(data[:whole])), ended


def fuzz(first: int, count: int, seconds: float) -> int:
    """Runs cases from the seed `first` on, `count` of them or until `seconds` have passed; returns how many failed."""
    from fuzz_cases import case_of

    began, seed, tally, failed = time.monotonic(), first, Counter(), 0
    while seed < first + count and time.monotonic() - began < seconds:
        outcomes, ended = run_batch(list(range(seed, min(seed + BATCH, first + count))))
        for each, outcome in outcomes.items():
            tally[outcome] += 1
            if outcome in (COMPUTED, RAISED):
                continue
            failed += 1
            state = "an assertion inside torch" if outcome == ASSERTED else _ending(ended)
            print(f"seed {each}: {state}: {case_of(each)}", flush=True)
        if not outcomes:
            raise SystemExit(f"fuzz: the batch from seed {seed} on did not begin ({_ending(ended)})")
        seed = max(outcomes) + 1
    took = time.monotonic() - began
    counts = f"{tally[COMPUTED]} computed, {tally[RAISED]} refused, {failed} failed"
    print(f"fuzz: seeds {first}..{seed - 1} in {took:.0f} s: {counts}")
    return failed


def _ending(ended: int) -> str:
    if ended >= 0:
        return f"exit {ended}"
    return f"no end in {PATIENCE} s" if -ended == signal.SIGALRM else signal.Signals(-ended).name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="the first case; drawn, and printed, if left out")
    parser.add_argument("--cases", type=int, default=20_000, help="how many (default: 20000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    wanted = parser.parse_args()
    if "guard.so" not in os.environ.get("LD_PRELOAD", ""):
        build_guard()
        os.environ["LD_PRELOAD"] = str(GUARD)
        os.execv(sys.executable, [sys.executable, __file__, *sys.argv[1:]])
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import torch

    from spear_fast.ops import extension

    missing = extension.missing()
    if missing is not None:
        raise SystemExit(f"fuzz: {missing}")
    torch.set_num_threads(1)
    # what torch imports for shapes alone would take more fenced pieces than a process may have
    torch.ops.spear_fast.geglu(torch.empty(2, 4, device="meta"), None, 2, None)
    first = wanted.seed if wanted.seed is not None else int.from_bytes(os.urandom(4), "little")
    print(f"fuzz: from seed {first} on (--seed {first} runs the same cases)", flush=True)
    return 1 if fuzz(first, wanted.cases, wanted.seconds) else 0


if __name__ == "__main__":
    sys.exit(main())
