"""Makes a live model of spear-tts-pytorch fast in place: the same weights, the same tokens, less time.

    python examples/accelerate_reference.py

It needs spear-tts-pytorch 0.4.8 and its dependencies, on a Python that they can be imported on (3.10 or older).
"""

from __future__ import annotations

import sys
import time

import torch

import spear_fast


def main() -> int:
    try:
        import spear_tts_pytorch
    except ImportError as error:
        print(f"this example needs spear-tts-pytorch 0.4.8, which cannot be imported here: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    reference = spear_tts_pytorch.TextToSemantic(
        dim=128, source_depth=2, target_depth=2, num_text_token_ids=64, num_semantic_token_ids=100
    ).eval()
    fast = spear_fast.accelerate(reference)
    # whatever asks for the reference's class takes it, and a training step of either moves both
    assert isinstance(fast, spear_tts_pytorch.TextToSemantic)
    assert fast.token_emb["text"].weight is reference.token_emb["text"].weight

    speech = torch.randint(0, 100, (4, 50))
    options = dict(source_type="speech", target_type="text", beam_search_decode=True, beam_size=4, max_length=32)
    found = {}
    for name, model in {"spear-tts-pytorch": reference, "spear_fast": fast}.items():
        began = time.perf_counter()
        with torch.no_grad():
            found[name] = model.generate(speech, **options)
        print(f"{name}: {time.perf_counter() - began:.2f} s")
    first, second = found.values()
    # rows that ended come back padded to the longest one
    longest = min(first.shape[-1], second.shape[-1])
    print("the same tokens:", torch.equal(first[..., :longest], second[..., :longest]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
