"""What a run writes and resumes from: the results folder and the files in it."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

# ends the names of files that are not all there yet
_UNFINISHED = ".tmp"


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
            f"{folder} is not empty; pass resume=True to continue from its newest checkpoint, "
            "force_clear_prev_results=True to delete it, or another results_folder."
        )
    resolved = folder.resolve()
    if clear and (resolved == Path.home() or resolved in (Path.cwd(), *Path.cwd().parents)):
        raise ValueError(f"results_folder {folder} holds more than results and is not deleted; give another.")


def clear_folder(folder: Path) -> None:
    """Deletes a folder with all it holds, if it is there."""
    if folder.is_dir():
        shutil.rmtree(folder)


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls `write` with a file that becomes `path` once all is on disk. Raises OSError, also when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")
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


def remove_unfinished(folder: Path, pattern: str, *, seconds: float = 0.0) -> None:
    """Removes the unfinished files of `write_whole` in a folder whose processes have been killed.

    pattern: of the files' names, as `Path.glob` takes it. seconds: files that have changed within
    as many stay, for folders in which other machines write too; files of processes that live on this one stay anyway.
    """
    for path in folder.glob(f".{pattern}.*{_UNFINISHED}"):
        process = path.name.removesuffix(_UNFINISHED).rpartition(".")[2]
        if not process.isdecimal() or _is_alive(int(process)):
            continue
        # another process that begins may be quicker
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= seconds:
                path.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
