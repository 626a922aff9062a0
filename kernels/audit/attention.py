"""What the audit compiles of attention: every option at once, with dropout and without."""

from __future__ import annotations

from ..attention_backward_key_value import attention_backward_key_value_kernel
from ..attention_backward_query import attention_backward_query_kernel
from ..attention_forward import attention_forward_kernel
from ..attention_rotation import attention_rotation_kernel
from ..blocks import padded
from ..declaration import Declaration

_TENSORS = "grad_out query key value out grad_query grad_key grad_value null_key null_value x"
_NUMBERS = "s_mask_row s_mask length key_length heads kv_heads blocks threshold"
_STRIDES = "s_row s_position s_head s_grad_row s_grad s_grad_head s_query_row s_query s_query_head"
_STRIDES += " s_key_row s_key s_key_head s_value_row s_value s_value_head"
_SIGNATURE = {
    **dict.fromkeys(_TENSORS.split(), "*T:16"),
    **dict.fromkeys("lse delta partial_key partial_value freqs".split(), "*fp32:16"),
    **dict.fromkeys("cu_query cu_key offsets".split(), "*i32:16"),
    "key_mask": "*i1:16",
    "seed": "*i64:16",
    **dict.fromkeys(_STRIDES.split(), "i32:16"),
    **dict.fromkeys(_NUMBERS.split(), "i32"),
    **dict.fromkeys("scale share".split(), "fp32"),
}
# a key mask weighs more than cumulative lengths, and rows have one or the other
_OPTIONS = {"CAUSAL": True, "MODULO": True, "cu_query": None, "cu_key": None}


def _constants(size: int) -> dict[str, object]:
    return {"HEAD_DIM": size, "SIZE": padded(size), "INTERPRETED": False}


AUDIT = [
    Declaration(
        kernel=kernel,
        tile=tile + plain,
        signature=_SIGNATURE,
        constants=_constants,
        variants={"without dropout": {**_OPTIONS, "seed": None}} if plain else {"": _OPTIONS},
        matrix=True,
    )
    for kernel, tile in (
        (attention_forward_kernel, "attention_forward"),
        (attention_backward_query_kernel, "attention_backward_query"),
        (attention_backward_key_value_kernel, "attention_backward_key_value"),
    )
    for plain in ("", "_plain")
] + [
    Declaration(kernel=attention_rotation_kernel, tile="attention_rotation", signature=_SIGNATURE, constants=_constants)
]
