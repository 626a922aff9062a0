"""Planning a job of many rows: how long it takes, how much memory, and how soon a worker has the rows of its shard.

    python -m benchmarks plan --rows 10000000

A Parquet file of so many rows of tokens is written, and planned in a process of its own, whose most memory beyond what
it had before is said. Nothing is labelled.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import rows as rowfile
from benchmarks.machine import CPU, REPOSITORY, environment, results_file

ROWS_PER_SHARD = 4096
# rows that are written at once
WRITTEN = 1 << 17


def write_tokens(path: Path, rows: int) -> None:
    """Writes a file of so many rows: ids of 20 letters, 1 to 8 tokens each."""
    chance = np.random.default_rng(0)
    schema = pa.schema([("id", pa.string()), ("tokens", pa.list_(pa.int16()))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, WRITTEN):
            count = min(WRITTEN, rows - start)
            ends = np.concatenate(([0], np.cumsum(chance.integers(1, 9, count)))).astype(np.int32)
            tokens = pa.array(chance.integers(0, 1000, ends[-1]).astype(np.int16))
            ids = pa.array([f"utterance-{number:010d}" for number in range(start, start + count)])
            writer.write_table(pa.table([ids, pa.ListArray.from_arrays(pa.array(ends), tokens)], schema=schema))


def measured_here(tokens: Path, out: Path) -> dict[str, float]:
    """Plans `tokens` into `out` and returns seconds and bytes; wants a process that has used no memory yet."""
    from spear_fast.labelling import LabelOptions, plan
    from spear_fast.labelling.planning import read_plan
    from spear_fast.model import TextToSemantic

    sizes = dict(dim=32, source_depth=1, target_depth=1, heads=2, dim_head=16)
    model = TextToSemantic(num_text_token_ids=512, num_semantic_token_ids=1000, **sizes)
    options = LabelOptions(rows_per_shard=ROWS_PER_SHARD)
    # what is loaded at first use is not of the rows
    few = out / "few.parquet"
    out.mkdir()
    write_tokens(few, 10)
    plan([few], model, out / "few", options)
    before = _most_memory()
    began = time.perf_counter()
    plan([tokens], model, out / "all", options)
    planned = time.perf_counter()
    grown = _most_memory() - before
    rows = read_plan(out / "all")
    shard = rows.shards[len(rows.shards) // 2]
    count = sum(1 for _ in rows.rows.items(shard.start, shard.stop))
    read = time.perf_counter() - planned
    if count != len(shard):
        raise RuntimeError(f"a shard of {len(shard)} rows has given {count}.")
    return {"plan_seconds": planned - began, "grown_bytes": grown, "shard_seconds": read}


def _most_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measured(rows: int) -> rowfile.Row:
    """Returns a row of planning so many rows on this machine."""
    with tempfile.TemporaryDirectory(prefix="spear-fast-plan-") as folder:
        tokens = Path(folder) / "tokens.parquet"
        write_tokens(tokens, rows)
        command = [sys.executable, "-m", "benchmarks.plan", "--here", str(tokens), str(Path(folder) / "out")]
        said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if said.returncode:
            raise RuntimeError(f"planning has failed: {said.stderr.strip()}")
        found = json.loads(said.stdout.splitlines()[-1])
    row = {
        "benchmark": "plan",
        "case": f"plan {rows} rows",
        "rows": rows,
        **{name: float(f"{value:.3g}") for name, value in found.items()},
        **environment(CPU),
    }
    return rowfile.finished(row)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the file (1,000,000)")
    parser.add_argument("--out", type=Path, help="folder of results, to add a row to")
    parser.add_argument("--here", type=Path, nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.here:
        print(json.dumps(measured_here(*chosen.here)))
        return 0
    row = measured(chosen.rows)
    rowfile.append(None if chosen.out is None else results_file(CPU, chosen.out), [row])
    print(
        f"{chosen.rows:,} rows planned in {row['plan_seconds']:.3g} s, memory grew by "
        f"{row['grown_bytes'] / 1e6:.3g} MB; a shard of {ROWS_PER_SHARD:,} rows was found and read in "
        f"{row['shard_seconds']:.2g} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
