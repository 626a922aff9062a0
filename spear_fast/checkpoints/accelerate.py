"""`accelerate`: a live model of spear-tts-pytorch made fast in place, with the weights it has."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from spear_fast.checkpoints.model_config import mult_for
from spear_fast.model import TextToSemantic


def accelerate(reference_model: nn.Module) -> TextToSemantic:
    """Returns a fast model over the same parameters as a live `spear_tts_pytorch.TextToSemantic`.

    A change of a weight on either side, by training or `load_state_dict`, is a change on both. The result is an
    instance of both classes, so that code that checks for the reference's takes it. It is on the same device, in the
    same types and mode; `wav2vec` and `tokenizer_encode` are shared. The reference's own object stays usable.

    Raises ValueError when the model is not a TextToSemantic of the reference.
    """
    if isinstance(reference_model, TextToSemantic):
        return reference_model
    try:
        config = _config_of(reference_model)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"accelerate takes a TextToSemantic of spear-tts-pytorch, got {type(reference_model).__name__} ({error})."
        ) from error
    with torch.device("meta"):
        fast = TextToSemantic(**config)
    _share_parameters(fast, reference_model)
    fast.wav2vec = reference_model.wav2vec  # type: ignore[assignment]
    # the reference's order of parameters: optimizers keep their state by number
    fast._modules = {name: fast._modules[name] for name in reference_model._modules if name in fast._modules}
    fast.tokenizer_encode = reference_model.tokenizer_encode  # type: ignore[assignment]
    both: TextToSemantic = object.__new__(_combined_class(type(reference_model)))  # type: ignore[arg-type]
    both.__dict__ = fast.__dict__
    return both.train(reference_model.training)


def _config_of(model: Any) -> dict[str, Any]:
    self_attention, cross_attention, feed_forward = model.target_transformer.layers[0]
    config: dict[str, Any] = {
        name: getattr(model, name)
        for name in (
            "dim",
            "num_text_token_ids",
            "num_semantic_token_ids",
            "semantic_pad_id",
            "text_pad_id",
            "cond_drop_prob",
            "align_reg_loss_weight",
            "align_reg_use_logsumexp_pool",
            "align_reg_logsumexp_pool_temp",
        )
    }
    return config | {
        "source_depth": len(model.source_transformer.layers),
        "target_depth": len(model.target_transformer.layers),
        "heads": cross_attention.heads,
        "dim_head": cross_attention.null_kv.shape[-1],
        "target_kv_heads": None if self_attention.kv_heads == self_attention.heads else self_attention.kv_heads,
        "attn_dropout": self_attention.attn_dropout.p,
        "ff_mult": mult_for(model.dim, feed_forward[4].in_features),
        "ff_dropout": feed_forward[3].p,
        "autoset_semantic_eos_id": model.autoset_eos_id["speech"],
        "autoset_text_eos_id": model.autoset_eos_id["text"],
        "target_early_exit_layer": model.early_exit_layer,
        "detach_early_exit_embed": getattr(model, "detach_early_exit_embed", False),
    }


def _share_parameters(fast: nn.Module, reference_model: nn.Module) -> None:
    for prefix, module in fast.named_modules(remove_duplicate=False):
        for name in (name for name, own in module._parameters.items() if own is not None):
            module._parameters[name] = reference_model.get_parameter(f"{prefix}.{name}" if prefix else name)


@functools.cache
def _combined_class(reference_class: type) -> type:
    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:  # noqa: N807
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def __reduce__(self: Any) -> tuple[Any, ...]:  # noqa: N807
        # the combined class exists in this process only: elsewhere it is the plain fast model
        return _restore, (self.__dict__,)

    members = {"__deepcopy__": __deepcopy__, "__reduce__": __reduce__}
    return type("TextToSemantic", (TextToSemantic, reference_class), members)


def _restore(state: dict[str, Any]) -> TextToSemantic:
    model = object.__new__(TextToSemantic)
    model.__dict__ = state
    return model
