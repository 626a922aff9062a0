"""Weight files: read without running code, checked, and refused with one sentence when something is off."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from spear_fast.checkpoints.names import find_state, plain_names

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# numbers of numpy beside the weights: plain values, which run no code when they are loaded
_NUMBERS = np.typecodes["AllInteger"] + "efd?"
_NUMPY: list[Any] = [np.dtype, *sorted({type(np.dtype(letter)) for letter in _NUMBERS}, key=str)]
# numpy 1 and 2 write the function that makes them under different names
_NUMPY += [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def read_package(path: str | Path) -> dict[str, Any]:
    """Returns a reference checkpoint: a dict whose `model` entry is a state dict under the model's own names.

    Other layouts are brought into that form; see `find_state` and `plain_names`. Read with `weights_only=True`: a file
    that would run code is refused. Raises FileNotFoundError or ValueError.
    """
    path = existing_file(path)
    try:
        with torch.serialization.safe_globals(_NUMPY):
            package = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a plain checkpoint: it holds objects other than tensors and numbers, or is damaged, and "
            "loading it could run code; save it again with torch.save of a state dict."
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its damage leads to
        raise ValueError(f"{path} is not a readable checkpoint: it is truncated or of another format.") from error
    state = plain_names(find_state(package, path), path)
    beside = package.items() if isinstance(package, dict) else ()
    return {**{name: value for name, value in beside if not isinstance(value, Tensor)}, "model": state}


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, by the model's own names. Raises FileNotFoundError or ValueError."""
    path = existing_file(path)
    try:
        state = load_file(path) if _is_utf8(path) else load(path.read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: {error}; copy it again from its source."
        ) from error
    return plain_names(state, path)


def existing_file(path: str | Path) -> Path:
    """Returns the path of a file that is there; raises FileNotFoundError otherwise."""
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
    """Writes the model's state dict as safetensors, each tied tensor once, without names that begin with `without`.

    Readable by whom the umask lets read it.
    """
    tied = tied_names(model)
    state = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied and not name.startswith(without)
    }
    metadata = {"format": "pt"}
    if not _is_utf8(path):
        path.write_bytes(save(state, metadata))
        return
    # safetensors writes for the owner alone; a file that python makes has the mode that the umask gives
    with open(path, "ab") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    save_file(state, path, metadata=metadata)
    path.chmod(mode)


def _is_utf8(path: Path) -> bool:
    """Returns whether safetensors takes a path: file systems have names in any bytes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def load_into(model: nn.Module, state: dict[str, Tensor], origin: str | Path) -> None:
    """Loads `state` into `model`, in the model's type; strictly, but for what `fitted` allows.

    Raises ValueError naming the first tensor that is missing, surplus, of another size or type, or not finite.
    """
    expected = model.state_dict()
    state = fitted(model, state, origin)
    for name, tensor in state.items():
        # a larger type may hold what the model's does not
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.to(expected[name].dtype)).all()):
            raise ValueError(f"{origin} has NaN or infinite values in {name}; train or copy it again.")
    for name, earlier in tied_names(model).items():
        if not torch.equal(state[name], state[earlier]):
            raise ValueError(f"{origin} has {name} unlike {earlier}, which are one in the model; train it again.")
    model.load_state_dict(state, strict=True)


def fitted(model: nn.Module, state: dict[str, Tensor], origin: str | Path) -> dict[str, Tensor]:
    """Returns `state` with every name of `model`, which may be on the meta device, and no other.

    One of the tensors that the model ties is enough. Where the state has no `wav2vec` the model's own stays; where the
    model has none the state's is left out, since token ids need none.

    Raises ValueError naming the first tensor that is missing, surplus, or of another size or type.
    """
    expected = model.state_dict()
    tied = tied_names(model)
    groups: dict[str, list[str]] = {}
    for name in expected:
        groups.setdefault(tied.get(name, name), []).append(name)
    found = dict(state)
    for names in groups.values():
        present = [name for name in names if name in state]
        found.update({name: state[present[0]] for name in names if present and name not in state})
    has_wav2vec = any(name.startswith("wav2vec.") for name in state)
    if not has_wav2vec:
        found.update({name: tensor for name, tensor in expected.items() if name.startswith("wav2vec.")})
    elif getattr(model, "wav2vec", None) is None:
        found = {name: tensor for name, tensor in found.items() if not name.startswith("wav2vec.")}
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{origin} lacks the tensor {name} {list(tensor.shape)}; it is of another model or depth.")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{origin} has {name} of size {list(found[name].shape)}, the model wants {list(tensor.shape)}; "
                "give the configuration that the checkpoint was made with."
            )
        if tensor.is_floating_point() and found[name].dtype not in _FLOATS:
            raise ValueError(
                f"{origin} has {name} in {found[name].dtype}, wanted float16, bfloat16, float32 or float64; convert it."
            )
    for name in found:
        if name not in expected:
            raise ValueError(f"{origin} has a tensor {name} that the model does not; it is of another model or depth.")
    return found


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
