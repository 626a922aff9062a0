"""Attention of the newest tokens over the source, whose keys and values are held once for all beams of an utterance."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from spear_fast.ops import backends, extension
from spear_fast.ops.checks import FLOATS, check_common, check_residual, check_shapes, refuse, shape_of
from spear_fast.ops.providers import Provider, register
from spear_fast.ops.reference import decode_attention as reference
from spear_fast.ops.registry import define

# source positions that a program reads at least, and programs that fill a GPU: an H100 holds four to six of them on
# each of its 132 multiprocessors
SHORTEST_SPLIT, PROGRAMS = 64, 512
# of a source of usual length: longer ones have more splits
USUAL_SOURCE = 1024
# hypotheses whose whole step one launch can make, see `decode_step`
FEW_ROWS = 16


@overload
def decode_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    lengths: Tensor,
    *,
    return_weights: Literal[False] = False,
    arrivals: Tensor | None = None,
    split: int = 0,
    scales: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor: ...


@overload
def decode_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    lengths: Tensor,
    *,
    return_weights: Literal[True],
    arrivals: Tensor | None = None,
    split: int = 0,
    scales: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def decode_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    lengths: Tensor,
    *,
    return_weights: bool = False,
    arrivals: Tensor | None = None,
    split: int = 0,
    scales: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns each hypothesis' attention over its utterance's source, `[utterances, beams, heads, head_dim]`.

    query: `[utterances, beams, heads, head_dim]`; beams may be beams times tokens.
    key, value: `[utterances, heads, source, head_dim]`, shared by the beams; not read at or past `lengths`; like query,
        or with `scales` float8_e4m3fn.
    null_key, null_value: `[heads, head_dim]`; a learned position before the source that is always attended.
    lengths: `[utterances]`, int64, in 0..source.
    return_weights: whether to return the weights too, `[utterances, beams, heads, source + 1]`, like query, the null
        position's first, zeros past `lengths`.
    arrivals: `[any]`, int32, zeros before and after: where kernels count the splits that have arrived, for calls one
        after the other; `arrivals_for` makes it. None, or too few: made for the call.
    split: source positions that a program on a GPU reads, 0 for all of them, as where weights are wanted. The same
        numbers added in another order: whoever wants the same bits gives the same split, whatever else is in the batch;
        see `planned_split`.
    scales: `[2, utterances, heads]`, float32; what an utterance's keys, and then its values, are to be multiplied by.
    residual: `[utterances * beams, dim]`, like query; or None. The query was projected from its rows without the norm
        before: here it is multiplied by `sqrt(dim) / max(||row||, 1e-12)`, in float32.

    Raises ValueError where the arguments do not fit each other, or a length lies outside of the source.
    Source: attention of the reference over a context, with its null key (reference line 249).
    """
    out, weights = _decode_cross_attention(
        query, key, value, null_key, null_value, lengths, return_weights, residual, arrivals, split, scales
    )
    return (out, weights) if return_weights else out


