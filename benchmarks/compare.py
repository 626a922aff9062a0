"""Compares two providers, or two commits, on the same cases: times in turn, and the ratio of each case.

    python -m benchmarks compare --providers cpu reference --ops rms_norm --fail-below 1.5
    python -m benchmarks compare --commits main --ops decode_cross_attention --fail-below 0.95

A commit is checked out into a git worktree, its extension built there, and both are measured by this checkout's
harness, in processes of their own that take turns. The ratio is old time by new time, or second by first: above 1 the
first of the providers, or the newer of the commits, is faster.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import op
from benchmarks import rows as rowfile
from benchmarks.build import build
from benchmarks.machine import REPOSITORY
from benchmarks.timing import quantile

SIDES = ("first", "second")


def ratios(first: Sequence[rowfile.Row], second: Sequence[rowfile.Row]) -> list[tuple[str, float, float, float]]:
    """Returns (what, first's seconds, second's seconds, second by first) for what both hold rows of.

    Several rows of one thing are rounds: their fastest median counts, since noise only ever adds.
    """

    def medians(rows: Sequence[rowfile.Row]) -> dict[tuple, float]:
        found: dict[tuple, float] = {}
        for row in rows:
            what = row["case"], row["mode"], row["dtype"], row["cache"], row["what"]
            found[what] = min(found.get(what, float("inf")), row["p50"])
        return found

    ours, theirs = medians(first), medians(second)
    return [
        (", ".join(filter(None, what)), ours[what], theirs[what], theirs[what] / ours[what])
        for what in ours
        if what in theirs
    ]


def of_providers(chosen: argparse.Namespace) -> tuple[list[rowfile.Row], list[rowfile.Row]]:
    """Measures both providers in one process, in turn."""
    if len(chosen.providers) != 2:
        raise ValueError(f"compare wants two providers, got {len(chosen.providers)}; pass --providers FIRST SECOND.")
    chosen.without_baselines = True
    found = op.run(chosen, None)
    first, second = ([{**row, "what": ""} for row in found if row["variant"] == name] for name in chosen.providers)
    return first, second


def of_commits(chosen: argparse.Namespace, options: Sequence[str]) -> tuple[list[rowfile.Row], list[rowfile.Row]]:
    """Measures this checkout, or the first commit named, and the other one, process by process in turn."""
    if len(chosen.commits) > 2:
        raise ValueError(f"compare wants one or two commits, got {len(chosen.commits)}; pass --commits [NEW] OLD.")
    found: dict[str, list[rowfile.Row]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="spear-fast-compare-") as folder:
        new = checkout(chosen.commits[0], Path(folder, "new")) if len(chosen.commits) == 2 else REPOSITORY
        folders = dict(zip(SIDES, (new, checkout(chosen.commits[-1], Path(folder, "old"))), strict=True))
        try:
            for i in range(chosen.rounds):
                for side in SIDES if i % 2 == 0 else reversed(SIDES):
                    out = Path(folder, f"{side}-{i}.jsonl")
                    command = [sys.executable, "-m", "benchmarks", "op", *options, "--without-baselines", "--out", out]
                    subprocess.run(command, cwd=folders[side], check=True, stdout=subprocess.DEVNULL)
                    # by the name that both sides know: what each chooses by itself, or the provider's own
                    found[side] += [
                        {**row, "what": what}
                        for row in (rowfile.read(out) if out.exists() else ())
                        for what in [row["variant"], *(["automatic"] if row["automatic"] else [])]
                    ]
        finally:
            for checked_out in folders.values():
                if checked_out != REPOSITORY:
                    _git("worktree", "remove", "--force", str(checked_out))
    return found["first"], found["second"]


def checkout(commit: str, folder: Path) -> Path:
    """Returns a worktree of a commit with its extension built and this checkout's harness instead of its own."""
    _git("worktree", "add", "--detach", str(folder), commit)
    for name in ("benchmarks", "tests"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    print(f"building {commit}", flush=True)
    build(folder)
    return folder


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments[:2])} failed: {done.stderr.strip()}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="spear-fast bench compare", description=__doc__.partition("\n")[0])
    op.add_arguments(parser)
    parser.add_argument("--commits", nargs="+", metavar="COMMIT", help="[NEW] OLD; NEW is this checkout if left out")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each commit (3)")
    parser.add_argument("--fail-below", type=float, metavar="RATIO", help="exit with 1 where any ratio is below")
    given = list(sys.argv[2:] if arguments is None else arguments)
    chosen = parser.parse_args(given)
    if chosen.commits:
        first, second = of_commits(chosen, _options_of_op(chosen))
    else:
        first, second = of_providers(chosen)
    found = ratios(first, second)
    if not found:
        raise ValueError("nothing was measured on both sides; choose other cases or providers.")
    lines = [(what, rowfile.seconds(a), rowfile.seconds(b), f"{ratio:.2f}") for what, a, b, ratio in found]
    print(rowfile.table(("case", "first", "second", "second / first"), lines))
    worst = min(found, key=lambda entry: entry[3])
    print(f"\nmedian ratio {quantile([entry[3] for entry in found], 0.5):.2f}, worst {worst[3]:.2f} ({worst[0]})")
    return int(chosen.fail_below is not None and worst[3] < chosen.fail_below)


def _options_of_op(chosen: argparse.Namespace) -> list[str]:
    """Returns the options that `op` understands, as they were given."""
    options: list[str] = []
    for name in ("ops", "cases", "providers", "dtypes", "caches"):
        values = getattr(chosen, name)
        options += [f"--{name}", *values] if values else []
    for name, value in (("set", chosen.kind), ("limit", chosen.limit), ("threads", chosen.threads)):
        options += [f"--{name}", str(value)] if value is not None else []
    options += ["--device", chosen.device, "--seconds", str(chosen.seconds)]
    return [*options, "--no-extra"] if chosen.no_extra else options
