"""Everything that a machine with a CUDA GPU can say, in one command and a few minutes: `make gpu OUT=folder`.

Builds the extension for this GPU, shows what can run, measures ops, generation, single steps and the labelling job at
the real sizes, runs the tests of the GPU, then measures peers and training, and looks for bad memory accesses. Each
stage has its own limit and the most important come first; rows are written as they are measured, so that what was done
stays when the time is over. No network; the reference package and peers are measured where they can be imported.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import kit
from benchmarks import rows as rowfile
from benchmarks.machine import CPU, REPOSITORY, RESULTS, device_name, slug
from benchmarks.pages import tables

# seconds for everything, and those of them that are reserved for the plots and the summary
BUDGET, LAST = 560.0, 20.0
# for whether all is right
PROOF = 240.0
# the CUDA kernels' values and what only a device shows; a graph cannot be captured without torch's cache of memory
MEMCHECKED = (
    "tests/test_gpu_ops.py", "tests/test_gpu_step.py", "tests/test_ops_values.py", "tests/test_ops_selection.py", "-k",
    "gpu_step and guided and bfloat16 or cuda and (float32 or gpu_ops) and not reference and not triton and not graph",
)  # fmt: skip
# every tensor then is an allocation of its own, so that what is read past its end is seen
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Stage:
    """A command, the seconds after which it is ended, and what it has in its environment beside ours."""

    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)


NAMES = (
    "build", "info", "proof", "step", "label", "op", "generate", "train", "label-peers", "generate-peers", "tests",
    "further-ops",
)  # fmt: skip


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-u", *arguments]


def benchmark(*arguments: str) -> list[str]:
    return python("-m", "benchmarks", *arguments)


def gpu_tests() -> list[str]:
    """Returns the test files that run on a GPU where there is one."""
    found = []
    for path in sorted((REPOSITORY / "tests").glob("test_*.py")):
        if path.name.startswith(("test_ops_", "test_triton_")) or "mark.gpu" in path.read_text():
            found.append(str(path.relative_to(REPOSITORY)))
    return found


def stages(out: Path, *, dry: bool) -> list[Stage]:
    """Returns what is done, the most important first. dry: on the CPU at tiny sizes, to see that all works."""
    # one thread: at tiny sizes several only wait for each other
    where = ["--device", *(("cpu", "--threads", "1") if dry else ("cuda",)), "--out", str(out)]
    all_of = ["--set", "tiny" if dry else "gpu", *where]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    parallel = ["-n", "8"] if not dry and _has("xdist") else []
    tests = (
        ["tests/test_benchmarks.py", "-k", "quantile or samples"] if dry else [*gpu_tests(), "-m", "gpu or not slow"]
    )
    ops = ["--seconds", "0" if dry else "0.15", "--caches", "cold", "--spread", *all_of]
    beside_peers = ["--cases", "tiny"] if dry else ["--cases", "1024x12 32x4", "512x6 32x4"]
    label = ["--rounds", "1", "--limit", "40", *all_of]
    found = [
        Stage("info", python("-m", "spear_fast", "info"), 30),
        Stage("proof", python("-m", "benchmarks.proof", *(["--dry-run"] if dry else []), "--out", str(out)), PROOF),
        Stage("step", benchmark("step", "--rounds", "2", "--limit", "45", *all_of), 70),
        Stage("label", benchmark("label", *label), 80),
        Stage("op", benchmark("op", *ops, "--no-extra", "--limit", "65"), 80),
        Stage("generate", benchmark("generate", "--engine-only", "--rounds", "2", "--limit", "45", *all_of), 70),
        Stage("train", benchmark("train", "--rounds", "3", "--limit", "30", *all_of), 50),
        Stage("label-peers", benchmark("label", "--peers-only", "--cases", "tiny" if dry else "1024x12", *label), 75),
        Stage("generate-peers", benchmark("generate", "--peers", "--rounds", "2", *beside_peers, *where), 60),
        Stage("tests", python(*pytest, *parallel, *tests), 110),
        Stage("further-ops", benchmark("op", *ops, "--only-extra"), 600),
    ]
    if dry:
        return found[:-1]
    return [Stage("build", python("-m", "benchmarks.build"), 150, _for_this_gpu()), *found]


def _from_kit() -> bool:
    """Takes what was made beforehand, where a kit lies here; returns whether nothing is left to build."""
    if not (kit.FOLDER / "kit.json").is_file():
        return False
    variables, wrong = kit.use(kit.FOLDER)
    os.environ.update(variables)
    for reason in wrong:
        print(f"gpu-kit: {reason}", flush=True)
    return not wrong


def memcheck() -> list[str]:
    """Returns what runs a command under compute-sanitizer; where that is not on the path, it is sought beside nvcc."""
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    return [found or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]


def _for_this_gpu() -> dict[str, str]:
    """Returns what builds the kernels for this machine's GPU alone, unless somebody said for which."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ or not torch.cuda.is_available():
        return {}
    return {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def run_stage(stage: Stage, limit: float, log: Path) -> str:
    """Runs a stage, its output to the log and to ours, and ends it and its children after `limit` seconds.

    Returns "done", "failed (status)", "cut off" or "not installed".
    """
    with log.open("a") as file:
        if shutil.which(stage.command[0]) is None:
            said = f"{stage.command[0]} is not installed\n"
            print(said, end="", flush=True)
            file.write(said)
            return "not installed"
        process = subprocess.Popen(
            stage.command,
            cwd=REPOSITORY,
            env={**os.environ, **stage.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
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


def run(todo: Sequence[Stage], limit: float, log: Path) -> list[dict]:
    """Runs stages one by one within the time; returns a record of each: name, seconds, result."""
    began, records = time.monotonic(), []
    for stage in todo:
        left = limit - (time.monotonic() - began)
        if left < 5:
            records.append({"stage": stage.name, "seconds": 0.0, "result": "not begun"})
            continue
        print(f"== {stage.name} (at most {min(stage.limit, left):.0f} s)", flush=True)
        start = time.monotonic()
        result = run_stage(stage, min(stage.limit, left), log)
        records.append({"stage": stage.name, "seconds": round(time.monotonic() - start, 1), "result": result})
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for rows, plots and the log")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for everything ({BUDGET:g})")
    parser.add_argument(
        "--stages", nargs="+", choices=NAMES, metavar="STAGE", help=f"these alone, of {', '.join(NAMES)}"
    )
    parser.add_argument("--dry-run", action="store_true", help="the same on the CPU, at tiny sizes")
    chosen = parser.parse_args(arguments)
    if not chosen.dry_run and not torch.cuda.is_available():
        print("gpu: there is no CUDA device here; run it where there is one, or try the machinery with --dry-run.")
        return 2
    out: Path = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    made = _from_kit() if not chosen.dry_run else False
    device = CPU if chosen.dry_run else torch.device("cuda")
    log = out / f"{slug(device_name(device))}.log"
    log.unlink(missing_ok=True)
    wanted = set(chosen.stages or NAMES) - ({"build"} if made else set())
    todo = [stage for stage in stages(out, dry=chosen.dry_run) if stage.name in wanted]
    records = run(todo, chosen.budget - LAST, log)
    _draw(out)
    said = tables(out, device_name(device))
    lines = [(record["stage"], record["seconds"], record["result"]) for record in records]
    summary = rowfile.table(("stage", "seconds", "result"), lines)
    print(f"\n{said}\n\n{summary}\n\n{json.dumps({'device': device_name(device), 'stages': records})}")
    with log.open("a") as file:
        file.write(f"\n{said}\n\n{summary}\n")
    # a stage that was cut off for want of time is no failure
    return int(any(record["result"].startswith("failed") for record in records))


def _draw(out: Path) -> None:
    from benchmarks.plots import draw

    try:
        paths = draw([row for rows in rowfile.read_all(out).values() for row in rows], out)
        print("\n".join(map(str, paths)))
    except ValueError as error:
        print(f"no plots: {error}")
