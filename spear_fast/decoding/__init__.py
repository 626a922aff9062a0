"""Decoding of an encoded source: greedy, sampling, beam search, speculative; with guidance in all of them.

decoder = Decoder.from_modules(transformer, embedding, start_token, eos_id=..., pad_id=...)
result = decode(decoder, memory, memory_mask, DecodingOptions(beam_size=4))
"""

from __future__ import annotations

from spear_fast.decoding.batch import decode_ids
from spear_fast.decoding.budget import Plan
from spear_fast.decoding.decoder import Decoder
from spear_fast.decoding.encoder import Encoder
from spear_fast.decoding.engine import Engine
from spear_fast.decoding.linear import Weights
from spear_fast.decoding.loop import decode
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.result import DecodingResult

__all__ = [
    "Decoder",
    "DecodingOptions",
    "DecodingResult",
    "Encoder",
    "Engine",
    "Plan",
    "Weights",
    "decode",
    "decode_ids",
]
