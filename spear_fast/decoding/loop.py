"""`decode`: from an encoded batch to its hypotheses."""

from __future__ import annotations

import torch
from torch import Tensor

from spear_fast.decoding.decoder import Decoder
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.result import DecodingResult, gather_result
from spear_fast.decoding.search import selection
from spear_fast.decoding.speculative import speculate
from spear_fast.decoding.state import DecodeState, new_state
from spear_fast.decoding.step import step

# steps between two looks at whether all is done, where a look makes the host wait: a sixteenth of those made, from 4 to 32
SHORTEST_INTERVAL, LONGEST_INTERVAL = 4, 32


def decode(decoder: Decoder, memory: Tensor, memory_mask: Tensor, options: DecodingOptions) -> DecodingResult:
    """Returns the hypotheses of each row of an encoded source.

    memory: `[batch, length, dim]`. memory_mask: `[batch, length]` bool, False where a position must not be read; it may have
    holes, and a row without any readable position is decoded from the null key alone.

    Raises ValueError when shapes or devices do not fit, or when drafts are asked of a decoder without an early-exit head.
    """
    _check(decoder, memory, memory_mask, options)
    with torch.inference_mode():
        if not memory.shape[0]:
            return _nothing(decoder, options).clone()
        projected = decoder.project_memory(memory, memory_mask)
        limit = options.max_length
        if options.method == "speculative":
            limit += options.gamma + 1
        state = new_state(decoder, projected, options, limit)
        if options.method == "speculative":
            _run_rounds(decoder, state, options, limit)
        else:
            _run_steps(decoder, state, options)
        result = gather_result(decoder, state, options)
    # tensors of inference mode could not be written to by the caller
    return result.clone()


def _run_steps(decoder: Decoder, state: DecodeState, options: DecodingOptions) -> None:
    select = selection(options)
    next_look = 0
    for made in range(1, options.max_length + 1):
        state.reserve(made, options.max_length)
        select(decoder, state, step(decoder, state, options.cond_scale), options)
        if made >= next_look:
            if int(state.stop) >= 0:
                return
            next_look = made + interval(state.stop.device, made)


def _run_rounds(decoder: Decoder, state: DecodeState, options: DecodingOptions, limit: int) -> None:
    most, next_look = 0, 0
    for made in range(1, options.max_length + 1):
        state.reserve(min(most, options.max_length) + options.gamma + 1, limit)
        speculate(decoder, state, options)
        most += options.gamma + 1
        if made >= next_look:
            stop, most = torch.stack((state.stop, state.generated.max())).tolist()
            if stop >= 0:
                return
            next_look = made + interval(state.stop.device, made)


def interval(device: torch.device, made: int) -> int:
    """Returns after how many more steps to look whether the batch is done; on the CPU a look costs nothing."""
    return 1 if device.type == "cpu" else min(max(SHORTEST_INTERVAL, made // 16), LONGEST_INTERVAL)


def _nothing(decoder: Decoder, options: DecodingOptions) -> DecodingResult:
    shape, device = (0, options.num_return_sequences), decoder.device
    whole, real = (torch.zeros(shape, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32))
    return DecodingResult(whole[..., None][..., :0], whole, whole.bool(), real, real, real[..., None][..., :0])


def _check(decoder: Decoder, memory: Tensor, mask: Tensor, options: DecodingOptions) -> None:
    if memory.ndim != 3 or memory.shape[-1] != decoder.dim or not memory.is_floating_point():
        raise ValueError(
            f"memory must be floating-point [batch, length, {decoder.dim}], got {memory.dtype} {list(memory.shape)}."
        )
    if mask.dtype != torch.bool or mask.shape != memory.shape[:2]:
        raise ValueError(
            f"memory_mask must be bool {list(memory.shape[:2])}, as memory has positions, got {mask.dtype} {list(mask.shape)}."
        )
    for name, tensor in (("memory", memory), ("memory_mask", mask)):
        if tensor.device != decoder.device:
            raise ValueError(f"{name} must be on the decoder's device {decoder.device}, got {tensor.device}; move it there.")
    if options.method == "speculative" and decoder.early_exit is None:
        raise ValueError(
            "speculative decoding drafts with an early-exit head, and this model has none; build and train it with "
            "target_early_exit_layer, or use another method."
        )
