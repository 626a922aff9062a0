"""`decode`: from an encoded batch to its hypotheses, by the engine or, where its rows go on together, in lockstep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spear_fast.decoding.alignment import aligned
from spear_fast.decoding.budget import Plan
from spear_fast.decoding.decoder import Decoder, ProjectedMemory
from spear_fast.decoding.encoder import Encoder
from spear_fast.decoding.engine import Engine
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.result import DecodingResult, gather_result, join_results, joined
from spear_fast.decoding.search import select_reference_beam
from spear_fast.decoding.slots import interval
from spear_fast.decoding.speculative import speculate
from spear_fast.decoding.state import DecodeState, new_state
from spear_fast.decoding.step import step


def decode(decoder: Decoder, memory: Tensor, memory_mask: Tensor, options: DecodingOptions) -> DecodingResult:
    """Returns the hypotheses of each row of an encoded source.

    memory: `[batch, length, dim]`. memory_mask: `[batch, length]` bool, False where a position must not be read; it may
    have holes, and a row without any readable position is decoded from the null key alone.

    Raises ValueError when shapes or devices do not fit, or when drafts are asked of a decoder without such a head.
    """
    _check(decoder, memory, memory_mask, options)
    with torch.inference_mode():
        if not memory.shape[0]:
            result = _nothing(decoder, options)
        elif options.in_lockstep:
            limit = options.max_length + (options.gamma + 1 if options.method == "speculative" else 0)
            projected = decoder.project_memory(memory, memory_mask)
            # utterances that leave take their keys and values along
            held = replace(projected, keys=list(projected.keys), values=list(projected.values))
            result = _run(decoder, new_state(decoder, held, options, limit), options, limit)
            if options.return_alignment:
                result = _aligned(decoder, result, options, projected)
        else:
            result = serve(None, decoder, memory[memory_mask].split(memory_mask.sum(dim=-1).tolist()), options)
        result = spread(result, memory_mask)
    # tensors of inference mode could not be written to by the caller
    return result.clone()


def serve(
    encoder: Encoder | None, decoder: Decoder, sources: Sequence[Tensor], options: DecodingOptions
) -> DecodingResult:
    """Returns the hypotheses of sources in order, on the decoder's device, by an engine made for them.

    sources: at least one, each ids `[n]` or a memory `[n, dim]`; see `Engine.submit`. One that is done leaves at once.
    """
    plan = Plan.for_all(
        decoder,
        len(sources),
        beams=options.hypotheses,
        max_length=options.max_length,
        max_source=max(1, *map(len, sources)),
        guided=options.guided,
    )
    with Engine(encoder, decoder, plan, guided=options.guided) as engine:
        tickets = [engine.submit(source, options) for source in sources]
        results = [ticket.result() for ticket in tickets]
    return joined(results, decoder.pad_id).to(decoder.device)


def spread(result: DecodingResult, mask: Tensor) -> DecodingResult:
    """Returns the result with its alignment over the positions of a mask `[batch, length]`, holes and all."""
    if result.alignment is None:
        return result
    wide = result.alignment.new_zeros(*result.alignment.shape[:3], mask.shape[1])
    for row, (narrow, own) in enumerate(zip(result.alignment, mask, strict=True)):
        wide[row][..., own] = narrow[..., : int(own.sum())]
    return replace(result, alignment=wide)


def _aligned(
    decoder: Decoder, result: DecodingResult, options: DecodingOptions, memory: ProjectedMemory
) -> DecodingResult:
    rows = []
    for row, length in enumerate(memory.lengths.tolist()):
        keys, values = ([each[row : row + 1] for each in layers] for layers in (memory.keys, memory.values))
        own = result.take(torch.tensor([row], device=decoder.device))
        rows.append(aligned(decoder, own, options, keys, values, length))
    return joined(rows, decoder.pad_id)


def _run(decoder: Decoder, state: DecodeState, options: DecodingOptions, limit: int) -> DecodingResult:
    """Makes steps, or speculative rounds, until all utterances are done; those that are leave once they are half."""
    select = None if options.method == "speculative" else select_reference_beam
    stride = options.gamma + 1 if select is None else 1
    # the reference's search stops its rows together, so that none may leave
    may_leave = not (options.method == "beam" and options.beam_mode == "reference")
    places = torch.arange(state.batch, device=decoder.device)
    parts: list[tuple[Tensor, DecodingResult]] = []
    most, next_look = 0, 0
    for made in range(1, options.max_length + 1):
        state.reserve(min(most, options.max_length) + stride, limit)
        if select is None:
            speculate(decoder, state, options)
        else:
            select(decoder, state, step(decoder, state, options.cond_scale), options)
        most += stride
        if made < next_look:
            continue
        next_look = made + interval(decoder.device, made)
        stop, most, done = torch.stack((state.stop, state.generated.max(), state.done.sum())).tolist()
        if stop >= 0:
            break
        if may_leave and 2 * done >= state.batch:
            parts.append((places[state.done], gather_result(decoder, state, options).take(state.done)))
            rows = (~state.done).nonzero()[:, 0]
            state.keep(rows)
            places = places[rows]
    parts.append((places, gather_result(decoder, state, options)))
    return join_results(parts, decoder.pad_id)


def _nothing(decoder: Decoder, options: DecodingOptions) -> DecodingResult:
    shape, device = (0, options.num_return_sequences), decoder.device
    whole, real = (torch.zeros(shape, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32))
    alignment = real[..., None, None][..., :0, :0] if options.return_alignment else None
    return DecodingResult(
        whole[..., None][..., :0], whole, whole.bool(), real, real, real[..., None][..., :0], alignment
    )


def _check(decoder: Decoder, memory: Tensor, mask: Tensor, options: DecodingOptions) -> None:
    if memory.ndim != 3 or memory.shape[-1] != decoder.dim or not memory.is_floating_point():
        raise ValueError(
            f"memory must be floating-point [batch, length, {decoder.dim}], got {memory.dtype} {list(memory.shape)}."
        )
    if mask.dtype != torch.bool or mask.shape != memory.shape[:2]:
        raise ValueError(
            f"memory_mask must be bool {list(memory.shape[:2])}, as memory has positions, "
            f"got {mask.dtype} {list(mask.shape)}."
        )
    for name, tensor in (("memory", memory), ("memory_mask", mask)):
        if tensor.device != decoder.device:
            raise ValueError(
                f"{name} must be on the decoder's device {decoder.device}, got {tensor.device}; move it there."
            )
    if options.method == "speculative" and decoder.early_exit is None:
        raise ValueError(
            "speculative decoding drafts with an early-exit head, and this model has none; build and train it with "
            "target_early_exit_layer, or use another method."
        )
