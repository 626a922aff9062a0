"""Whose tensors a checkpoint holds, and under which names: wrappers around a model put words before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# every TextToSemantic has this tensor, and no other module a name like it
_ANCHOR = "start_token.text"
# what torch.compile, FSDP and activation checkpointing put into names, wherever they wrap
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# the entries under which trainers other than the reference's keep a model
_ENTRIES = ("state_dict", "model_state_dict")


def find_state(package: Any, origin: str | Path) -> dict[str, Tensor]:
    """Returns the state dict in what `torch.load` gave: the entry `model`, the whole, or the one entry that has one.

    Raises ValueError when there is none, or several of which none is known to be the model's.
    """
    entries = package if isinstance(package, dict) else {"model": package}
    if _is_state(entries.get("model")):
        return _dense(entries["model"], origin)
    if entries and "model" not in entries and _is_state(entries):
        return _dense(entries, origin)
    found = {name: state for name, state in _states(entries, "") if state}
    known = [name for name in _ENTRIES if name in found]
    if len(found) > 1 and not known:
        raise ValueError(
            f"{origin} holds several models, under {sorted(found)}; save the one that is meant under 'model'."
        )
    if not found:
        raise ValueError(
            f"{origin} must hold tensors by name under 'model', got entries {sorted(map(str, entries))[:8]}."
        )
    return _dense(found[known[0]] if known else next(iter(found.values())), origin)


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, Tensor) for entry in value.values())


def _states(entries: dict[Any, Any], path: str) -> list[tuple[str, dict[str, Tensor]]]:
    """Returns the state dicts of a TextToSemantic in a package and the dicts in it, by their path in it."""
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor) and isinstance(name, str)}
    if any(_prefix(name) is not None for name in tensors):
        return [(path, tensors)]
    # a package in a package is as deep as trainers go
    if path.count(".") > 1:
        return []
    inner = [(str(name), value) for name, value in entries.items() if isinstance(value, dict)]
    return [found for name, value in inner for found in _states(value, f"{path}.{name}".lstrip("."))]


def _dense(state: dict[str, Tensor], origin: str | Path) -> dict[str, Tensor]:
    for name, tensor in state.items():
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        # a tensor of stride 0 may claim any size
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{origin} has {name} without a value for each index; save it again as a dense tensor.")
    return state


def plain_names(state: dict[str, Tensor], origin: str | Path) -> dict[str, Tensor]:
    """Returns `state` under the model's own names.

    DistributedDataParallel, torch.compile, FSDP, Lightning modules, averages of weights and the training wrappers hold
    the model under a prefix; what lies outside it is theirs and left out. Of an average and the weights that it is of
    the average counts, as when such a wrapper is evaluated.

    Raises ValueError where several models differ and none is the average.
    """
    state = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): value for name, value in state.items()
    }
    prefixes = [prefix for prefix in map(_prefix, state) if prefix is not None]
    if not prefixes or "" in prefixes:
        return state
    models = [{name[len(prefix) :]: state[name] for name in state if name.startswith(prefix)} for prefix in prefixes]
    averages = [model for prefix, model in zip(prefixes, models, strict=True) if "ema" in prefix.lower()]
    if len(averages) == 1:
        return averages[0]
    # a trainer that is saved whole holds its model twice
    if all(_equal(model, models[0]) for model in models[1:]):
        return models[0]
    raise ValueError(
        f"{origin} holds several models, under the prefixes {sorted(prefixes)}; save the state dict of the one that is "
        "meant."
    )


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefix(name: str) -> str | None:
    return name[: -len(_ANCHOR)] if name == _ANCHOR or name.endswith(f".{_ANCHOR}") else None


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
