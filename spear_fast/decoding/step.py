"""The decoder's part of a step: newest inputs in, logits out, over the buffers of a state. Nothing is read back.

`decode_step` is an op with providers, as those of `spear_fast.ops` are: "cpu-fused" is one call of C++ over packed
weights, "cuda-fused" one launch for few rows, "layered" calls the ops layer by layer, on any device. Its first argument
is an object, for which the dispatcher, and so opcheck, has no schema.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from spear_fast import ops
from spear_fast.decoding.fused_step import fits, fused_step
from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.packed.layout import EarlyExit
from spear_fast.decoding.packed.linear import normalize
from spear_fast.decoding.state import DecodeState
from spear_fast.ops import backends, extension, providers

# what "cpu-fused" computes by the extension, whatever their providers
FUSED_OPS = ("append_kv", "decode_self_attention", "decode_cross_attention")
# what "layered" calls, and "cuda-fused" computes by itself
LAYERED_OPS = (*FUSED_OPS, "geglu", "rms_norm")
_CHOICES = providers.add_op("decode_step")


def decode_step(decoder: Decoder, state: DecodeState) -> Tensor:
    """Returns logits `[R * K, vocabulary]` of what follows the newest inputs, in the decoder's dtype.

    Writes the inputs' keys and values at position `lengths` of each hypothesis' own beam; selection raises `lengths`.
    """
    options = decoder.fused is not None, state.memory.scales is None, fits(decoder, state)
    query = decoder.device, decoder.dtype, decoder.head_dim, options
    function = _CHOICES.get(query) or providers.choose("decode_step", providers.ProviderQuery(*query))
    return function(decoder, state)


def _cpu_fused(decoder: Decoder, state: DecodeState) -> Tensor:
    memory = state.memory
    return decoder.fused.step(
        state.inputs, state.keys, state.values, memory.keys, memory.values, memory.lengths, state.ancestors,
        state.lengths,
    )  # fmt: skip


def _layered(decoder: Decoder, state: DecodeState) -> Tensor:
    x = embed(decoder, state, state.inputs[:, :, None])
    x = run_layers(decoder, state, x, range(len(decoder.layers)))
    return decoder.logits(normalize(x, decoder.final_gamma))


def _why_not_fused(query: providers.ProviderQuery) -> str | None:
    if not query.options[0]:
        return "the weights are not packed: that takes a float32 model and an extension built with vectors"
    if not query.options[1]:
        return "cross-attention's keys and values are held in 8 bits"
    for op in FUSED_OPS:
        if providers.choose(op, query._replace(options=())) is not providers.get(op, "cpu").function:
            return f"another provider is asked for {op}"
    return None


class _Refused:
    """Why this process' device would not launch the whole step, once it has said so."""

    reason: str | None = None


def _cuda_fused(decoder: Decoder, state: DecodeState) -> Tensor:
    try:
        return fused_step(decoder, state)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # nothing is written before all blocks are there
        _Refused.reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _CHOICES.clear()
        warnings.warn(
            "decoding goes on without launching steps as a whole, which is slower for few hypotheses: the launch was "
            f"refused ({_Refused.reason}); SPEAR_FAST_PROVIDER=decode_step=layered does not try to.",
            RuntimeWarning,
            stacklevel=2,
        )
        return _layered(decoder, state)


def _cuda_fused_missing() -> str | None:
    refused = _Refused.reason and f"the device refused its launch ({_Refused.reason})"
    return refused or backends.cuda_missing()


def _why_not_cuda_fused(query: providers.ProviderQuery) -> str | None:
    if not query.options[2]:
        return "takes up to 16 hypotheses, of a bfloat16 or float16 model of up to 24 layers with a dim of up to 1024"
    asked = [op for op in LAYERED_OPS if providers.asked_for(op) is not None]
    return f"a provider is asked for {asked[0]}, which it computes by itself" if asked else None


providers.register(
    providers.Provider(
        "decode_step", "cpu-fused", _cpu_fused, devices=("cpu",), missing=extension.missing, why_not=_why_not_fused
    )
)
providers.register(
    providers.Provider(
        "decode_step",
        "cuda-fused",
        _cuda_fused,
        devices=("cuda",),
        missing=_cuda_fused_missing,
        why_not=_why_not_cuda_fused,
    )
)
providers.register(providers.Provider("decode_step", "layered", _layered))


