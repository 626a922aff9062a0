"""What is said of an op's times: rows with the share of the roofline and of the baseline, and a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import rows as rowfile
from benchmarks.machine import environment, limits
from benchmarks.operations import OpCase
from benchmarks.timing import quantile, quantiles

CACHES = ("warm", "cold")


@dataclass
class Candidate:
    """What may be timed of a case: a provider of the op, or a baseline."""

    name: str
    provider: bool
    error: dict[str, float | None] = field(default_factory=dict)
    refused: str | None = None


@dataclass(frozen=True)
class Settings:
    """device, dtype: what to measure on and in. caches: of CACHES. seconds: for each case and cache.

    providers: names to which the op's providers are limited. baselines: whether they are measured too.
    quick: few samples, and limits of the machine by small matmuls: for tests of the machinery.
    """

    device: torch.device
    dtype: torch.dtype
    caches: Sequence[str] = CACHES
    seconds: float = 2.0
    providers: Sequence[str] = ()
    baselines: bool = True
    quick: bool = False


def rows_of(
    case: OpCase,
    settings: Settings,
    cache: str,
    candidates: Sequence[Candidate],
    automatic: str,
    found: dict[str, list[float]],
    clocks: dict[str, str],
) -> list[rowfile.Row]:
    device, dtype = settings.device, settings.dtype
    size = torch.finfo(dtype).bits // 8
    machine = limits(device, dtype, quick=settings.quick)
    read, flops = case.bytes(size), case.flops
    floors = {"matmuls": flops / machine["gflops"] / 1e9, "bandwidth": read / machine["gbs"] / 1e9}
    bound = max(floors, key=lambda name: floors[name])
    rivals = [name for name in case.against if name in found]
    rival = min(rivals, key=lambda name: quantile(found[name], 0.5)) if rivals else None
    rows = []
    for candidate in candidates:
        spread = quantiles(found[candidate.name])
        row = {
            "benchmark": "op",
            "op": case.op,
            "case": case.title,
            "mode": case.mode,
            "dtype": str(dtype).removeprefix("torch."),
            "cache": cache,
            "variant": candidate.name,
            "kind": "provider" if candidate.provider else "baseline",
            "automatic": candidate.provider and candidate.name == automatic,
            "clock": clocks[candidate.name],
            "samples": len(found[candidate.name]),
            **{name: float(f"{value:.4g}") for name, value in spread.items()},
            "bytes": read,
            "flops": flops,
            "gbs": round(read / spread["p50"] / 1e9, 3),
            "tflops": round(flops / spread["p50"] / 1e12, 5),
            "bound": bound,
            "percent_of_roofline": round(100 * floors[bound] / spread["p50"], 1),
            "limit": {key: round(value, 1) for key, value in machine.items()},
            **candidate.error,
            "baseline": rival,
            "shape": dict(case.shape),
            **environment(device),
        }
        if rival is not None:
            # by rounds: both sides of a ratio were measured within one of them
            ratios = [a / b for a, b in zip(found[rival], found[candidate.name], strict=True)]
            row["times_baseline"] = {key: round(value, 3) for key, value in quantiles(ratios).items()}
        wanted = case.wanted.get(device.type)
        if wanted and row["automatic"] and not (wanted.get("times") and rival is None):
            row |= {"wanted": dict(wanted), "reached": _reached(row, wanted)}
        rows.append(rowfile.finished(row))
    return rows


def _reached(row: rowfile.Row, wanted: dict[str, float] | Any) -> bool:
    """Returns whether a row is as good as was aimed at."""
    if "times" in wanted:
        return row["times_baseline"]["p50"] >= wanted["times"]
    if "percent" in wanted:
        return row["percent_of_roofline"] >= wanted["percent"]
    return row["p50"] <= wanted["seconds"]


def table(rows: Sequence[rowfile.Row]) -> str:
    """Returns the rows as a Markdown table, slower ones too."""
    header = (
        "case",
        "by",
        "dtype, cache",
        "p20 / p50 / p80",
        "GB/s",
        "TFLOP/s",
        "of the roofline",
        "error",
        "× baseline",
    )
    return rowfile.table(header, (_line(row) for row in rows))


def _line(row: rowfile.Row) -> tuple[str, ...]:
    ratio, wanted = row.get("times_baseline"), row.get("wanted")
    said = "" if ratio is None else f"{ratio['p50']:.2f}" + (" (it)" if row["variant"] == row["baseline"] else "")
    if wanted:
        said += f" {'reached' if row['reached'] else 'MISSED'}: " + ", ".join(f"{k} {v:g}" for k, v in wanted.items())
    return (
        row["case"] + (f", {row['mode']}" if row["mode"] != "forward" else ""),
        row["variant"] + (" *" if row["automatic"] else ""),
        f"{row['dtype']}, {row['cache']}",
        " / ".join(rowfile.seconds(row[name]) for name in ("p20", "p50", "p80")),
        f"{row['gbs']:.1f}",
        f"{row['tflops']:.3g}",
        f"{row['percent_of_roofline']:.0f} % ({row['bound']})",
        "" if row.get("max_error") is None else f"{row['max_error']:.1e}",
        said,
    )
