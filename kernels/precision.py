"""Conversions between dtypes that come out the same in Triton's interpreter as on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cast(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Returns float32 `x` in another dtype, rounded to the nearest, as a GPU does."""
    if INTERPRETED and dtype == tl.bfloat16:
        # the interpreter's own conversion cuts the lower bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)
