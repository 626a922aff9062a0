"""One decoding step: inputs in, logits out, over the fixed buffers of a state. Nothing is read back to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spear_fast import ops
from spear_fast.decoding.decoder import Decoder, EarlyExit
from spear_fast.decoding.linear import unit
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.state import DecodeState
from spear_fast.decoding.transfer import to_device
from spear_fast.decoding.view import View
from spear_fast.ops import providers
from spear_fast.ops.selection_params import FloatParam


def step(decoder: Decoder, state: DecodeState, cond_scale: float = 1.0) -> Tensor:
    """Returns logits `[B, K, vocabulary]`, float32 at least, for what follows `state.inputs`.

    Writes the inputs' keys and values at position `lengths` of each hypothesis' own slot; the search raises `lengths`.
    """
    claim_slots(state, state.lengths)
    return guided_logits(newest_logits(decoder, state), state, cond_scale)[:, :, 0]


def advance(decoder: Decoder, view: View, options: Sequence[DecodingOptions]) -> None:
    """Makes one step of all utterances in view: the newest inputs through the decoder, then each one's selection.

    options: of the utterances, which are in the first places; those behind them are free.
    """
    logits = newest_logits(decoder, view).view(*view.lengths.shape, -1)
    sighted, blind = logits.chunk(2) if view.guided else (logits, None)
    buffers = view.inputs, view.scores, view.lengths, view.ancestors, view.tokens, view.parents, view.logprobs
    settings = view.float_params, view.int_params, view.prefix
    searching = [each.method == "beam" for each in options]
    if any(searching):
        ops.beam_step(
            sighted, blind, *settings, *buffers, view.pool_scores, view.pool_beams, view.pool_ends, view.pool_finished,
            view.pool_last_logprobs, view.ended, view.done,
        )  # fmt: skip
    if not all(searching):
        filtered = _filtered(sighted, blind, view, options)
        ops.sample_step(sighted, blind, filtered, *settings, view.seeds, *buffers, view.finished, view.done)


def newest_logits(decoder: Decoder, view: DecodeState | View) -> Tensor:
    """Returns logits `[R * K, vocabulary]` of what follows the newest inputs."""
    if decoder.native is not None and _by_cpu(decoder):
        memory = view.memory
        return decoder.native.step(
            view.inputs,
            view.keys,
            view.values,
            memory.keys,
            memory.values,
            memory.lengths,
            view.ancestors,
            view.lengths,
        )
    x = embed(decoder, view, view.inputs[:, :, None])
    return decoder.logits(unit(run_layers(decoder, view, x, range(len(decoder.layers)))))


def _by_cpu(decoder: Decoder) -> bool:
    """Returns whether the ops of a step are computed by the extension: nobody asked for another provider."""
    inputs = providers.Inputs(decoder.device, decoder.dtype, decoder.head_dim)
    return all(
        (providers.chosen(op).get(inputs) or providers.choose(op, inputs)) is providers.get(op, "cpu").function
        for op in ("append_kv", "decode_self_attention", "decode_cross_attention")
    )


def _filtered(sighted: Tensor, blind: Tensor | None, view: View, options: Sequence[DecodingOptions]) -> Tensor | None:
    """Returns the logits with each request's own function applied, or None where none has one."""
    places: dict[Callable[[Tensor], Tensor], list[int]] = {}
    for place, each in enumerate(options):
        if each.method != "beam" and each.filter_logits is not None:
            places.setdefault(each.filter_logits, []).append(place)
    if not places:
        return None
    logits = sighted.to(view.scores.dtype)
    if blind is not None:
        guidance = view.float_params[:, FloatParam.GUIDANCE, None, None]
        logits = torch.where(guidance == 1, logits, blind + (logits - blind) * guidance)
    filtered = logits.clone()
    for function, own in places.items():
        index = to_device(torch.tensor(own), logits.device)
        rows = logits[index]
        filtered[index] = function(rows.flatten(0, 1)).view_as(rows)
    return filtered.to(sighted.dtype)


def embed(decoder: Decoder, state: DecodeState | View, inputs: Tensor) -> Tensor:
    """Returns the vectors `[R * K * Q, dim]` of inputs `[B, K, Q]` int64: Q consecutive ones of each hypothesis."""
    x = decoder.embedding[inputs.flatten()]
    return torch.cat((x, x)) if state.guided else x


def run_layers(decoder: Decoder, state: DecodeState | View, x: Tensor, layers: range, first: int = 0) -> Tensor:
    """Returns hidden states `[R * K * Q, dim]` after some of the layers.

    x: `[R * K * Q, dim]`, Q consecutive inputs of each hypothesis, the first one at position `lengths + first`. The
    ancestors say already that each hypothesis reads these positions from its own slot.
    """
    rows, beams = state.lengths.shape
    count = x.shape[0] // (rows * beams)
    positions = state.lengths + first if first else state.lengths
    heads, size = decoder.heads, decoder.head_dim
    split = [heads, decoder.kv_heads, decoder.kv_heads]
    sourced = state.batch * beams * count
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


def claim_slots(state: DecodeState, positions: Tensor) -> None:
    """Notes that each hypothesis reads a position from its own slot, where it is about to write it.

    positions: `[R, K]`, int64.
    """
    rows, beams = positions.shape
    own = torch.arange(beams, dtype=torch.uint8, device=positions.device).expand(rows, beams)
    state.ancestors.scatter_(2, positions[:, :, None], own[:, :, None])
