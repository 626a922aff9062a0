"""The training loss of tokens, from the hidden states that predict them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from spear_fast import ops
from spear_fast.ids import IGNORED_LABEL
from spear_fast.layers import is_plain


def token_loss(hidden: Tensor, to_logits: nn.Module, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy in nats per label, []; over no label at all it is NaN, as torch's.

    The logits are never all held, unless `to_logits` is more than a matrix.

    hidden: `[..., dim]`, floating point. labels: `[...]`, int64, IGNORED_LABEL where none counts.
    """
    if not is_plain(to_logits) or to_logits.bias is not None:
        # classes are the second dimension
        return F.cross_entropy(to_logits(hidden).movedim(-1, 1), labels, ignore_index=IGNORED_LABEL)
    losses = ops.cross_entropy(hidden, to_logits.weight, labels, IGNORED_LABEL)
    return losses.sum() / (labels != IGNORED_LABEL).sum()