def embed(decoder: Decoder, state: DecodeState, inputs: Tensor) -> Tensor:
    """Returns the vectors `[R * K * Q, dim]` of inputs `[B, K, Q]` int64: Q consecutive ones of each hypothesis."""
    x = decoder.embedding[inputs.flatten()]
    return torch.cat((x, x)) if state.guided else x


def run_layers(decoder: Decoder, state: DecodeState, x: Tensor, layers: range, first: int = 0) -> Tensor:
    """Returns hidden states `[R * K * Q, dim]` after some of the layers.

    x: `[R * K * Q, dim]`, which is overwritten; Q consecutive inputs of each hypothesis, the first one at position
    `lengths + first`. The ancestors say already that each hypothesis reads these positions from its own beam.
    """
    rows, beams = state.lengths.shape
    count = x.shape[0] // (rows * beams)
    heads, size = decoder.heads, decoder.head_dim
    split = [heads, decoder.kv_heads, decoder.kv_heads]
    sourced = state.batch * beams * count
    written, memory = state.lengths + (first + count), state.memory
    for i in layers:
        layer = decoder.layers[i]
        # a norm that is deferred costs no launch: the raw rows are multiplied, and who reads the result norms it
        deferred = layer.norm_deferred
        normed = x if deferred else normalize(x, layer.self_gamma)
        projected = layer.query_key_value(normed).view(rows, beams, count, -1, size)
        query, key, value = projected.split(split, dim=3)
        caches = state.keys[i], state.values[i]
        attended = ops.decode_self_attention(
            query, layer.freqs, *caches, state.ancestors, written, key, value, x if deferred else None
        )
        x = layer.self_output.add_to(x, attended.reshape(-1, heads * size))

        conditional = x[:sourced]
        normed = conditional if deferred else normalize(conditional, layer.cross_gamma)
        query = layer.cross_query(normed).view(state.batch, beams * count, heads, size)
        attended = ops.decode_cross_attention(
            query, memory.keys[i], memory.values[i], layer.null_key, layer.null_value, memory.lengths,
            arrivals=memory.arrivals, split=memory.split, scales=memory.scales_of(i),
            residual=conditional if deferred else None,
        )  # fmt: skip
        layer.cross_output.add_to(conditional, attended.reshape(-1, heads * size))
        if state.guided:
            # without its source the other half sees the null key alone, which needs no query
            x[sourced:].add_(layer.null_output)
        x = layer.feed_forward.add_to(x, None if deferred else normalize(x, layer.feed_gamma))
    return x


def early_logits(head: EarlyExit, state: DecodeState, x: Tensor, cond_scale: float) -> Tensor:
    """Returns the drafting head's logits `[B, K, Q, vocabulary]` of hidden states `[R * K * Q, dim]`."""
    # the head has a norm of its own before its feed-forward and one after
    fed = head.feed_forward.add_to(x.clone(), normalize(x, head.feed_gamma))
    return guided_logits(head.logits(normalize(fed, head.gamma)), state, cond_scale)


def guided_logits(logits: Tensor, state: DecodeState, cond_scale: float) -> Tensor:
    """Returns `[B, K, Q, vocabulary]`, float32 at least, from rows `[R * K * Q, vocabulary]`, the two halves mixed."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(
        *state.lengths.shape, -1, logits.shape[-1]
    )
    if not state.guided:
        return logits
    conditional, unconditional = logits.chunk(2)
    return conditional if cond_scale == 1 else unconditional + (conditional - unconditional) * cond_scale


def claim_positions(state: DecodeState, positions: Tensor) -> None:
    """Notes that each hypothesis reads a position from its own beam, where it is about to write it.

    positions: `[R, K]`, int64.
    """
    rows, beams = positions.shape
    own = torch.arange(beams, dtype=torch.uint8, device=positions.device).expand(rows, beams)
    state.ancestors.scatter_(2, positions[:, :, None], own[:, :, None])
