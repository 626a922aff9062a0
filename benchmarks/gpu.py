"""Everything that a machine with a CUDA GPU can say, in one command and a few minutes: `make gpu OUT=folder`.

Builds the extension, shows what can run, runs the tests of the GPU, then measures ops, generation and training at the
real sizes. Each stage has its own limit and the most important come first; rows are written as they are measured, so
that what was done stays when the time is over. No network, and neither the reference package nor peers are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import rows as rowfile
from benchmarks.machine import CPU, REPOSITORY, RESULTS, device_name, slug

# seconds kept for the plots and the summary
LAST = 20.0


@dataclass(frozen=True)
class Stage:
    """A command, the seconds after which it is ended, and what to run in its place where it fails."""

    name: str
    command: Sequence[str]
    limit: float
    otherwise: Sequence[str] = ()


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-u", *arguments]


def gpu_tests() -> list[str]:
    """Returns the test files that run on a GPU where there is one."""
    found = []
    for path in sorted((REPOSITORY / "tests").glob("test_*.py")):
        named = path.name.startswith("test_ops_") or any(word in path.name for word in ("cuda", "gpu", "kernels"))
        if named or "mark.gpu" in path.read_text():
            found.append(str(path.relative_to(REPOSITORY)))
    return found


def stages(out: Path, *, dry: bool) -> list[Stage]:
    """Returns what is done, the most important first. dry: on the CPU at tiny sizes, to see that all works."""
    where = ["--device", "cpu" if dry else "cuda", "--out", str(out)]
    size = ["--set", "tiny" if dry else "gpu"]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    parallel = ["-n", "8"] if not dry and _has("xdist") else []
    tests = (
        ["tests/test_benchmarks.py", "-k", "quantile or samples"] if dry else [*gpu_tests(), "-m", "gpu or not slow"]
    )
    seconds = ["--seconds", "0" if dry else "0.4"]
    found = [
        Stage("info", python("-m", "spear_fast", "info"), 60),
        Stage("tests", python(*pytest, *parallel, *tests), 150),
        Stage("op", python("-m", "benchmarks", "op", *size, *seconds, *where, "--no-extra", "--limit", "110"), 130),
        Stage("generate", python("-m", "benchmarks", "generate", *size, *where, "--limit", "60"), 80),
        Stage("train", python("-m", "benchmarks", "train", *size, *where), 40),
        Stage("op, further shapes", python("-m", "benchmarks", "op", *size, *seconds, *where, "--only-extra"), 600),
    ]
    if dry:
        return found[:-1]
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-q", "-e", "."]
    build = Stage("build", python(*install), 180, otherwise=python("-m", "benchmarks.build"))
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        memcheck = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *python(*pytest), *gpu_tests()]
        found.insert(-1, Stage("memcheck", [*memcheck, "-k", "cuda and float32 and not reference and not triton"], 60))
    return [build, *found]


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def run_stage(command: Sequence[str], limit: float, log: Path) -> str:
    """Runs a command, its output to the log and to ours, and ends it and its children after `limit` seconds.

    Returns "done", "failed (status)" or "cut off".
    """
    with log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        cut = threading.Event()

        def end() -> None:
            cut.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, end)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
        status = process.wait()
        timer.cancel()
    if cut.is_set():
        return "cut off"
    return "done" if status == 0 else f"failed ({status})"


def run(todo: Sequence[Stage], budget: float, log: Path) -> list[dict]:
    """Runs stages one by one within the budget; returns a record of each: name, seconds, result."""
    began, records = time.monotonic(), []
    for stage in todo:
        left = budget - (time.monotonic() - began)
        if left < 5:
            records.append({"stage": stage.name, "seconds": 0.0, "result": "not begun"})
            continue
        print(f"== {stage.name} (at most {min(stage.limit, left):.0f} s)", flush=True)
        start = time.monotonic()
        result = run_stage(stage.command, min(stage.limit, left), log)
        if result.startswith("failed") and stage.otherwise:
            print(f"== {stage.name} again, otherwise", flush=True)
            left = max(5.0, budget - (time.monotonic() - began))
            result = run_stage(stage.otherwise, min(stage.limit, left), log)
        records.append({"stage": stage.name, "seconds": round(time.monotonic() - start, 1), "result": result})
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for rows, plots and the log")
    parser.add_argument("--budget", type=float, default=520, help="seconds for everything (520)")
    parser.add_argument("--dry-run", action="store_true", help="the same on the CPU, at tiny sizes")
    chosen = parser.parse_args(arguments)
    if not chosen.dry_run and not torch.cuda.is_available():
        print("gpu: there is no CUDA device here; run it where there is one, or try the machinery with --dry-run.")
        return 2
    out: Path = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = CPU if chosen.dry_run else torch.device("cuda")
    log = out / f"{slug(device_name(device))}.log"
    log.unlink(missing_ok=True)
    records = run(stages(out, dry=chosen.dry_run), chosen.budget - LAST, log)
    _draw(out)
    lines = [(record["stage"], record["seconds"], record["result"]) for record in records]
    summary = rowfile.table(("stage", "seconds", "result"), lines)
    print(f"\n{summary}\n\n{json.dumps({'device': device_name(device), 'stages': records})}")
    with log.open("a") as file:
        file.write(f"\n{summary}\n")
    # a stage that was cut off for want of time is no failure
    return int(any(record["result"].startswith("failed") for record in records))


def _draw(out: Path) -> None:
    from benchmarks.plots import draw

    try:
        paths = draw([row for rows in rowfile.read_all(out).values() for row in rows], out)
        print("\n".join(map(str, paths)))
    except ValueError as error:
        print(f"no plots: {error}")
