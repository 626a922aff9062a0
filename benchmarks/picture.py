"""Draws README's picture: tokens a second by this package and by others, beam search of 1, 8 and 32 utterances.

The file carries a digest of what it shows, so that a test knows without drawing whether it is current.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows as rowfile
from benchmarks.machine import REPOSITORY

PATH = REPOSITORY / "docs" / "images" / "generation.svg"
CASES = {"b1-beam4": "1 utterance", "b8-beam4": "8 utterances", "b32-beam4": "32 utterances"}
# row's variant → how it is called, its colour
SERIES = {
    "reference": ("spear-tts-pytorch", "#b0b0b0"),
    "transformers": ("transformers", "#8c9bb0"),
    "ctranslate2 float32": ("CTranslate2", "#5f7fa8"),
    "spear_fast engine": ("spear_fast", "#d1495b"),
    "ctranslate2 int8_float32": ("CTranslate2 int8", "#a3bfdc"),
    "spear_fast engine int8": ("spear_fast int8", "#edae49"),
}


def shown(rows: Sequence[rowfile.Row]) -> dict[str, dict[str, float]]:
    """Returns case → variant → tokens a second, what the picture shows."""
    found: dict[str, dict[str, float]] = {case: {} for case in CASES}
    for row in rows:
        if row["benchmark"] == "generate" and row["case"] in CASES and row["variant"] in SERIES:
            found[row["case"]][row["variant"]] = round(row["tokens_per_second"], 1)
    return found


def digest(device: str, rows: Sequence[rowfile.Row]) -> str:
    """Returns what the file carries: a digest of device, figures and looks."""
    everything = [device, shown(rows), CASES, SERIES]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]


def draw(device: str, rows: Sequence[rowfile.Row], path: Path = PATH) -> None:
    """Writes the picture. Raises ValueError when matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib; install it with: pip install 'spear-fast[bench]'.") from error
    figures = shown(rows)
    figure = Figure(figsize=(8, 3.4), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    axis: Any = figure.subplots()
    x, ticks = 0.0, []
    for values in figures.values():
        first = x
        for variant, (_, colour) in SERIES.items():
            if variant in values:
                axis.bar(x, values[variant], width=0.92, color=colour)
                axis.text(x, values[variant], f"{values[variant]:.0f}", ha="center", va="bottom", fontsize=7)
                x += 1
        ticks.append((first + x - 1) / 2)
        x += 0.8
    axis.set_xticks(ticks, CASES.values())
    axis.set_ylabel("tokens a second")
    axis.set_title(f"Speech tokens to text, beam 4, float32 and int8, {device}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    for name, colour in SERIES.values():
        axis.bar(0, 0, color=colour, label=name)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    # the same rows give the same file, but for matplotlib's version
    with matplotlib.rc_context({"svg.hashsalt": "spear_fast"}):
        figure.savefig(path, metadata={"Date": None, "Description": digest(device, rows)})
