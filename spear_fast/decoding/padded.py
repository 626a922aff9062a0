"""Padded batches, as `generate` and `decode` take them, decoded by an engine that is made for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spear_fast.decoding.config import EngineConfig
from spear_fast.decoding.engine import Engine
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.packed.decoder import Decoder
from spear_fast.decoding.packed.encoder import Encoder
from spear_fast.decoding.request import StopGroup
from spear_fast.decoding.result import DecodingResult, join_results
from spear_fast.ops.selection_params import SelectionMethod

# share of a GPU's memory that the buffers of an engine may take which waits for the next call
KEPT_SHARE = 0.1


def decode(decoder: Decoder, memory: Tensor, memory_mask: Tensor, options: DecodingOptions) -> DecodingResult:
    """Returns the hypotheses of each row of an encoded source.

    memory: `[batch, length, dim]`. memory_mask: `[batch, length]` bool, False where a position must not be read; it may
    have holes, and a row without any readable position is decoded from the null key alone.

    Raises ValueError when shapes or devices do not fit, or when drafts are asked of a decoder without such a head.
    """
    _check(decoder, memory, memory_mask)
    sources = memory[memory_mask].split(memory_mask.sum(dim=-1).tolist())
    return _decode_sources(None, decoder, sources, memory_mask, options)


def decode_ids(
    encoder: Encoder | None,
    decoder: Decoder,
    ids: Tensor,
    mask: Tensor,
    options: DecodingOptions,
    *,
    encode: Callable[[Tensor, Tensor], Tensor],
) -> DecodingResult:
    """Returns the hypotheses of each row of a padded batch.

    ids: `[batch, length]` int64, in the vocabulary, outside the mask too; at least one row.
    mask: `[batch, length]` bool.
    encode: from ids and mask of some rows to their memory `[rows, length, dim]`; asked for rows whose mask has holes,
    where positions count on over what is not read, as the packed encoder cannot; without an encoder for all.
    """
    lengths = mask.sum(dim=-1)
    packable = torch.zeros_like(lengths, dtype=torch.bool)
    if encoder is not None:
        is_prefix = mask == (torch.arange(mask.shape[1], device=mask.device) < lengths[:, None])
        packable = is_prefix.all(dim=-1) & (lengths > 0)
    counts, packed = torch.stack((lengths, packable.long())).tolist()
    sources: list[Tensor] = [row[:count] for row, count in zip(ids.cpu(), counts, strict=True)]
    others = [row for row, is_packed in enumerate(packed) if not is_packed]
    if others:
        memories = encode(ids[others], mask[others])
        for row, memory in zip(others, memories, strict=True):
            sources[row] = memory[mask[row]].to(decoder.dtype)
    return _decode_sources(encoder, decoder, sources, mask, options)


def _decode_sources(
    encoder: Encoder | None, decoder: Decoder, sources: Sequence[Tensor], mask: Tensor, options: DecodingOptions
) -> DecodingResult:
    """Returns the hypotheses of sources in order, on the decoder's device; see `Engine.submit` for what they are.

    mask: `[batch, length]` bool, the positions of a row that its source has; alignments are spread over them.
    """
    with torch.inference_mode():
        result = _served(encoder, decoder, sources, options) if sources else _nothing(decoder, options)
        result = _spread(result, mask)
    # tensors of inference mode could not be written to by the caller
    return result.clone()


def _served(
    encoder: Encoder | None, decoder: Decoder, sources: Sequence[Tensor], options: DecodingOptions
) -> DecodingResult:
    config = EngineConfig.for_batch(
        decoder,
        len(sources),
        beams=options.hypotheses,
        max_length=options.max_length,
        max_source=max(1, *map(len, sources)),
        guided=options.guided,
    )
    # the rows of the reference's search stop together
    group = StopGroup(len(sources)) if options.kind == SelectionMethod.REFERENCE else None
    engine = _idle_engine(encoder, decoder, config, options.guided)
    try:
        requests = [engine.submit(source, options, stop_group=group) for source in sources]
        results = [request.result() for request in requests]
    except BaseException:
        engine.close()
        raise
    if keeps_engine(decoder, engine.config):
        engine, decoder.idle_engine = decoder.idle_engine, engine
    if engine is not None:
        engine.close()
    return join_results(results, decoder.pad_id).to(decoder.device)


def keeps_engine(decoder: Decoder, config: EngineConfig) -> bool:
    """Returns whether an engine is worth keeping for the next call: on CUDA, where its steps are captured, if small."""
    device = decoder.device
    if device.type != "cuda":
        return False
    return config.bytes <= KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory


def _idle_engine(encoder: Encoder | None, decoder: Decoder, config: EngineConfig, guided: bool) -> Engine:
    """Returns the engine that the last call has left, where it fits, or a new one."""
    # whoever takes it has it alone
    engine, decoder.idle_engine = decoder.idle_engine, None
    if engine is not None:
        if engine.fits(encoder, config, guided):
            return engine
        engine.close()
    return Engine(encoder, decoder, config, guided=guided)


def _spread(result: DecodingResult, mask: Tensor) -> DecodingResult:
    """Returns the result with its alignment over the positions of a mask `[batch, length]`, holes and all."""
    if result.alignment is None:
        return result
    wide = result.alignment.new_zeros(*result.alignment.shape[:3], mask.shape[1])
    for row, (narrow, own) in enumerate(zip(result.alignment, mask, strict=True)):
        wide[row][..., own] = narrow[..., : int(own.sum())]
    return replace(result, alignment=wide)


def _nothing(decoder: Decoder, options: DecodingOptions) -> DecodingResult:
    shape, device = (0, options.num_return_sequences), decoder.device
    whole, real = (torch.zeros(shape, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32))
    alignment = real[..., None, None][..., :0, :0] if options.return_alignment else None
    return DecodingResult(
        whole[..., None][..., :0], whole, whole.bool(), real, real, real[..., None][..., :0], alignment
    )


def _check(decoder: Decoder, memory: Tensor, mask: Tensor) -> None:
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
