"""What makes two labelling jobs the same job."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from spear_fast.checkpoints.weights import fingerprint as weights_fingerprint
from spear_fast.labelling.options import LabelOptions
from spear_fast.labelling.sources import Rows

FORMAT = "spear_fast.labels/1"


def job_identity(model: Any, options: LabelOptions, listing: Rows) -> dict[str, Any]:
    """Returns everything that may change a label: weights, configuration, tokenizers, options, and the source's ids.

    Versions, thread counts, paths and times are left out: they are recorded with each run, and a job may be resumed
    after an upgrade or on another machine.
    """
    return {
        "format": FORMAT,
        "model": {"weights": weights_fingerprint(model), "config": plain(getattr(model, "config", {}))},
        "text_tokenizer": _text_tokenizer(model),
        "speech_tokenizer": _speech_tokenizer(model),
        "options": options.identity(),
        "sources": listing.identity(),
    }


def fingerprint(identity: dict[str, Any]) -> str:
    """Returns a hex SHA-256 of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a clause for each value that differs: "options.beam_size was 4 and is 8"."""
    old, new = _flat(before), _flat(now)
    clauses = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            clauses.append(f"{name} was {_short(old.get(name))} and is {_short(new.get(name))}")
    return clauses


def versions() -> dict[str, str]:
    """Returns the versions that a run was made with."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("spear-fast", "numpy", "pyarrow", "soundfile", "soxr", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def plain(value: Any) -> Any:
    """Returns `value` as JSON would give it back."""
    return json.loads(json.dumps(value, default=str))


def _text_tokenizer(model: Any) -> str | None:
    tokenizer = getattr(model, "tokenizer", None)
    return None if tokenizer is None else hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def _speech_tokenizer(model: Any) -> str | None:
    tokenizer = getattr(model, "wav2vec", None)
    if tokenizer is None:
        return None
    if hasattr(tokenizer, "fingerprint"):
        return tokenizer.fingerprint()
    return f"{type(tokenizer).__name__} {weights_fingerprint(tokenizer)}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list):
        value = {str(index): entry for index, entry in enumerate(value, 1)}
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        flat.update(_flat(entry, f"{prefix}.{name}" if prefix else name))
    return flat


def _short(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"
    return "absent" if value is None else json.dumps(value)
