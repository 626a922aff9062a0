"""Weight files: read without running code, checked, and refused with one sentence when something is off."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def read_package(path: str | Path) -> dict[str, Any]:
    """Returns a reference checkpoint: a dict whose `model` entry is a state dict; a bare state dict is wrapped in one.

    Read with `weights_only=True`: a file that would run code is refused. Raises FileNotFoundError or ValueError.
    """
    path = existing_file(path)
    try:
        package = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a plain checkpoint: it holds objects other than tensors and numbers, or is damaged, and "
            "loading it could run code; save it again with torch.save of a state dict."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: it is truncated or of another format.") from error
    if not isinstance(package, dict):
        package = {"model": package}
    if "model" not in package and package and all(isinstance(value, Tensor) for value in package.values()):
        package = {"model": package}
    state = package.get("model")
    if isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()):
        return package
    raise ValueError(f"{path} must hold tensors by name under 'model', got entries {sorted(map(str, package))[:8]}.")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file. Raises FileNotFoundError or ValueError."""
    path = existing_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: {error}; copy it again from its source."
        ) from error


def existing_file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; check the path.")
    return path


def tied_names(model: nn.Module) -> dict[str, str]:
    """Returns each state-dict name that shares its tensor with an earlier name, with that earlier name."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        earlier = first.setdefault(id(tensor), name)
        if earlier != name:
            tied[name] = earlier
    return tied


def write_state(model: nn.Module, path: Path, *, without: str) -> None:
    """Writes the model's state dict as safetensors, each tied tensor once, without names that begin with `without`."""
    tied = tied_names(model)
    state = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied and not name.startswith(without)
    }
    save_file(state, path, metadata={"format": "pt"})


def load_into(model: nn.Module, state: dict[str, Tensor], origin: str | Path) -> None:
    """Loads `state` into `model`, strictly but for tied names that are left out.

    Raises ValueError naming the first tensor that is missing, surplus, of another size, or not finite.
    """
    tied = tied_names(model)
    state = dict(state)
    expected = model.state_dict()
    for name, earlier in tied.items():
        if name not in state and earlier in state:
            state[name] = state[earlier]
        elif name in state:
            state.setdefault(earlier, state[name])
    for name in expected:
        if name.startswith("wav2vec.") and name not in state:
            state[name] = expected[name]
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"{origin} lacks the tensor {name} {list(tensor.shape)}; it is of another model or depth.")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{origin} has {name} of size {list(state[name].shape)}, the model wants {list(tensor.shape)}; "
                "give the configuration that the checkpoint was made with."
            )
    for name, tensor in state.items():
        if name not in expected:
            raise ValueError(f"{origin} has a tensor {name} that the model does not; it is of another model or depth.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{origin} has NaN or infinite values in {name}; train or copy it again.")
    model.load_state_dict(state, strict=True)


def fingerprint(model: nn.Module) -> str:
    """Returns a hex SHA-256 over names, types, sizes and values of a model's state dict, the same on every machine."""
    digest = hashlib.sha256()
    tied = tied_names(model)
    for name, tensor in sorted(model.state_dict().items()):
        if name in tied:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
