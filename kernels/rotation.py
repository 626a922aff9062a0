"""Rotary positions inside kernels: pairs of neighbours (2i, 2i + 1) rotated by `position * freqs[i]`, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cos_sin(angle):
    """Returns cosine and sine, to about 1e-7 up to 6,000 radians either way and 1e-6 up to 50,000.

    The compiler's own sine falls back on a table in local memory for large angles, which costs every thread a stack
    frame; subtracting multiples of a quarter turn in three exact parts, as here, does not.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = angle - quarters * 1.5703125
    x = x - quarters * 0.0004837512969970703
    x = x - quarters * 7.549790126404332e-08
    z = x * x
    # least worst error on an eighth of a turn either way
    sine = x + x * z * (-0.1666665065 + z * (0.008331977313 + z * -0.000194954645))
    cosine = 1.0 - 0.5 * z + z * z * (0.04166664684 + z * (-0.0013887366 + z * 2.443827097e-05))
    quadrant = quarters.to(tl.int32) & 3
    swapped = (quadrant & 1) == 1
    cos = tl.where(swapped, sine, cosine)
    sin = tl.where(swapped, cosine, sine)
    # the cosine is negative in quadrants 1 and 2, the sine in 2 and 3
    return tl.where(((quadrant + 1) & 2) == 2, -cos, cos), tl.where((quadrant & 2) == 2, -sin, sin)


@triton.jit
def rotate(x, cos, sin):
    """Returns the rows `x` `[ROWS, SIZE]`, each pair of neighbours rotated by `[ROWS, SIZE / 2]` cosines and sines."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), x.shape)
