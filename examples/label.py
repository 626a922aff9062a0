"""Labels recordings from Python, as `spear-fast label` does, and reads the labels back.

    python examples/label.py [OUT]

Run it again with the same folder: it resumes, and finds nothing left to do.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import spear_fast
from spear_fast.labelling import read_labels

HERE = Path(__file__).resolve().parent / "espeak"


def main(out: str = "build/example-labels") -> None:
    model = spear_fast.load_model(HERE / "model")
    # every option is a part of the job: the same folder refuses others
    options = spear_fast.LabelOptions(beam_size=4, max_length=200)
    # audio, folders of it, manifests and token files are all sources
    summary = spear_fast.label(HERE / "recordings", model, out, options)
    print(f"{summary.rows} utterances, {summary.failed} failed")
    for row in read_labels(out):
        # the mean log-probability of a token is a fair measure of how sure the model is
        print(f"{row.id}  {math.exp(row.mean_logprob):.2f}  {row.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
