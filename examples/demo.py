"""Labels the recordings beside it with the model beside it, as `spear-fast label` does, and compares with the truth.

    python examples/demo.py [--recordings FOLDER] [--model FOLDER]

Any other recording that is put into the folder is labelled too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import jiwer

from spear_fast.cli import main as spear_fast
from spear_fast.labelling import read_labels

HERE = Path(__file__).resolve().parent / "espeak"


def truths(recordings: Path) -> dict[str, dict[str, str | bool]]:
    """Returns the rows of `truth.jsonl` by file name without suffix; none where there is no such file."""
    path = recordings / "truth.jsonl"
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {Path(row["audio"]).stem: row for row in rows}


def shown(path: Path) -> str:
    """Returns the path as seen from the working folder, where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def error_rate(pairs: list[tuple[str, str]]) -> str:
    """Returns the character error rate of (truth, label) pairs, in words."""
    if not pairs:
        return "no recordings"
    truth, labels = zip(*pairs, strict=True)
    return f"{jiwer.cer(list(truth), list(labels)):.1%} of characters wrong in {len(pairs)} recordings"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, default=HERE / "recordings", help="folder of audio files")
    parser.add_argument("--model", type=Path, default=HERE / "model", help="model folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        print("Labelling recordings with a SPEAR-TTS model, from their sound alone, as this command does:")
        print(
            f"  spear-fast label {shown(arguments.recordings)} --model {shown(arguments.model)} --out ...\n", flush=True
        )
        status = spear_fast(["label", str(arguments.recordings), "--model", str(arguments.model), "--out", out])
        if status not in (0, 3):
            return status
        labels = {row.id: row for row in read_labels(out)}
    known = truths(arguments.recordings)
    pairs: dict[str, list[tuple[str, str]]] = {"known voices": [], "unseen voice": []}
    print()
    for name, row in sorted(labels.items()):
        truth = known.get(Path(name).stem)
        label = row.text or ""
        confidence = math.exp(row.mean_logprob) if row.mean_logprob is not None else 0.0
        print(f"{name}  ({truth['voice'] if truth else 'voice unknown'}, confidence {confidence:.2f})")
        print(f"  label  {label}")
        print(f"  truth  {truth['text'] if truth else '–'}")
        if truth:
            pairs["known voices" if truth["seen"] else "unseen voice"].append((str(truth["text"]), label))
    print()
    for voices, compared in {**pairs, "all": [pair for some in pairs.values() for pair in some]}.items():
        print(f"{voices:>12}: {error_rate(compared)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
