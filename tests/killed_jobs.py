"""Runs labelling jobs in child processes and kills them with SIGKILL at random moments, again and again.

    python killed_jobs.py TOKENS FOLDER KILLS SEED

A child is forked from this process, which has everything imported and has not yet run the model, and does what
`spear-fast label` does. Every other kill comes from outside: the child writes a byte into a pipe at each event, and the
kill comes some events and some milliseconds later. The others strike where it hurts most: before, in the middle of, or
after a write, a sync or a rename. Whatever is visible after a kill must be whole. Prints one JSON object: kills, jobs,
and how far each child got.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from labelling_jobs import tiny_model

from spear_fast.labelling import LabelOptions, label

OPTIONS = LabelOptions(max_length=8, rows_per_shard=10, batch_tokens=1024, max_source_tokens=40)
# a child that does not come to its next event within this time has hung
PATIENCE_SECONDS = 60


def strike_within(dice: random.Random) -> None:
    """Makes this process kill itself at some call that changes the disk, sometimes in the middle of a write."""
    left = dice.randint(0, 25)
    after = dice.random() < 0.5

    def armed(call):
        def run(*arguments):
            nonlocal left
            left -= 1
            if left >= 0:
                return call(*arguments)
            if after and call is write:
                call(arguments[0], arguments[1][: len(arguments[1]) // 2])
            elif after:
                call(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        return run

    write = os.write
    for name in ("write", "fsync", "replace", "unlink", "ftruncate"):
        setattr(os, name, armed(getattr(os, name)))


def start_child(tokens: Path, out: Path, dice: random.Random, within: bool) -> tuple[int, int]:
    """Returns the process id of a labelling job and the pipe of its events."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    os.close(reader)

    tell = os.write

    def report(event: str, **_fields: object) -> None:
        tell(writer, b".")

    if within:
        strike_within(dice)
    try:
        label([tokens], tiny_model(), out, OPTIONS, report=report)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def run_and_kill(tokens: Path, out: Path, dice: random.Random) -> tuple[bool, int]:
    """Runs a job once and kills it if it is not done before; returns whether it was killed, and its events."""
    within = dice.random() < 0.5
    child, events = start_child(tokens, out, random.Random(dice.random()), within)
    seen, wanted = 0, dice.randint(0, 6)
    signal.alarm(PATIENCE_SECONDS)
    while (within or seen < wanted) and os.read(events, 1):
        seen += 1
    if not within:
        time.sleep(dice.choice((0, 0, 0.0005, 0.002, 0.01, 0.03)) * dice.random())
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    os.close(events)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"a child ended with status {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status), seen


def check_visible(out: Path, before: dict[str, bytes]) -> dict[str, bytes]:
    """Returns the shards' bytes: all readable, and those that were there before unchanged."""
    shards = {path.name: path.read_bytes() for path in (out / "data").glob("*.parquet")}
    for name in shards:
        pq.read_table(out / "data" / name)
    changed = [name for name in before if shards.get(name) != before[name]]
    if changed:
        raise SystemExit(f"shards changed after they were written: {changed}")
    if (out / "manifest.json").exists():
        json.loads((out / "manifest.json").read_bytes())
    return shards


def main() -> None:
    tokens, folder, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    dice = random.Random(seed)
    killed = jobs = 0
    progress = []
    while killed < kills or progress[-1] != "done":
        out = folder / f"job{jobs}"
        shards: dict[str, bytes] = {}
        while True:
            was_killed, seen = run_and_kill(tokens, out, dice)
            shards = check_visible(out, shards)
            if not was_killed:
                break
            killed += 1
            progress.append(f"{seen} events, {len(shards)} shards")
        progress.append("done")
        jobs += 1
    print(json.dumps({"kills": killed, "jobs": jobs, "progress": progress}))


if __name__ == "__main__":
    main()
