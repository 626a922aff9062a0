"""What the selection ops make of logits before they choose: the guidance mix, and the tokens that must not come."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spear_fast.ops.selection_params import FloatParam, IntParam

# pairs of tokens that are compared at once
COMPARED = 1 << 22


def column(params: Tensor, which: FloatParam | IntParam, dimensions: int = 3) -> Tensor:
    """Returns one column of the parameters, `[utterances, 1, …]` with that many dimensions."""
    return params[:, which].view(-1, *[1] * (dimensions - 1))


def mixed(logits: Tensor, null_logits: Tensor | None, float_params: Tensor) -> Tensor:
    """Returns `null + (logits - null) * guidance`, or the logits themselves at guidance 1, in the parameters' dtype."""
    logits = logits.to(float_params.dtype)
    if null_logits is None:
        return logits
    guidance, unconditional = column(float_params, FloatParam.GUIDANCE), null_logits.to(float_params.dtype)
    return torch.where(guidance == 1, logits, unconditional + (logits - unconditional) * guidance)


def own_history(tokens: Tensor, ancestors: Tensor, steps: Tensor) -> Tensor:
    """Returns the tokens of each hypothesis `[utterances, beams, steps]` int64, -1 after its last one.

    tokens: `[utterances, capacity, beams]`. ancestors: `[utterances, beams, capacity]`. steps: `[utterances, beams]`
    int64, tokens so far: the one of step i was the input of position i + 1, under whose beam index it stands.
    """
    utterances, capacity, beams = tokens.shape
    # what lies past the longest was never written; on a GPU asking for it would wait for the device
    longest = min(int(steps.max()), capacity) if steps.device.type == "cpu" else capacity
    step = torch.arange(longest, device=steps.device)
    own = torch.arange(beams, device=steps.device)[:, None].expand(utterances, beams, longest)
    sources = own.clone()
    if longest > 1:
        sources[:, :, :-1] = ancestors[:, :, 1:longest]
    # the last one was the input of this very step, whose beam index is the hypothesis' own
    sources = torch.where(step + 1 < steps[..., None], sources, own).clamp(max=beams - 1)
    history = tokens[:, :longest].transpose(1, 2).gather(1, sources).long()
    return history.masked_fill(step >= steps[..., None], -1)


def restricted(
    values: Tensor, history: Tensor, steps: Tensor, float_params: Tensor, int_params: Tensor, prefix: Tensor
) -> Tensor:
    """Returns values `[utterances, beams, vocabulary]` with penalties, and -inf where a token must not come next.

    history: `[utterances, beams, steps]`, see `own_history`. steps: `[utterances, beams]` int64.
    prefix: `[utterances, longest prefix]`, int32.
    """
    vocab = values.shape[-1]
    penalty = column(float_params, FloatParam.REPETITION_PENALTY)
    seen = _marked(history, torch.ones_like(history, dtype=torch.bool), vocab) & (penalty != 1)
    values = torch.where(seen, torch.where(values < 0, values * penalty, values / penalty), values)
    banned = _marked(history, _ends_repetition(history, steps, int_params), vocab)
    ids = torch.arange(vocab, device=values.device)
    early = steps[..., None] < column(int_params, IntParam.MIN_LENGTH)
    banned = banned | (early & (ids == column(int_params, IntParam.EOS_ID)))
    values = values.masked_fill(banned, -torch.inf)
    if not prefix.shape[1]:
        return values
    wanted = prefix.long().gather(1, steps.clamp(max=prefix.shape[1] - 1))[..., None]
    given = (steps[..., None] < column(int_params, IntParam.PREFIX_LENGTH)).expand_as(values)
    # the given token costs nothing: all hypotheses have it
    return torch.where(given, torch.where(ids == wanted, 0.0, -torch.inf).to(values.dtype), values)


def _marked(history: Tensor, holds: Tensor, vocab: int) -> Tensor:
    """Returns which tokens `[utterances, beams, vocab]` the history has at a step where `holds`."""
    inside = holds & (history >= 0) & (history < vocab)
    marked = torch.zeros(*history.shape[:2], vocab + 1, dtype=torch.bool, device=history.device)
    return marked.scatter(2, history.masked_fill(~inside, vocab), True)[..., :vocab]


def _ends_repetition(history: Tensor, steps: Tensor, int_params: Tensor) -> Tensor:
    """Returns at which steps `[utterances, beams, steps]` an n-gram ended that began as the one which ends next."""
    size = column(int_params, IntParam.NO_REPEAT_NGRAM_SIZE)
    longest = history.shape[-1]
    step = torch.arange(longest, device=history.device)
    holds = (size > 0) & (step >= size - 1) & (step < steps[..., None])
    # n-grams may be as long as the history; on a GPU asking how long they are would wait for the device
    most = int(size.max()) if size.device.type == "cpu" else longest
    width = max(1, COMPARED // max(1, history.numel()))
    for first in range(1, min(longest, most), width):
        end = min(first + width, longest, most)
        back = torch.arange(end - 1, first - 1, -1, device=history.device)
        last = history.gather(2, (steps[..., None] - back).clamp(0, longest - 1))
        # [utterances, beams, steps, backs]: the token so far before each step
        before = F.pad(history, (end - 1, 0), value=-1).unfold(2, end - first, 1)[:, :, :longest]
        same = (before == last[:, :, None]) | (back >= size[..., None])
        holds = holds & same.all(dim=-1)
    return holds
