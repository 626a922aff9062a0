"""Text to semantic speech tokens, the other direction: what a vocoder or an acoustic model takes from here.

    python examples/text_to_speech_tokens.py [TEXT]

The committed model has been trained from speech to text alone: its tokens have the right form and no meaning. Train
`TextToSemanticTrainer` on labelled speech for tokens that can be heard.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from spear_fast import load_model

MODEL = Path(__file__).resolve().parent / "espeak" / "model"


def main(text: str = "the old farmer opens the door") -> None:
    model = load_model(MODEL)
    # speech has many ways to say a sentence: it is drawn, not searched
    tokens = model.generate(
        [text],
        source_type="text",
        target_type="speech",
        top_p=0.9,
        temperature=0.8,
        max_length=60,
        generator=torch.Generator().manual_seed(0),
        return_result=True,
    )
    ids = tokens.tokens[0, 0, : tokens.lengths[0, 0]]
    print(f"{len(ids)} tokens, {'ended by itself' if tokens.finished[0, 0] else 'cut at max_length'}")
    print(*ids.tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
