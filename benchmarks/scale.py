"""A job of 60,000 hours on 64 GPUs, simulated: what preemptions, slow GPUs and a lost node cost, by the size of shards.

    python -m benchmarks scale [--rate 1500]
    python -m benchmarks scale --measure --out benchmarks/results

What a shard costs beside its labels is measured: `--measure` writes a row of the process's start, of shards written,
and of labels journalled on this machine, and the newest row counts. The rest is said in the table.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import rows as rowfile
from benchmarks.label import CLIP_SECONDS, HOURS, REAL_TIME
from benchmarks.machine import CPU, RESULTS, environment, results_file
from benchmarks.simulation import Cluster, Faults, Way, losses

ROWS = int(HOURS * 3600 / CLIP_SECONDS)
# times real time of one GPU: what labelling on it aims at
RATE = REAL_TIME["label 1024x12"]
SIZES = (512, 2048, 4096, 16384, 65536)
SEEDS = range(8)
CLUSTER = Cluster()
# what the table of causes has, all at once
ALL = Faults(preempted=4 * 3600.0, slow=2, spread=0.05, lost=1)
FAULTS = {
    "none": Faults(),
    "preemptions": Faults(preempted=ALL.preempted),
    "slow GPUs": Faults(slow=ALL.slow, spread=ALL.spread),
    "a lost node": Faults(lost=1),
    "all of them": ALL,
}
WAYS = {
    "as there is room": Way(),
    "without journals": Way(journal=False),
    "64 parts": Way(parts=64),
    "512 parts": Way(parts=512),
}
# seconds that a GPU's context and kernels take, which a machine without one cannot measure
START_ELSEWHERE = 15.0
# rows of the shards that are written to be measured, two sizes
FEW, MANY = 64, 4096


def costs(folder: Path = RESULTS) -> rowfile.Row:
    """Returns the newest row of what a shard costs. Raises ValueError where nobody has measured."""
    rows = [row for found in rowfile.read_all(folder).values() for row in found if row["benchmark"] == "label shard"]
    if not rows:
        raise ValueError(f"{folder} has no row of what a shard costs; run python -m benchmarks scale --measure first.")
    return max(rows, key=lambda row: row["time"])


def shard_seconds(rows: int, rate: float, cost: rowfile.Row) -> float:
    """Returns how long a GPU is at a shard: its labels, and what it costs to journal and write them."""
    return rows * (CLIP_SECONDS / rate + cost["row_seconds"]) + cost["shard_seconds"]


@functools.cache
def tables(folder: Path = RESULTS, rate: float = RATE) -> str:
    """Returns the Markdown of the simulation."""
    cost = costs(folder)
    cluster = Cluster(CLUSTER.nodes, CLUSTER.gpus, start=cost["start_seconds"] + START_ELSEWHERE)
    sizes = []
    for size in SIZES:
        count, long = math.ceil(ROWS / size), shard_seconds(size, rate, cost)
        cells = [f"{size:,}", f"{count:,}", f"{long:.0f} s"]
        for way in WAYS.values():
            outcomes = losses(count, long, cluster, ALL, way, SEEDS)
            cells.append(f"{100 * mean(each.loss for each in outcomes):.1f} %")
        sizes.append(cells)
    causes = []
    size = 4096
    count, long = math.ceil(ROWS / size), shard_seconds(size, rate, cost)
    for name, faults in FAULTS.items():
        outcomes = losses(count, long, cluster, faults, Way(), SEEDS)
        worst = max(outcomes, key=lambda each: each.loss)
        causes.append((
            name,
            f"{60 * mean(each.seconds for each in outcomes) / 3600:.1f} min",
            f"{60 * mean(each.perfect for each in outcomes) / 3600:.1f} min",
            f"{100 * mean(each.loss for each in outcomes):.1f} %",
            f"{100 * worst.loss:.1f} %",
        ))  # fmt: skip
    aim = ", the aim of labelling on one" if rate == RATE else ""
    about = (
        f"{HOURS:,} hours in utterances of {CLIP_SECONDS:.0f} s on {CLUSTER.nodes} nodes of {CLUSTER.gpus} GPUs, each "
        f"at {rate:,.0f} times real time{aim}: simulated, not run, means of {len(SEEDS)} seeds. A process takes "
        f"{cluster.start:.0f} s to begin (measured on {cost['device']}: {cost['start_seconds']:.1f} s; "
        f"{START_ELSEWHERE:.0f} s for its GPU), a shard {1e3 * cost['shard_seconds']:.0f} ms and "
        f"{1e6 * cost['row_seconds']:.0f} µs a row beside its labels (measured). Each node is preempted every "
        f"{ALL.preempted / 3600:.0f} hours and away for {ALL.away[0] / 60:.0f} to {ALL.away[1] / 60:.0f} minutes, "
        f"{ALL.slow} GPUs run at half speed and the others differ by {100 * ALL.spread:.0f} %, one node is lost for "
        "good half-way. Time lost is beyond what the same faults cost were every GPU that is "
        "there always busy: where shards are claimed as there is room, the same if labels were not journalled, and "
        "where so many parts (`--shard I/N`) wait in a queue."
    )  # fmt: skip
    header = ("rows a shard", "shards", "one takes", *(f"lost, {name}" for name in WAYS))
    header_of_causes = ("faults, 4,096 rows a shard", "time", "were none idle", "time lost", "at worst")
    return "\n\n".join((about, rowfile.table(header, sizes), rowfile.table(header_of_causes, causes)))


def measured(rounds: int = 3, *, quick: bool = False) -> rowfile.Row:
    """Returns a row of what a process's start, a shard and a journalled row cost on this machine."""
    few, many = (8, 64) if quick else (FEW, MANY)
    with tempfile.TemporaryDirectory(prefix="spear-fast-scale-") as name:
        folder = Path(name)
        # the least of several: whatever else the machine does only adds to it
        started = min(_start_seconds(folder / f"start{number}", quick) for number in range(1 if quick else rounds))
        small, large = (min(_write_seconds(folder, count) for _ in range(rounds)) for count in (few, many))
        journalled = min(_journal_seconds(folder, many) for _ in range(rounds))
    row_seconds = max(0.0, large - small) / (many - few)
    row = {
        "benchmark": "label shard",
        "case": "label 512x6",
        "start_seconds": float(f"{started:.3g}"),
        "shard_seconds": float(f"{max(0.0, small - few * row_seconds):.3g}"),
        "row_seconds": float(f"{row_seconds + journalled / many:.3g}"),
        **environment(CPU),
    }
    return rowfile.finished(row)


