"""What cross-attention's keys and values of 8 bits cost the committed model, on the recipe's 600 test sentences.

    python examples/espeak/kv_dtype.py [--model FOLDER] [--json FILE]

Speaks the test's sentences as the recipe does (`espeak-ng`), labels them by the engine with `kv_dtype` "exact" and
"fp8", and prints both error rates and how many labels are equal. Ends with status 1 where the gate is missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from data import planned
from speak import Utterance, check_espeak, speak

from spear_fast import DecodingOptions, TextToSemantic, load_model
from spear_fast.speech import MelKMeansTokenizer

HERE = Path(__file__).resolve().parent
# the character error rate may move by so much, and so many labels must be equal
MOST_MOVED, FEWEST_EQUAL = 0.001, 0.99
OPTIONS = DecodingOptions(method="beam", beam_size=4, max_length=100)


def features(utterance: Utterance) -> Any:
    """Returns what the recipe tokenizes of an utterance."""
    return MelKMeansTokenizer(torch.zeros(1, 26)).features_of(speak(utterance)).astype(np.float16)


def labels(model: TextToSemantic, sources: list[torch.Tensor], kv_dtype: str) -> list[str]:
    """Returns the text of each source `[n]` int64, batch-invariant, as `spear-fast label` decodes."""
    longest = max(map(len, sources))
    with model.engine(
        slots=32, beams=4, max_length=100, max_source=longest, deterministic=True, kv_dtype=kv_dtype
    ) as engine:
        done = sorted(engine.run(sources, OPTIONS), key=lambda request: request.number)
    results = [request.result() for request in done]
    return [model.tokenizer.decode(each.tokens[0, 0, : each.lengths[0, 0]].tolist()) for each in results]


def compared(model: TextToSemantic, utterances: list[Utterance]) -> dict[str, float]:
    """Returns the character error rates of both, of all utterances, and the share of equal labels."""
    with multiprocessing.Pool() as pool:
        spoken = pool.map(features, utterances, chunksize=16)
    end = [model.eos_id["speech"]] if model.autoset_eos_id["speech"] else []
    sources = [torch.tensor([*model.wav2vec.quantise(each.astype(np.float32)).tolist(), *end]) for each in spoken]
    exact, rounded = (labels(model, sources, kv_dtype) for kv_dtype in ("exact", "fp8"))
    truth = [utterance.text for utterance in utterances]
    return {
        "sentences": len(truth),
        "cer_exact": float(jiwer.cer(truth, exact)),
        "cer_fp8": float(jiwer.cer(truth, rounded)),
        "equal": float(np.mean(np.array(exact) == rounded)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model", help="model folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    try:
        check_espeak()
    except RuntimeError as error:
        parser.exit(2, f"kv_dtype: {error}\n")
    parts = planned()
    found = compared(load_model(arguments.model), [*parts["known"], *parts["unseen"]])
    reached = abs(found["cer_fp8"] - found["cer_exact"]) < MOST_MOVED and found["equal"] >= FEWEST_EQUAL
    if arguments.json:
        arguments.json.write_text(json.dumps({**found, "reached": reached}) + "\n", encoding="utf-8")
    print(
        f"{found['sentences']} sentences: CER {found['cer_exact']:.3%} with exact keys and values, "
        f"{found['cer_fp8']:.3%} with fp8; {found['equal']:.2%} of labels equal; "
        f"{'reached' if reached else 'MISSED'}: moved by less than {MOST_MOVED:.1%}, at least {FEWEST_EQUAL:.0%} equal"
    )
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
