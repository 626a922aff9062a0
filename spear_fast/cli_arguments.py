"""What several commands take from the command line: numbers that are checked, and devices."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# beyond it 32-bit numbers end
LARGEST = 2**31 - 1


def positive(text: str) -> int:
    """Returns a whole number of at least 1; argparse says what is wrong with anything else."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    if value > LARGEST:
        raise argparse.ArgumentTypeError(f"must be a whole number of at most {LARGEST}, got {text!r}")
    return value


def finite(text: str) -> float:
    """Returns a finite number; argparse says what is wrong with anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def device_of(name: str) -> torch.device:
    """Returns the device of that name, "auto" for a GPU where there is one. Raises ValueError where it is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} cannot be used here: it must be cpu or cuda.")
    return device


def devices_of(names: str) -> list[torch.device]:
    """Returns the devices of a list with commas; "all" are all GPUs, or the CPU where there are none.

    Of several GPUs none is touched: a process for each will. Raises ValueError where one is not there, or they are not
    all of one kind.
    """
    import torch

    count = torch.cuda.device_count()
    if names == "all":
        return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    if "," not in names:
        return [device_of(names)]
    gpus = {f"cuda:{index}": torch.device("cuda", index) for index in range(count)}
    devices = [gpus.get(name) or device_of(name) for name in names.split(",")]
    if len({device.type for device in devices}) > 1:
        raise ValueError(f"--device {names} must name devices of one kind: a GPU's labels are not those of a CPU.")
    return devices