def planned_split(slots: int, heads: int) -> int:
    """Returns the split with which so many utterances fill a GPU, 0 for whole sources where they do so anyway."""
    if slots * heads >= PROGRAMS:
        return 0
    return max(SHORTEST_SPLIT, USUAL_SOURCE * slots * heads // PROGRAMS // SHORTEST_SPLIT * SHORTEST_SPLIT)


def arrivals_for(slots: int, heads: int, beams: int, device: torch.device) -> Tensor:
    """Returns zeros `[n]` int32 for the `arrivals` of up to so many utterances, one query a beam.

    They are enough for a step of few hypotheses in one launch too.
    """
    # a program has at least 16 beams, as few as its matrix instructions take
    count = slots * heads * -(-beams // 16)
    return torch.zeros(max(count, step_arrivals(heads)), dtype=torch.int32, device=device)


def step_arrivals(heads: int) -> int:
    """Returns how many numbers a step of few hypotheses counts with: for each head, at its barriers and at its end."""
    return 2 + FEW_ROWS * heads


def _check_decode_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    lengths: Tensor,
    return_weights: bool,
    residual: Tensor | None,
    arrivals: Tensor | None,
    split: int,
    scales: Tensor | None,
) -> None:
    """Raises ValueError unless the arguments of `decode_cross_attention` fit each other."""
    op, dtype, device = "decode_cross_attention", query.dtype, query.device
    if query.dim() != 4:
        refuse(op, "query", "[utterances, beams, heads, head_dim]", shape_of(query), "pass one query a hypothesis")
    if key.dim() != 4:
        refuse(op, "key", "[utterances, heads, source, head_dim]", shape_of(key), "do not copy it for each beam")
    utterances, _, heads, size = query.shape
    shape = (utterances, heads, key.shape[2], size)
    if (
        key.shape != shape
        or value.shape != shape
        or null_key.shape != (heads, size)
        or null_value.shape != (heads, size)
        or lengths.shape != (utterances,)
    ):
        check_shapes(
            op,
            {
                "key": (key, "utterances, heads, source, head_dim", shape),
                "value": (value, "utterances, heads, source, head_dim", shape),
                "null_key": (null_key, "heads, head_dim", (heads, size)),
                "null_value": (null_value, "heads, head_dim", (heads, size)),
                "lengths": (lengths, "utterances", (utterances,)),
            },
        )
    held = dtype if scales is None else torch.float8_e4m3fn
    if not (
        null_key.dtype == null_value.dtype == dtype
        and key.dtype == value.dtype == held
        and key.device == value.device == null_key.device == null_value.device == lengths.device == device
        and lengths.dtype == torch.int64
        and dtype in FLOATS
    ):
        tensors = {"query": query, "null_key": null_key, "null_value": null_value}
        others = {"lengths": (lengths, torch.int64)}
        if scales is None:
            tensors |= {"key": key, "value": value}
        else:
            others |= {"key": (key, held), "value": (value, held)}
        check_common(op, "query", tensors, None, others)
    if scales is not None and not (
        scales.shape == (2, utterances, heads) and scales.dtype == torch.float32 and scales.device == device
    ):
        check_shapes(op, {"scales": (scales, "2, utterances, heads", (2, utterances, heads))})
        check_common(op, "query", {"query": query}, None, {"scales": (scales, torch.float32)})
    check_residual(op, query, "query", 2, residual)
    if split < 0:
        refuse(op, "split", "0 or more", str(split), "pass 0 for whole sources, or what planned_split returns")
    if arrivals is not None and not (
        arrivals.dtype == torch.int32 and arrivals.device == device and arrivals.dim() == 1 and arrivals.is_contiguous()
    ):
        got = f"{arrivals.dtype} {shape_of(arrivals)} on {arrivals.device}"
        refuse(op, "arrivals", f"torch.int32 [any] on {device}, contiguous", got, "pass what arrivals_for returns")


def _fake_decode_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    lengths: Tensor,
    return_weights: bool,
    residual: Tensor | None,
    arrivals: Tensor | None = None,
    split: int = 0,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    given = query, key, value, null_key, null_value, lengths, return_weights, residual, arrivals, split, scales
    _check_decode_cross_attention(*given)
    weights = (*query.shape[:3], key.shape[2] + 1) if return_weights else (0,)
    return query.new_empty(query.shape), query.new_empty(weights)


_RETURNS = " -> (Tensor out, Tensor weights)"
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor null_key, Tensor null_value, Tensor lengths, "
    "bool return_weights, Tensor? residual"
)
_decode_cross_attention = define(
    "decode_cross_attention",
    f"({_ARGUMENTS}, Tensor? arrivals, int split, Tensor? scales){_RETURNS}",
    check=_check_decode_cross_attention,
    fake=_fake_decode_cross_attention,
    native=("cpu",),
    # how the work is divided is nothing to a CPU, and what is scaled comes to it as floating point
    native_schema=f"({_ARGUMENTS}){_RETURNS}",
)
_native = torch.ops.spear_fast.decode_cross_attention.cpu


def _by_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null_key: Tensor,
    null_value: Tensor,
    lengths: Tensor,
    return_weights: bool,
    residual: Tensor | None,
    arrivals: Tensor | None,
    split: int,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if scales is not None:
        if lengths.numel() and not return_weights and int(lengths.min()) >= 0 and int(lengths.max()) < key.shape[2]:
            # what nobody reads need not be converted
            key, value = (each[:, :, : int(lengths.max())] for each in (key, value))
        key, value = reference.dequantised(key, value, scales, query.dtype)
    return _native(query, key, value, null_key, null_value, lengths, return_weights, residual)


register(
    Provider(
        "decode_cross_attention",
        "cpu",
        _by_cpu,
        ("cpu",),
        extension.missing,
        backends.of_dtypes(*backends.CPU_DTYPES),
    )
)
register(backends.triton("decode_cross_attention", "decode_cross_attention"))
register(backends.reference("decode_cross_attention", reference))