def _start_seconds(folder: Path, quick: bool) -> float:
    """Returns the seconds from a process's start until it has its model and reads the rows of its first shard."""
    from spear_fast.labelling import LabelOptions, plan
    from spear_fast.labelling.devices import label_on_devices
    from spear_fast.model import TextToSemantic

    sizes: dict[str, Any] = dict(dim=32, source_depth=1, target_depth=1, heads=2, dim_head=16)
    if not quick:
        sizes = dict(dim=512, source_depth=6, target_depth=6, heads=8, dim_head=64)
    model = TextToSemantic(num_text_token_ids=512, num_semantic_token_ids=1000, **sizes).eval()
    folder.mkdir()
    model.save_pretrained(folder / "model")
    pq.write_table(pa.table({"id": ["a"], "tokens": [[1] * 10]}), folder / "t.parquet")
    options = LabelOptions(max_length=2, beam_size=1, batch_tokens=256)
    plan([folder / "t.parquet"], model, folder / "out", options, model_path=str(folder / "model"))
    times: dict[str, float] = {}

    class Report:
        def __call__(self, event: str, **_: Any) -> None:
            times.setdefault(event, time.perf_counter())

        def close(self) -> None:
            return None

    label_on_devices(folder / "out", str(folder / "model"), ["cpu"], report=Report())
    return times["prepared"] - times["process"]


def _rows(count: int) -> list[tuple[Any, Any]]:
    """Returns utterances of 20 s with labels."""
    from spear_fast.labelling.labeller import Label
    from spear_fast.labelling.prepare import Utterance

    chance = np.random.default_rng(0)
    tokens = chance.integers(0, 1000, (count, 1000))
    targets = chance.integers(0, 512, (count, 300))
    return [
        (
            Utterance(index, f"utterance-{index}", tokens[index], CLIP_SECONDS, "t.parquet", bytes(8)),
            Label(targets[index], "x" * 300, -1.0, -0.1, True, 301, ()),
        )
        for index in range(count)
    ]


def _write_seconds(folder: Path, count: int) -> float:
    """Returns the seconds of writing a shard of so many rows."""
    from spear_fast.labelling.label_files import label_schema
    from spear_fast.labelling.shards import Shard
    from spear_fast.labelling.store import LabelStore, Totals
    from spear_fast.labelling.stream import label_row

    shard = Shard(0, 1, 0, count)
    store = LabelStore(folder, {"format": "measured"}, [shard], label_schema(1000, 512))
    labelled = _rows(count)
    began = time.perf_counter()
    rows = [label_row(utterance, label) for utterance, label in labelled]
    store.commit(shard, rows, [], Totals(rows=count), bytes(8 * count))
    return time.perf_counter() - began


def _journal_seconds(folder: Path, count: int) -> float:
    """Returns the seconds of journalling so many labels, a quarter of 512 slots at a time."""
    from spear_fast.labelling.journal import Journal

    journal = Journal(folder / ".journal", "measured")
    journal.open()
    rows = _rows(count)
    began = time.perf_counter()
    for start in range(0, count, 128):
        journal.append(rows[start : start + 128])
    seconds = time.perf_counter() - began
    journal.remove()
    journal.close()
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=RATE, help=f"times real time of one GPU ({RATE:g})")
    parser.add_argument("--measure", action="store_true", help="measure what a shard costs here, and add a row")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows (benchmarks/results)")
    chosen = parser.parse_args(arguments)
    if chosen.measure:
        row = measured()
        rowfile.append(results_file(CPU, chosen.out), [row])
        print({name: row[name] for name in ("start_seconds", "shard_seconds", "row_seconds")})
    print(tables(chosen.out, chosen.rate))
    return 0
