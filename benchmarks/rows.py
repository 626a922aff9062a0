"""The rows of results: JSON lines that are only ever added to; of those with the same identity the last one counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# what rows of earlier versions call a key or a bound
RENAMED_KEYS = {"percent_of_limit": "percent_of_roofline"}
RENAMED_BOUNDS = {"products": "matmuls"}

# what makes two rows measurements of the same thing; `key` adds the commit
IDENTITY = ("benchmark", "device", "threads", "case", "mode", "dtype", "cache", "variant")


def identity(row: Row) -> str:
    """Returns what was measured and where, not when."""
    return " | ".join(str(row[name]) for name in IDENTITY if row.get(name) is not None)


def finished(row: Row) -> Row:
    """Returns the row with its key first: unique in what was measured, where, and at which commit."""
    return {"key": f"{identity(row)} | {row['commit']}", **row}


def append(path: Path | None, rows: Iterable[Row]) -> None:
    """Adds rows to a file at once, so that they are there when the run is cut off."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """Returns a file's rows, one for each identity, the last; in the order in which identities first came."""
    found: dict[str, Row] = {}
    for line in path.read_text().splitlines():
        if line.strip():
            row = _renamed(json.loads(line))
            found[identity(row)] = row
    return list(found.values())


def _renamed(row: Row) -> Row:
    row = {RENAMED_KEYS.get(name, name): value for name, value in row.items()}
    if "bound" in row:
        row["bound"] = RENAMED_BOUNDS.get(row["bound"], row["bound"])
    return row


def read_all(folder: Path) -> dict[str, list[Row]]:
    """Returns device → rows of all files in a folder."""
    devices: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in read(path):
            devices.setdefault(row["device"], []).append(row)
    return devices


def table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table."""
    rows = ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *rows])


def seconds(value: float) -> str:
    """Returns a duration with its unit, three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"
