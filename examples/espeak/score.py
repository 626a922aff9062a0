"""Labels test utterances and scores them: character and word error rates."""

from __future__ import annotations

from collections.abc import Sequence

import jiwer
import numpy as np
import torch
from data import Example

from spear_fast import DecodingOptions, TextToSemantic

BATCH = 50


def labels(model: TextToSemantic, examples: Sequence[Example], beam_size: int = 4) -> list[str]:
    """Returns the text of each example by beam search, as `spear-fast label` decodes."""
    options = DecodingOptions(method="beam", beam_size=beam_size, max_length=100)
    found = [""] * len(examples)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        rows = [torch.from_numpy(examples[index].tokens) for index in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.semantic_pad_id)
        with torch.no_grad():
            memory, mask, _ = model.encode(ids, source_type="speech")
            result = model.decode(memory, mask, target_type="text", options=options)
        for index, tokens, length in zip(
            chosen, result.tokens[:, 0].tolist(), result.lengths[:, 0].tolist(), strict=True
        ):
            found[index] = model.tokenizer.decode(tokens[:length])
    return found


def error_rates(model: TextToSemantic, examples: Sequence[Example]) -> dict[str, float]:
    """Returns CER and WER over all examples, as fractions."""
    truth = [example.utterance.text for example in examples]
    found = labels(model, examples)
    return {
        "cer": float(jiwer.cer(truth, found)),
        "wer": float(jiwer.wer(truth, found)),
        "exact": float(np.mean(np.array(truth) == found)),
    }
