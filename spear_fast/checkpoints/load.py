"""Loads a model from whatever holds one: a model folder, or a checkpoint file of the reference."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from spear_fast.checkpoints.weights import load_into, read_package, read_state
from spear_fast.model import TextToSemantic


def load_model(path: str | Path, **overrides: Any) -> TextToSemantic:
    """Returns the model at `path`, in evaluation mode, on the CPU.

    path: a folder with `config.json` and `model.safetensors`, or a `.pt` or `.safetensors` file. Beside a file a
        `config.json` gives the constructor's arguments; without one they are read off the tensors' sizes, which
        leaves pads, end-of-sequence and guidance at their defaults.
    overrides: constructor arguments that replace those found.

    Raises FileNotFoundError, or ValueError in one sentence when the files do not make a model.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}; give a model folder or a checkpoint file.")
    if path.is_dir():
        read_config(path / "config.json")
        return TextToSemantic.from_pretrained(str(path), **overrides)  # type: ignore[return-value]
    state = read_state(path) if path.suffix == ".safetensors" else read_package(path)["model"]
    beside = path.parent / "config.json"
    config = read_config(beside) if beside.is_file() else infer_config(state, path)
    model = TextToSemantic.from_config({**config, **overrides}, beside if beside.is_file() else path)
    load_into(model, state, path)
    return model.eval()


def read_config(path: Path) -> dict[str, Any]:
    """Returns the constructor's arguments in a `config.json`. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}; a model folder needs config.json and model.safetensors."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict) or "dim" not in config:
        raise ValueError(f"{path} must hold the model's constructor arguments as an object, got no 'dim'.")
    return config


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    layers = [re.match(rf"{prefix}\.layers\.(\d+)\.", name) for name in state]
    return 1 + max((int(found.group(1)) for found in layers if found), default=-1)


def infer_config(state: dict[str, Tensor], origin: str | Path) -> dict[str, Any]:
    """Returns the constructor's arguments that fit the sizes in a reference state dict.

    Raises ValueError when it is no such state dict, or has an early exit, whose layer no tensor tells.
    """
    try:
        dim = state["start_token.text"].shape[0]
        decoder = "target_transformer.layers.0"
        # the null key is [2, heads, 1, head size] and cross-attention always has all heads
        _, heads, _, dim_head = state[f"{decoder}.1.null_kv"].shape
        kv_heads = state[f"{decoder}.0.to_kv.0.weight"].shape[0] // (2 * dim_head)
        inner = state[f"{decoder}.2.4.weight"].shape[1]
        vocabulary = {name: state[f"token_emb.{name}.weight"].shape[0] - 1 for name in ("text", "speech")}
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{origin} is not a TextToSemantic checkpoint: its tensors are others ({error}).") from error
    if any(name.startswith("to_early_exit_semantic_logits.") for name in state):
        raise ValueError(
            f"{origin} has an early exit, and no tensor tells its layer; put a config.json with "
            "target_early_exit_layer beside it."
        )
    return {
        "dim": dim,
        "source_depth": _depth(state, "source_transformer"),
        "target_depth": _depth(state, "target_transformer"),
        "heads": heads,
        "dim_head": dim_head,
        "target_kv_heads": None if kv_heads == heads else kv_heads,
        "ff_mult": mult_for(dim, inner),
        "num_text_token_ids": vocabulary["text"],
        "num_semantic_token_ids": vocabulary["speech"],
    }


def mult_for(dim: int, inner: int) -> float:
    """Returns a `ff_mult` that gives `inner` features: 4 where that does, as nearly always."""
    return 4 if int(dim * 4 * 2 / 3) == inner else (inner + 0.5) * 1.5 / dim
