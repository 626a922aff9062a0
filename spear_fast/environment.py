"""What this installation is and can do: versions, devices, and which provider runs each operation."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import Any

PACKAGES = (
    "numpy",
    "safetensors",
    "tokenizers",
    "huggingface-hub",
    "pyarrow",
    "soundfile",
    "soxr",
    "kaldi-native-fbank",
    "accelerate",
    "triton",
    "cupy",
    "flash-attn",
    "xformers",
)


def describe() -> dict[str, Any]:
    """Returns versions, devices and the providers of each operation, as plain JSON values."""
    import torch

    from spear_fast import __version__

    return {
        "spear-fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "build": _build(),
        "ops": _ops(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        pass
    # CuPy's distributions are named after the CUDA that they are for
    others = packages_distributions().get(package.replace("-", "_"), [])
    return f"{version(others[0])} ({others[0]})" if others else None


def _build() -> dict[str, Any]:
    """Returns what the compiled parts are built from and with, and what could build them here; None: not there."""
    import torch

    from spear_fast.ops import extension

    built = extension.facts()
    compiler = " ".join(str(built[name]) for name in ("compiler", "march", "capability") if built.get(name))
    return {
        "extension": extension.missing() or f"built for torch {built['torch']} by {compiler}",
        "extension's variants": _variants(built),
        "extension's CUDA kernels": f"for {built['cuda_targets']}, CUDA {built['cuda']}" if built.get("cuda") else None,
        "torch's CUDA": torch.version.cuda,
        "nvcc": _nvcc(),
    }


def _variants(built: dict[str, Any]) -> str | None:
    """Returns which instruction sets the extension was built for, and which of them this machine loads."""
    if not built.get("variants"):
        return None
    named = f"{built['variant']} runs here" if "variant" in built else "none runs here"
    return f"{', '.join(built['variants'])}; {named} (SPEAR_FAST_CPU forces one)"


def _nvcc() -> str | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release [\d.]+, V([\d.]+)", said)
    return f"{release[1] if release else 'unknown'} ({path})"


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def _ops() -> list[dict[str, Any]]:
    """Returns a row per operation and provider: op, provider, devices, missing (why it cannot run, or None)."""
    # registers the decoding step beside the ops
    import spear_fast.decoding  # noqa: F401
    from spear_fast import ops

    return [row._asdict() for row in ops.available()]


def describe_text(facts: dict[str, Any]) -> str:
    """Returns the facts as tables for people."""
    lines = [
        f"spear-fast {facts['spear-fast']}, torch {facts['torch']}, Python {facts['python']}",
        facts["platform"],
        "",
    ]
    packages = [(name, found or "not installed") for name, found in facts["packages"].items()]
    lines += _table(("package", "version"), packages)
    lines.append("")
    devices = []
    for device in facts["devices"]:
        details = ", ".join(f"{key} {value}" for key, value in device.items() if key not in ("device", "name"))
        devices.append((device["device"], device["name"], details))
    lines += _table(("device", "name", "details"), devices)
    lines.append("")
    lines += _table(("build", "found"), [(name, found or "none") for name, found in facts["build"].items()])
    lines.append("")
    ops = [(row["op"], row["provider"], row["devices"], row["missing"] or "runs") for row in facts["ops"]]
    lines += _table(("operation", "provider", "devices", "state"), ops)
    return "\n".join(lines)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
