"""Decoding of an encoded source: greedy, sampling, beam search, speculative; with guidance in all of them.

decoder = Decoder.from_modules(transformer, embedding, start_token, eos_id=..., pad_id=...)
result = decode(decoder, memory, memory_mask, DecodingOptions(beam_size=4))
"""

from __future__ import annotations

import warnings
from typing import Any

from spear_fast.decoding.config import EngineConfig
from spear_fast.decoding.engine import Engine
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.packed.encoder import Encoder
from spear_fast.decoding.packed.linear import Weights
from spear_fast.decoding.packed.memory import KvDtype
from spear_fast.decoding.padded import decode, decode_ids
from spear_fast.decoding.request import Request
from spear_fast.decoding.result import DecodingResult

__all__ = [
    "Decoder",
    "DecodingOptions",
    "DecodingResult",
    "Encoder",
    "Engine",
    "EngineConfig",
    "KvDtype",
    "Request",
    "Weights",
    "decode",
    "decode_ids",
]

# names of the last release
_RENAMED: dict[str, type] = {"Plan": EngineConfig, "Ticket": Request}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(f"spear_fast.decoding.{name} is now {new.__name__}.", DeprecationWarning, stacklevel=2)
    return new
