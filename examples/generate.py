"""Speech tokens to text in three ways: greedy, beam search with its runners-up, and draws.

python examples/generate.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from spear_fast import load_model
from spear_fast.speech import read_audio

HERE = Path(__file__).resolve().parent / "espeak"


def main() -> None:
    model = load_model(HERE / "model")
    # the model's own speech tokenizer: 16 kHz audio to ids of clusters
    sound = read_audio(HERE / "recordings" / "known-0000.flac", 16000).samples
    speech = torch.from_numpy(model.wav2vec.encode(sound))[None]
    shared = dict(source_type="speech", target_type="text", max_length=200)

    # the likeliest token at every step
    greedy = model.generate(speech, temperature=0.0, **shared)
    print("greedy", model.tokenizer.decode(greedy[0].tolist()))

    # "standard" keeps a pool of finished hypotheses; "reference", the default, is the search of spear-tts-pytorch
    best = model.generate(
        speech,
        beam_search_decode=True,
        beam_size=4,
        beam_mode="standard",
        num_return_sequences=3,
        return_result=True,
        **shared,
    )
    for tokens, score in zip(best.tokens[0], best.scores[0], strict=True):
        print(f"beam   {model.tokenizer.decode(tokens.tolist())}  ({score:.3f})")

    # a generator makes the draws repeatable
    drawn = model.generate(speech, top_k=5, generator=torch.Generator().manual_seed(1), **shared)
    print("drawn ", model.tokenizer.decode(drawn[0].tolist()))


if __name__ == "__main__":
    main()
