"""The constructor's arguments of a model: read from `config.json`, or off the sizes of its tensors."""

from __future__ import annotations

import json
import math
import re
import reprlib
from pathlib import Path
from typing import Any

from torch import Tensor

_WHOLE = ("dim", "source_depth", "target_depth", "dim_head", "heads", "num_text_token_ids", "num_semantic_token_ids")
_LARGEST = 2**31 - 1
_FRACTIONS = ("attn_dropout", "ff_dropout", "cond_drop_prob")
_SWITCHES = (
    "autoset_semantic_eos_id", "autoset_text_eos_id", "detach_early_exit_embed", "align_reg_use_logsumexp_pool",
)  # fmt: skip


def read_config(path: Path) -> dict[str, Any]:
    """Returns the constructor's arguments in a `config.json`. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}; a model folder needs config.json and model.safetensors."
        )
    config = read_json(path)
    if not isinstance(config, dict) or "dim" not in config:
        raise ValueError(f"{path} must hold the model's constructor arguments as an object, got no 'dim'.")
    for name in ("wav2vec", "tokenizer_encode"):
        if config.get(name) is not None:
            raise ValueError(f"{path} has an entry {name}, which no text can hold; pass {name}= when you load it.")
    return config


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds. Raises ValueError, naming it, where that is no JSON or nested beyond measure."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read; write it again.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


def infer_config(state: dict[str, Tensor], origin: str | Path) -> dict[str, Any]:
    """Returns the constructor's arguments that fit the sizes in a state dict, where tied tensors may stand once.

    Raises ValueError when it is of no TextToSemantic, or has an early exit, whose layer no tensor tells.
    """
    try:
        dim = state["start_token.text"].shape[0]
        decoder = "target_transformer.layers.0"
        # the null key is [2, heads, 1, head size] and cross-attention always has all heads
        _, heads, _, dim_head = state[f"{decoder}.1.null_kv"].shape
        kv_heads = state[f"{decoder}.0.to_kv.0.weight"].shape[0] // (2 * dim_head)
        inner = state[f"{decoder}.2.4.weight"].shape[1]
        vocabulary = {modality: _embedding(state, modality).shape[0] - 1 for modality in ("text", "speech")}
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{origin} is not a TextToSemantic checkpoint: it lacks, or has in another form, {error}, and its tensors "
            f"are {sorted(state)[:3]}."
        ) from error
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


def _embedding(state: dict[str, Tensor], modality: str) -> Tensor:
    names = [f"token_emb.{modality}.weight", f"to_logits.{modality}.weight"]
    if modality == "speech":
        names.append("semantic_token_emb.weight")
    return state[next((name for name in names if name in state), names[0])]


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    layers = [re.match(rf"{prefix}\.layers\.(\d+)\.", name) for name in state]
    # not the highest number: a name may have any
    return len({found.group(1) for found in layers if found})


def check_depths(config: dict[str, Any], state: dict[str, Tensor], origin: str | Path) -> None:
    """Raises ValueError when a configuration wants layers that a state dict lacks: made, they could fill memory."""
    for name, prefix in (("source_depth", "source_transformer"), ("target_depth", "target_transformer")):
        wanted, found = config.get(name), _depth(state, prefix)
        if isinstance(wanted, int) and wanted > found:
            raise ValueError(
                f"{origin} has {found} layers in its {prefix}, the configuration wants {name} {wanted}; give the "
                "configuration that the checkpoint was made with."
            )


def mult_for(dim: int, inner: int) -> float:
    """Returns a `ff_mult` that gives `inner` features: 4 where that does, as nearly always."""
    return 4 if int(dim * 4 * 2 / 3) == inner else (inner + 0.5) * 1.5 / dim


def check_arguments(config: dict[str, Any]) -> None:
    """Raises ValueError, one sentence, for the first of the constructor's arguments that is of no use."""
    for name in _WHOLE:
        if not _is_whole(config[name]) or not 1 <= config[name] <= _LARGEST:
            raise ValueError(f"{name} must be a whole number from 1 to {_LARGEST}, got {_shown(config[name])}.")
    if config["dim_head"] % 2:
        raise ValueError(f"dim_head must be even, since rotary positions rotate pairs, got {config['dim_head']}.")
    for name in ("semantic_pad_id", "text_pad_id"):
        if not _is_whole(config[name]) or abs(config[name]) > _LARGEST:
            raise ValueError(
                f"{name} must be a whole number that 32 bits hold, got {_shown(config[name])}; -1 is no token's id."
            )
    for name in _FRACTIONS:
        if not _is_number(config[name]) or not 0 <= config[name] < 1:
            raise ValueError(f"{name} must be in [0, 1), got {_shown(config[name])}.")
    for name in ("ff_mult", "align_reg_logsumexp_pool_temp"):
        if not _is_number(config[name]) or not 0 < config[name] <= _LARGEST:
            raise ValueError(f"{name} must be a number above 0 and to {_LARGEST}, got {_shown(config[name])}.")
    if not _is_number(config["align_reg_loss_weight"]):
        raise ValueError(f"align_reg_loss_weight must be a number, got {_shown(config['align_reg_loss_weight'])}.")
    for name in _SWITCHES:
        if config[name] not in (True, False):
            raise ValueError(f"{name} must be True or False, got {_shown(config[name])}.")
    layer, depth = config["target_early_exit_layer"], config["target_depth"]
    if layer is not None and not (_is_whole(layer) and 0 < layer <= depth):
        raise ValueError(f"target_early_exit_layer must be from 1 to target_depth {depth}, got {_shown(layer)}.")


def _shown(value: object) -> str:
    # no more of it than a sentence has room for
    return reprlib.repr(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
