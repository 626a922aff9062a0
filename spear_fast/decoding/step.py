"""One decoding step: inputs in, logits out, over the fixed buffers of a state. Nothing is read back to the host."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_fast import ops
from spear_fast.decoding.decoder import Decoder, EarlyExit
from spear_fast.decoding.linear import unit
from spear_fast.decoding.state import DecodeState


def step(decoder: Decoder, state: DecodeState, cond_scale: float = 1.0) -> Tensor:
    """Returns logits `[B, K, vocabulary]`, float32 at least, for what follows `state.inputs`.

    Writes the inputs' keys and values at position `lengths` of each hypothesis' own slot; the search raises `lengths`.
    """
    x = embed(decoder, state, state.inputs[:, :, None])
    x = run_layers(decoder, state, x, range(len(decoder.layers)))
    return guided_logits(decoder.logits(unit(x)), state, cond_scale)[:, :, 0]


def embed(decoder: Decoder, state: DecodeState, inputs: Tensor) -> Tensor:
    """Returns the vectors `[R * K * Q, dim]` of inputs `[B, K, Q]` int64: Q consecutive ones of each hypothesis."""
    x = decoder.embedding[inputs.flatten()]
    return torch.cat((x, x)) if state.guided else x


def run_layers(decoder: Decoder, state: DecodeState, x: Tensor, layers: range, first: int = 0) -> Tensor:
    """Returns hidden states `[R * K * Q, dim]` after some of the layers.

    x: `[R * K * Q, dim]`, Q consecutive inputs of each hypothesis, the first one at position `lengths + first`.
    """
    rows, beams = state.lengths.shape
    count = x.shape[0] // (rows * beams)
    positions = state.lengths + first if first else state.lengths
    heads, size = decoder.heads, decoder.head_dim
    split = [heads, decoder.kv_heads, decoder.kv_heads]
    sourced = state.batch * beams * count
    _claim_slots(state, positions, count)
    written = positions + count
    for i in layers:
        layer = decoder.layers[i]
        projected = layer.query_key_value(unit(x)).view(rows, beams, count, -1, size)
        query, key, value = projected.split(split, dim=3)
        caches = state.keys[i], state.values[i]
        ops.append_kv(key.flatten(0, 1), value.flatten(0, 1), layer.freqs, positions.flatten(), *caches)
        attended = ops.decode_self_attention(query, layer.freqs, *caches, state.ancestors, written)
        x = layer.self_output(attended.reshape(-1, heads * size), x)

        sighted = x[:sourced]
        query = layer.cross_query(unit(sighted)).view(state.batch, beams * count, heads, size)
        attended = ops.decode_cross_attention(
            query, state.memory.keys[i], state.memory.values[i], layer.null_key, layer.null_value, state.memory.lengths
        )
        sighted = layer.cross_output(attended.reshape(-1, heads * size), sighted)
        # without its source the other half sees the null key alone, which needs no query
        x = torch.cat((sighted, x[sourced:] + layer.null_output)) if state.guided else sighted
        x = layer.feed_forward(unit(x), x)
    return x


def early_logits(head: EarlyExit, state: DecodeState, x: Tensor, cond_scale: float) -> Tensor:
    """Returns the drafting head's logits `[B, K, Q, vocabulary]` of hidden states `[R * K * Q, dim]`."""
    # the head has a norm of its own in front of its feed-forward and one behind
    return guided_logits(head.logits(unit(head.feed_forward(unit(x), x))), state, cond_scale)


def guided_logits(logits: Tensor, state: DecodeState, cond_scale: float) -> Tensor:
    """Returns `[B, K, Q, vocabulary]`, float32 at least, from rows `[R * K * Q, vocabulary]`, the two halves mixed."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(
        *state.lengths.shape, -1, logits.shape[-1]
    )
    if not state.guided:
        return logits
    sighted, blind = logits.chunk(2)
    return blind + (sighted - blind) * cond_scale


def _claim_slots(state: DecodeState, positions: Tensor, count: int) -> None:
    """Notes that each hypothesis reads `count` positions from its own slot, where it is about to write them.

    positions: `[R, K]`, int64, the first of them.
    """
    rows, beams = positions.shape
    own = torch.arange(beams, dtype=torch.uint8, device=positions.device)[:, None].expand(rows, beams, count)
    places = positions[:, :, None]
    if count > 1:
        places = places + torch.arange(count, device=positions.device)
    state.ancestors.scatter_(2, places, own)
