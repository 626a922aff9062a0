"""Loads a model from whatever holds one: a model folder, or a checkpoint file of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spear_fast.checkpoints.model_config import infer_config, read_config
from spear_fast.checkpoints.weights import read_package, read_state
from spear_fast.model import TextToSemantic


def load_model(path: str | Path, **overrides: Any) -> TextToSemantic:
    """Returns the model at `path`, in evaluation mode, on torch's default device and in its default type.

    path: a folder with `config.json` and `model.safetensors`, or a `.pt` or `.safetensors` file. Beside a file a
        `config.json` gives the constructor's arguments; without one they are read off the tensors' sizes, which
        leaves pads, end-of-sequence and guidance at their defaults. A state dict may lie under `model`, `state_dict`
        or by itself, and its names may have the prefixes of DistributedDataParallel, torch.compile, Lightning or an
        average of weights. The tensors of a `wav2vec` are left out unless one is passed.
    overrides: constructor arguments that replace those found.

    Device and type are the CPU and float32 where nothing else was set, whatever the file holds. Raises
    FileNotFoundError, or ValueError in one sentence when the files do not make a model; sizes are compared before
    anything of the configuration's size is allocated.
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
    source = beside if beside.is_file() else path
    return TextToSemantic.from_state({**config, **overrides}, state, config_path=source, weights_path=path)
