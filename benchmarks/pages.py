"""Writes the tables of README.md and docs, and the picture, from the committed rows.

    python -m benchmarks pages [--check]

Tables stand between two markers. A device without rows has no table. Of each thing the newest row counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import convergence, latency, picture, predict, scale
from benchmarks import rows as rowfile
from benchmarks.cases import MODELS, STEP_TOKENS, STEPS, step_cases
from benchmarks.label import table as label_table
from benchmarks.machine import REPOSITORY, RESULTS

README = REPOSITORY / "README.md"
BENCHMARKS = REPOSITORY / "docs" / "benchmarks.md"
LABELLING = REPOSITORY / "docs" / "labelling.md"
# kernels that are shown of a step, and how much of their names
KERNELS, NAME = 6, 40
# the README's column → the peer that it is of, and that peer with 8-bit weights
SUMMARY = {
    "spear-tts-pytorch": ("reference", "reference"),
    "transformers": ("transformers", "transformers"),
    "CTranslate2": ("ctranslate2 float32", "ctranslate2 int8_float32"),
}
BEGIN, END = "<!-- measured: begin; make pages writes this part -->", "<!-- measured: end -->"


def tables(folder: Path = RESULTS, only: str | None = None) -> str:
    """Returns the Markdown of all devices that have rows, or of one."""
    parts = []
    for device, rows in rowfile.read_all(folder).items():
        if only not in (None, device):
            continue
        sections = [
            section
            for make in (_generation, _steps, _latency, _labelling, _memory, _ops, _training, _convergence)
            for section in make(rows)
        ]
        if sections:
            newest = max(rows, key=lambda row: row["time"])
            where = f"{newest['threads']} threads, {newest['capability']}" if "driver" not in newest else (
                f"{newest['capability']}, driver {newest['driver']}"
            )  # fmt: skip
            peers = {name: said for row in rows for name, said in row.get("versions", {}).items() if said}
            what = ", ".join([f"torch {newest['torch']}", where, *(f"{name} {said}" for name, said in peers.items())])
            about = f"Rows: `benchmarks/results`; {what}. Medians of samples taken in turn."
            parts.append("\n\n".join((f"### {device}", about, *sections)))
    return "\n\n".join(parts)


def _of(rows: Iterable[rowfile.Row], benchmark: str) -> list[rowfile.Row]:
    return [row for row in rows if row["benchmark"] == benchmark]


def _figure(row: rowfile.Row, say: Callable[[str, float], str]) -> str:
    """Returns what was aimed at, and whether it was reached."""
    if "wanted" not in row:
        return ""
    wanted = ", ".join(say(name, value) for name, value in row["wanted"].items())
    return f"{wanted}: {'reached' if row['reached'] else '**missed**'}"


def _generated(row: rowfile.Row) -> str:
    """Returns the shape of what was generated."""
    shape = row["shape"]
    ends, sources = f"{shape['tokens']}", f"{shape['source']}"
    if shape.get("ends"):
        ends, sources = "{} to {}".format(*shape["ends"]), f"{shape['shortest']} to {shape['source']}"
    return (
        f"{shape['dim']}×{shape['target_layers']}, B {shape['batch']}, S {sources}, beam {shape['beam']}, "
        f"{ends} tokens, {row['dtype']}"
    )


def _generation(rows: Sequence[rowfile.Row]) -> list[str]:
    found = _of(rows, "generate")
    if not found:
        return []
    peers = list(dict.fromkeys(peer for row in found for peer in row["times"]))
    lines = []
    for row in found:
        lines.append((
            _generated(row),
            row["variant"],
            rowfile.seconds(row["p50"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['percent_of_roofline']:.0f} % ({row['bound']})",
            *(f"{row['times'][peer]['p50']:.2f}" if peer in row["times"] else "" for peer in peers),
            _figure(row, lambda peer, times: f"{times:g} × {peer}"),
        ))  # fmt: skip
    header = ("generation", "by", "time", "tokens/s", "of the roofline", *(f"× {peer}" for peer in peers), "aim")
    return [rowfile.table(header, lines)]


def _steps(rows: Sequence[rowfile.Row]) -> list[str]:
    """The steps, each with the kernels that take most of it."""
    lines = []
    for row in _of(rows, "step"):
        shape, step = row["shape"], 1e6 * row["p50"]
        kernels = [f"`{each['name'][:NAME]}` {each['us']:.0f}" for each in row["kernels"][:KERNELS]]
        lines.append((
            f"{shape['dim']}×{shape['target_layers']}, B {shape['batch']}, S {shape['source']}, beam {shape['beam']}, "
            f"after {row['generated']} tokens, {row['dtype']}",
            f"{step:.0f}",
            f"{row['percent_of_roofline']:.0f} % ({row['bound']})",
            f"{row['times_greedy']:.2f}" if "times_greedy" in row else "",
            ", ".join(kernels) or "",
            f"{max(0.0, step - row['busy_us']):.0f}",
            _figure(row, lambda name, value: f"{value:g} %" if name == "percent" else f"{value:g} × greedy"),
        ))  # fmt: skip
    header = ("decoding step", "µs", "of the roofline", "× greedy, a row", "µs of kernels", "µs between", "aim")
    return [rowfile.table(header, lines)] if lines else []


def _labelling(rows: Sequence[rowfile.Row]) -> list[str]:
    found = _of(rows, "label")
    return [label_table(found)] if found else []


def _latency(rows: Sequence[rowfile.Row]) -> list[str]:
    found = _of(rows, "latency")
    return [rowfile.table(latency.HEADER, map(latency.line, found))] if found else []


def _convergence(rows: Sequence[rowfile.Row]) -> list[str]:
    found = _of(rows, "convergence")
    return [rowfile.table(convergence.HEADER, map(convergence.line, found))] if found else []


def _memory(rows: Sequence[rowfile.Row]) -> list[str]:
    lines = [
        (
            _generated(row),
            row["variant"],
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            f"{row['times_needed']:.2f}",
            _figure(row, lambda _, times: f"at most {times:g}"),
        )
        for row in _of(rows, "generate memory")
    ]
    return [rowfile.table(("generation", "by", "most memory", "× weights and caches", "aim"), lines)] if lines else []


def _ops(rows: Sequence[rowfile.Row]) -> list[str]:
    """The provider that is chosen by itself, from cold caches, beside the fastest baseline."""
    lines = []
    for row in _of(rows, "op"):
        if not row["automatic"] or row["cache"] != "cold":
            continue
        ratio = f"{row['times_baseline']['p50']:.2f} × {row['baseline']}" if "times_baseline" in row else ""
        lines.append((
            f"`{row['op']}` {row['case'].removeprefix(row['op']).strip()}",
            row["mode"],
            row["variant"],
            rowfile.seconds(row["p50"]),
            f"{row['percent_of_roofline']:.0f} % ({row['bound']})",
            ratio,
            _figure(row, _aim),
        ))  # fmt: skip
    header = ("op, shape", "", "by", "time", "of the roofline", "as fast as", "aim")
    return [rowfile.table(header, lines)] if lines else []


def _aim(name: str, value: float) -> str:
    return {"times": f"{value:g} ×", "percent": f"{value:g} %"}.get(name) or f"under {rowfile.seconds(value)}"


def _training(rows: Sequence[rowfile.Row]) -> list[str]:
    lines = [
        (
            f"{row['case']}, {row['dtype']}",
            row["variant"],
            rowfile.seconds(row["p50"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['mfu']:.0f} %",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f} GB",
            str(row.get("launches", "")),
            f"{row['times']['reference']['p50']:.2f}" if "times" in row else "",
            _training_aims(row),
        )
        for row in _of(rows, "train")
    ]
    header = (
        "training step", "by", "time", "tokens/s", "of the matmul limit", "memory", "launches", "× reference", "aim",
    )  # fmt: skip
    return [rowfile.table(header, lines)] if lines else []


def _training_aims(row: rowfile.Row) -> str:
    if "wanted" not in row:
        return ""
    found = {"times": row["times"]["reference"]["p50"], "memory": row["memory_of"]["reference"]}
    said = []
    for name, value in row["wanted"].items():
        reached = found[name] >= value if name == "times" else found[name] <= value
        aim = f"{value:g} ×" if name == "times" else f"{value:g} of its memory"
        said.append(
            f"{aim}: {'reached' if reached else '**missed**'}" + ("" if name == "times" else f", {found[name]:.2f}")
        )
    return "; ".join(said)


def best(folder: Path = RESULTS) -> tuple[str, list[rowfile.Row]]:
    """Returns the device with most rows of generation beside others, and its rows: what the README shows."""
    devices = rowfile.read_all(folder)
    if not devices:
        raise ValueError(f"{folder} holds no rows; measure with make bench first.")
    return max(devices.items(), key=lambda each: sum(len(row["times"]) for row in _of(each[1], "generate")))


def summary(folder: Path = RESULTS) -> str:
    """Returns the README's table: the engine's rows of one device, beside each peer's time."""
    device, rows = best(folder)
    chosen = [
        row
        for row in _of(rows, "generate")
        if row["variant"] in ("spear_fast engine", "spear_fast engine int8") and row["shape"]["beam"] == 4
    ]
    chosen.sort(key=lambda row: (row["variant"], row["shape"]["batch"]))
    lines = [
        (
            _plainly(row),
            rowfile.seconds(row["p50"]),
            f"{row['tokens_per_second']:.0f}",
            *(_times(row, peer, int8) for peer, int8 in SUMMARY.values()),
        )
        for row in chosen
    ]
    header = (f"speech tokens to text, {device}", "time", "tokens/s", *(f"× {name}" for name in SUMMARY))
    return rowfile.table(header, lines)


