"""Draws rows: a roofline for each op with its candidates on it, bars of their share of it, and generation.

python -m benchmarks plots benchmarks/results --out build/plots
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows as rowfile
from benchmarks.machine import RESULTS, slug

COLUMNS = 3
# a legend entry a candidate; colours of the map go round after as many
COLOURS = 10
# kernels that are told apart in a step
KERNELS = 6


def draw(rows: Iterable[rowfile.Row], folder: Path) -> list[Path]:
    """Writes PNG files of the rows, a few for each device, and returns their paths.

    Raises ValueError when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib; install it with: pip install 'spear-fast[bench]'.") from error
    folder.mkdir(parents=True, exist_ok=True)
    by_device: dict[str, list[rowfile.Row]] = {}
    for row in rows:
        by_device.setdefault(row["device"], []).append(row)
    written = []
    for device, found in by_device.items():
        sheets = {
            "roofline": (_ops(found), _roofline),
            "ops": (_ops(found), _shares),
            "generate": (_generation(found), _rates),
            "step": (_panel(found, "step", "a decoding step"), _stacked),
            "label": (_panel(found, "label", "labelling"), _real_time),
        }
        for name, (panels, paint) in sheets.items():
            if not panels:
                continue
            columns = min(COLUMNS, len(panels))
            lines = -(-len(panels) // columns)
            tallest = max(len(panel) for panel in panels.values()) if name != "roofline" else 0
            figure = Figure(figsize=(7 * columns, lines * max(4.5, 0.16 * tallest + 1.5)), layout="constrained")
            FigureCanvasAgg(figure)
            figure.suptitle(device)
            axes = figure.subplots(lines, columns, squeeze=False).flatten()
            for axis in axes[len(panels) :]:
                axis.set_axis_off()
            for axis, (title, panel) in zip(axes, panels.items(), strict=False):
                axis.set_title(title)
                paint(axis, panel)
            path = folder / f"{slug(device)}-{name}.png"
            figure.savefig(path, dpi=80)
            written.append(path)
    return written


def _ops(rows: Sequence[rowfile.Row]) -> dict[str, list[rowfile.Row]]:
    """Returns op → rows from cold caches, where there are such, else all of them."""
    panels: dict[str, list[rowfile.Row]] = {}
    cold = any(row.get("cache") == "cold" for row in rows)
    for row in rows:
        if row["benchmark"] == "op" and (row["cache"] == "cold" or not cold):
            panels.setdefault(row["op"], []).append(row)
    return panels


def _generation(rows: Sequence[rowfile.Row]) -> dict[str, list[rowfile.Row]]:
    found = [row for row in rows if row["benchmark"] == "generate" and "tokens_per_second" in row]
    return {"generation": found} if found else {}


def _panel(rows: Sequence[rowfile.Row], benchmark: str, title: str) -> dict[str, list[rowfile.Row]]:
    found = [row for row in rows if row["benchmark"] == benchmark]
    return {title: found} if found else {}


def _variants(rows: Sequence[rowfile.Row]) -> dict[str, int]:
    """Returns each candidate's colour, providers first."""
    ordered = sorted(rows, key=lambda row: row.get("kind") != "provider")
    return {name: i % COLOURS for i, name in enumerate(dict.fromkeys(row["variant"] for row in ordered))}


def _roofline(axis: Any, rows: Sequence[rowfile.Row]) -> None:
    """Operations a second over operations a byte, under the lines that the machine set."""
    limits = [row["limit"] for row in rows]
    gflops, gbs = (max(limit[name] for limit in limits) for name in ("gflops", "gbs"))
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(*intensity, gflops / gbs) / 3, max(*intensity, gflops / gbs) * 3
    axis.plot([low, gflops / gbs, high], [low * gbs, gflops, gflops], color="black", linewidth=1)
    for name, colour in _variants(rows).items():
        points = [row for row in rows if row["variant"] == name]
        axis.scatter(
            [row["flops"] / row["bytes"] for row in points],
            [row["flops"] / row["p50"] / 1e9 for row in points],
            color=f"C{colour}",
            marker="o" if points[0]["kind"] == "provider" else "x",
            label=name,
        )
    axis.set(xscale="log", yscale="log", xlabel="flops a byte, each byte moved once", ylabel="GFLOP/s")
    axis.legend(fontsize="x-small")


def _bars(axis: Any, rows: Sequence[rowfile.Row], value: str, label: str) -> None:
    colours = _variants(rows)
    cases = list(dict.fromkeys((row["case"], row.get("mode", "")) for row in rows))
    y, ticks, names = 0.0, [], []
    shown: set[str] = set()
    for case in cases:
        first = y
        for row in rows:
            if (row["case"], row.get("mode", "")) == case:
                name = row["variant"]
                axis.barh(y, row[value], height=0.9, color=f"C{colours[name]}", label=None if name in shown else name)
                shown.add(name)
                y += 1
        ticks.append((first + y - 1) / 2)
        names.append(case[0].removeprefix(f"{rows[0].get('op', '')} ") + (" +backward" if "+" in case[1] else ""))
        y += 0.8
    axis.set_yticks(ticks, names, fontsize="x-small")
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.legend(fontsize="x-small")


def _shares(axis: Any, rows: Sequence[rowfile.Row]) -> None:
    _bars(axis, rows, "percent_of_roofline", "percent of the roofline")


def _rates(axis: Any, rows: Sequence[rowfile.Row]) -> None:
    _bars(axis, rows, "tokens_per_second", "tokens a second")


def _stacked(axis: Any, rows: Sequence[rowfile.Row]) -> None:
    """What each kernel takes of a step, the slowest first, in percent of the step; a line where the roofline is."""
    names = list(dict.fromkeys(each["name"] for row in rows for each in row["kernels"][:KERNELS]))
    for y, row in enumerate(rows):
        step, done = 1e6 * row["p50"], 0.0
        for each in row["kernels"][:KERNELS]:
            share = 100 * each["us"] / step
            axis.barh(y, share, left=done, height=0.8, color=f"C{names.index(each['name']) % COLOURS}")
            done += share
        rest = max(0.0, 100 * row["busy_us"] / step - done)
        axis.barh(y, rest, left=done, height=0.8, color="lightgray")
        axis.plot([row["percent_of_roofline"]] * 2, [y - 0.4, y + 0.4], color="black")
    for i, name in enumerate(names[:COLOURS]):
        axis.barh(0, 0, color=f"C{i}", label=name[:40])
    labels = [f"{row['case'].removeprefix('step ')}, {rowfile.seconds(row['p50'])}" for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize="x-small")
    axis.invert_yaxis()
    axis.set_xlabel("percent of the step; black: the roofline")
    axis.legend(fontsize="xx-small")


def _real_time(axis: Any, rows: Sequence[rowfile.Row]) -> None:
    axis.barh(range(len(rows)), [row["times_real_time"] for row in rows], color="C0")
    labels = [f"{row['case'].removeprefix('label ')}, {row['variant']}, batch {row['batch']}" for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize="x-small")
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="times real time")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plots", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="of *.jsonl files")
    parser.add_argument("--out", type=Path, default=Path("build/plots"))
    chosen = parser.parse_args(arguments)
    found = [row for rows in rowfile.read_all(chosen.folder).values() for row in rows]
    print("\n".join(map(str, draw(found, chosen.out))))
    return 0
