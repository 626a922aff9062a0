"""Fast SPEAR-TTS: text ↔ semantic speech tokens, with the reference's modules and checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spear_fast.checkpoints.accelerate import accelerate as accelerate
    from spear_fast.checkpoints.load import load_model as load_model
    from spear_fast.decoding import DecodingOptions as DecodingOptions
    from spear_fast.decoding import DecodingResult as DecodingResult
    from spear_fast.decoding import Engine as Engine
    from spear_fast.decoding import EngineConfig as EngineConfig
    from spear_fast.labelling import LabelOptions as LabelOptions
    from spear_fast.labelling import label as label
    from spear_fast.model import TextToSemantic as TextToSemantic
    from spear_fast.training import (
        GeneratedAudioTextDataset as GeneratedAudioTextDataset,
    )
    from spear_fast.training import MockDataset as MockDataset
    from spear_fast.training import (
        SemanticToTextDatasetGenerator as SemanticToTextDatasetGenerator,
    )
    from spear_fast.training import SemanticToTextTrainer as SemanticToTextTrainer
    from spear_fast.training import SpeechSpeechPretrainer as SpeechSpeechPretrainer
    from spear_fast.training import TextToSemanticTrainer as TextToSemanticTrainer
    from spear_fast.wrappers import SemanticToTextWrapper as SemanticToTextWrapper
    from spear_fast.wrappers import (
        SpeechSpeechPretrainWrapper as SpeechSpeechPretrainWrapper,
    )
    from spear_fast.wrappers import TextToSemanticWrapper as TextToSemanticWrapper

# loaded at first use: the command line answers --help without waiting for torch
_HOMES = {
    "checkpoints.load": ("load_model",),
    "decoding": ("DecodingOptions", "DecodingResult", "Engine", "EngineConfig"),
    "labelling": ("LabelOptions", "label"),
    "checkpoints.accelerate": ("accelerate",),
    "model": ("TextToSemantic",),
    "training": (
        "GeneratedAudioTextDataset",
        "MockDataset",
        "SemanticToTextDatasetGenerator",
        "SemanticToTextTrainer",
        "SpeechSpeechPretrainer",
        "TextToSemanticTrainer",
    ),
    "wrappers": ("SemanticToTextWrapper", "SpeechSpeechPretrainWrapper", "TextToSemanticWrapper"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'spear_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"spear_fast.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