def training(folder: Path = RESULTS) -> str:
    """Returns the README's table of training: this package's rows of the same device, beside the reference."""
    device, rows = best(folder)
    lines = []
    for row in _of(rows, "train"):
        shape, ours = row["shape"], row["variant"].startswith("spear_fast")
        if not ours or "memory_of" not in row or not (shape["dense"] or shape["shortest"]):
            continue
        said = "of one length" if shape["dense"] else f"of {shape['shortest']} to {shape['source']} tokens"
        how = row["variant"].removeprefix("spear_fast").strip(", ")
        lines.append((
            f"{shape['batch']} rows {said}, {row['dtype']}" + (f", {how}" if how else ""),
            rowfile.seconds(row["p50"]),
            f"{row['times']['reference']['p50']:.2f}",
            f"{row['memory_of']['reference']:.2f}",
        ))  # fmt: skip
    return rowfile.table((f"training step, {device}", "time", "× reference", "of its memory"), lines)


def predictions(folder: Path = RESULTS) -> str:
    """Returns the README's table of steps on a GPU: what the model says, and what was measured where somebody has."""
    newest: dict[str, rowfile.Row] = {}
    for rows in rowfile.read_all(folder).values():
        for row in _of(rows, "step"):
            if "driver" in row and row["time"] > newest.get(row["case"], {"time": ""})["time"]:
                newest[row["case"]] = row
    cases = {case.name: case for case in step_cases()}
    lines = []
    for batch, beam in STEPS:
        cells = [f"{batch} × {beam}"]
        for model in MODELS:
            case = cases[f"step {model} {batch}x{beam}"]
            generated = sum(STEP_TOKENS) // 2
            foreseen = predict.seconds(predict.predicted(case, generated))
            share = case.step(generated).floor(predict.H100.gbs, predict.H100.gflops) / foreseen
            cells.append(f"{rowfile.seconds(foreseen)}, {100 * share:.0f} %")
            row = newest.get(case.name)
            said = "not yet" if row is None else f"{rowfile.seconds(row['p50'])}, {row['percent_of_roofline']:.0f} %"
            cells.append(said if row is None else f"{said} ({row['device']})")
        lines.append(cells)
    header = ["decoding step, bfloat16, utterances × hypotheses"]
    for model in MODELS:
        header += [f"{model.replace('x', '×')} predicted for an H100, of its roofline", "measured"]
    return rowfile.table(header, lines)


