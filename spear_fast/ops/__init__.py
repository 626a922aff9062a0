"""The operations that everything fast calls, each checked, with one definition and several providers.

`H` heads share `G` key/value heads: query head i reads key/value head `i // (H // G)`. Weights whose heads are grouped
otherwise are permuted when they are loaded. Scores are scaled by `head_dim ** -0.5`.

Every op raises ValueError, one sentence, where its arguments do not fit each other: shapes, dtypes, devices, layouts.
Integers that address memory are held against their ranges on the CPU, and on a GPU with SPEAR_FAST_DEBUG=1, where
looking at them waits for the device. RuntimeError says why nobody can compute what was asked for.
"""

from spear_fast.ops.attention import attention
from spear_fast.ops.cross_entropy import cross_entropy, label_log_probs
from spear_fast.ops.decode_attention import append_kv, decode_self_attention
from spear_fast.ops.decode_cross_attention import decode_cross_attention
from spear_fast.ops.pointwise import geglu, rms_norm, rotary
from spear_fast.ops.providers import available, forced
from spear_fast.ops.selection import beam_step, sample_step

__all__ = [
    "append_kv",
    "attention",
    "available",
    "beam_step",
    "cross_entropy",
    "decode_cross_attention",
    "decode_self_attention",
    "forced",
    "geglu",
    "label_log_probs",
    "rms_norm",
    "rotary",
    "sample_step",
]
