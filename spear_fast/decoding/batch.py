"""A padded batch of ids to its hypotheses: encoded without its padding, by weights that are packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from spear_fast.decoding.decoder import Decoder
from spear_fast.decoding.encoder import Encoder, tokens_together
from spear_fast.decoding.loop import decode, serve, spread
from spear_fast.decoding.options import DecodingOptions
from spear_fast.decoding.refusal import is_memory
from spear_fast.decoding.result import DecodingResult


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
    if options.in_lockstep:
        return decode(decoder, _padded(encoder, sources, mask), mask, options)
    with torch.inference_mode():
        result = spread(serve(encoder, decoder, sources, options), mask)
    # tensors of inference mode could not be written to by the caller
    return result.clone()


@torch.inference_mode()
def _padded(encoder: Encoder | None, sources: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Returns the memory `[batch, length, dim]` of rows that are ids, or encoded already."""
    parts, lengths = list(sources), [len(source) for source in sources]
    if encoder is not None:
        raw = [row for row, source in enumerate(sources) if not is_memory(source)]
        for rows in _groups(raw, lengths, tokens_together(mask.device)):
            for row, part in zip(rows, encoder.encoded([sources[row] for row in rows]), strict=True):
                parts[row] = part
    packed = torch.cat(parts)
    memory = packed.new_zeros(*mask.shape, packed.shape[-1])
    memory[mask] = packed
    return memory


def _groups(rows: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yields the rows in groups of up to `most` ids, or of one row."""
    group: list[int] = []
    tokens = 0
    for row in rows:
        if group and tokens + lengths[row] > most:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += lengths[row]
    if group:
        yield group