def _plainly(row: rowfile.Row) -> str:
    shape = row["shape"]
    tokens, source = f"{shape['tokens']}", f"{shape['source']}"
    if shape.get("ends"):
        tokens, source = "{} to {}".format(*shape["ends"]), f"{shape['shortest']} to {shape['source']}"
    number = f"{shape['batch']} utterance{'s' if shape['batch'] > 1 else ''}"
    precision = "int8" if row["variant"].endswith("int8") else row["dtype"]
    return f"{number} of {source} tokens, {tokens} out, {precision}"


def _times(row: rowfile.Row, peer: str, int8: str) -> str:
    """Returns how many times as fast as a peer a row is, by the peer's weights of the same precision."""
    name = int8 if row["variant"].endswith("int8") else peer
    return f"{row['times'][name]['p50']:.1f}" if name in row["times"] else ""


def written(text: str, part: str, name: str) -> str:
    """Returns a page with the part between its markers.

    Raises ValueError where the markers are missing.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{name} must hold {BEGIN} and {END} once each; put them around the tables.")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{rest.partition(END)[2]}"


def pages(folder: Path = RESULTS) -> dict[Path, str]:
    """Returns the pages with tables as they should be."""
    parts = {README: "\n\n".join((summary(folder), training(folder), predictions(folder))), BENCHMARKS: tables(folder)}
    parts[LABELLING] = scale.tables(folder)
    return {path: written(path.read_text(), part, path.name) for path, part in parts.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks pages", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="say whether they are up to date, write nothing")
    chosen = parser.parse_args(arguments)
    new, shown = pages(), best()
    drawn = picture.PATH.exists() and picture.digest(*shown) in picture.PATH.read_text()
    if chosen.check:
        return int(not drawn or any(path.read_text() != text for path, text in new.items()))
    for path, text in new.items():
        path.write_text(text)
    if not drawn:
        picture.draw(*shown)
    return 0
