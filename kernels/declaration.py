"""How a kernel declares itself to the audit.

Each module of kernels has a list `AUDIT` of declarations, one for each kernel that it launches:

    AUDIT = [
        Declaration(
            kernel=_copy_kernel,
            tile="copy",
            signature={"source": "*T:16", "target": "*T:16", "rows": "i32", "stride": "i32:16"},
            constants=lambda size: {"SIZE": size},
            variants={"plain": {"MASKED": False, "mask": None}, "masked": {"MASKED": True}},
        )
    ]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Declaration:
    """What the audit must know to compile a kernel as it is launched.

    kernel: the function that `@triton.jit` made.
    tile: the kernel's name in the table of tiles.py; it is compiled at each of its rows.
    signature: argument → type as Triton writes it ("*bf16", "i32", "fp32"), where T stands for the row's dtype (bf16 or
        fp32); ":16" after it says that the pointer or number is a multiple of 16 at run time, as it mostly is.
    constants: head size (or row width) → constexpr arguments that the row's blocks do not give.
    variants: name → further constants, for the options that are worth compiling: the heaviest on registers last, which
        is the only one compiled in float32 and for architectures other than 9.0. A constant wins over the signature, so
        an optional pointer that is left out is None here.
    matrix: whether its matmuls must become matrix instructions in 16-bit dtypes: wgmma on sm_90.
    """

    kernel: Any
    tile: str
    signature: Mapping[str, str]
    constants: Callable[[int], Mapping[str, Any]] = lambda size: {}
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    matrix: bool = False
