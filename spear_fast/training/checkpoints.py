"""What a run leaves behind and goes on from: the results folder and the files in it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO


def checkpoints_in(folder: Path, prefix: str) -> list[Path]:
    """Returns the files `<prefix>.<number>.pt` of a folder, lowest number first."""
    pattern = re.compile(rf"{re.escape(prefix)}\.\d+\.pt")
    return sorted((path for path in folder.glob("*.pt") if pattern.fullmatch(path.name)), key=number_of)


def number_of(path: str | Path) -> int:
    """Returns the last number in a file's name, by which the reference knows the step; 0 without any."""
    found: list[str] = re.findall(r"\d+", Path(path).name)
    return int(found[-1]) if found else 0


def check_results_folder(folder: Path, clear: bool | None, resume: bool) -> None:
    """Raises ValueError when a run may not begin in `folder`. clear, resume: see `Trainer`."""
    if clear and resume:
        raise ValueError("force_clear_prev_results and resume exclude each other, got both.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"results_folder must be a folder, got the file {folder}; give another.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if clear is None and not resume:
        raise ValueError(
            f"{folder} is not empty; pass resume=True to go on from its newest checkpoint, "
            "force_clear_prev_results=True to delete it, or another results_folder."
        )
    place = folder.resolve()
    if clear and (place == Path.home() or place in (Path.cwd(), *Path.cwd().parents)):
        raise ValueError(f"results_folder {folder} holds more than results and is not deleted; give another.")


def clear_folder(folder: Path) -> None:
    """Deletes a folder with all it holds, if it is there."""
    if folder.is_dir():
        shutil.rmtree(folder)


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls `write` with a file that becomes `path` once all is on disk. Raises OSError, also when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        # torch.save tells of a full disk in its own way
        raise OSError(f"cannot write {path}: {error}; free or mend the disk and start again.") from error
