"""The paper's recipe in miniature: speak, tokenize, pretrain, fine-tune, score, report.

    python examples/espeak/recipe.py [--work build/espeak]

Each stage leaves a file in the working folder and is skipped when that is there, so an interrupted run resumes. At the
end the model is in `model/` of the working folder, 20 recordings beside it, and REPORT.md says what was reached;
`--install` copies all three over the committed ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
import score
import torch
import train
from report import write_report
from speak import TRAINING_VOICES, UNSEEN_VOICE, check_espeak
from text import train_tokenizer

from spear_fast import TextToSemantic
from spear_fast.speech import MelKMeansTokenizer

HERE = Path(__file__).resolve().parent
SEED = 0
PRETRAIN_STEPS = 1500
FINETUNE_STEPS = 4000
FEW_LABELS_STEPS = 500
NUM_KNOWN_RECORDINGS, NUM_UNSEEN_RECORDINGS = 13, 7


class Recipe:
    def __init__(self, work: Path) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.figures: dict[str, Any] = {"seconds": {}, "error_rates": {}}
        if (work / "figures.json").is_file():
            self.figures = json.loads((work / "figures.json").read_text(encoding="utf-8"))

    def prepare(self) -> None:
        if not (self.work / "data.jsonl").is_file():
            check_espeak()
            print("speaking and tokenizing", flush=True)
            started = time.perf_counter()
            data.prepare(self.work)
            self._took("speak and tokenize", time.perf_counter() - started)
        self.data = data.load(self.work)
        self.speech = MelKMeansTokenizer.load(self.work / "tokenizer")
        self.text = train_tokenizer(example.utterance.text for example in self.data.training)
        self.labelled = self.data.labelled()
        texts = [example.utterance.text for example in self.data.training]
        self.figures["data"] = {
            "hours": sum(example.seconds for example in self.data.training) / 3600,
            "utterances": len(texts),
            "sentences": len(set(texts)),
            "test_sentences": len(self.data.known),
            "words": len(set(" ".join(texts).split())),
            "training_voices": list(TRAINING_VOICES),
            "unseen_voice": UNSEEN_VOICE,
            "tokens_per_second": self.speech.tokens_per_second,
            "codebook_size": self.speech.codebook_size,
            "labelled_minutes": sum(example.seconds for example in self.labelled) / 60,
            "labelled_utterances": len(self.labelled),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        }
        self._save_figures()

    def models(self) -> dict[str, TextToSemantic]:
        """Returns the trained models by name, training those that are not there yet."""
        pretrained = self._trained(
            "pretrained", None, lambda model: train.pretrain(model, self.data.training, PRETRAIN_STEPS, SEED)
        )

        def finetuned(
            name: str, start: TextToSemantic | None, examples: list[data.Example], steps: int
        ) -> TextToSemantic:
            return self._trained(
                name, start, lambda model: train.finetune(model, examples, self.text, steps, SEED, name)
            )

        return {
            "all labels, pretrained": finetuned("all-labels", pretrained, self.data.training, FINETUNE_STEPS),
            "few labels, from scratch": finetuned("few-labels-scratch", None, self.labelled, FEW_LABELS_STEPS),
            "few labels, pretrained": finetuned("few-labels-pretrained", pretrained, self.labelled, FEW_LABELS_STEPS),
        }

    def _trained(
        self, name: str, start: TextToSemantic | None, fit: Callable[[TextToSemantic], float]
    ) -> TextToSemantic:
        model = train.new_model(self.text.get_vocab_size(), self.speech, SEED)
        path = self.work / f"{name}.pt"
        if path.is_file():
            model.load(path)
        else:
            print(f"training {name}", flush=True)
            if start is not None:
                model.load_state_dict(start.state_dict())
            self._took(name, fit(model))
            torch.save({"model": model.state_dict()}, path)
        model.attach_tokenizer(self.text)
        return model.eval()

    def score(self, models: dict[str, TextToSemantic]) -> None:
        """Scores the models as they are stored: with weights of float16's precision."""
        for name, model in models.items():
            if name in self.figures["error_rates"]:
                continue
            print(f"scoring {name}", flush=True)
            for parameter in model.parameters():
                parameter.data = parameter.data.half().float()
            started = time.perf_counter()
            parts = {"known": self.data.known, "unseen": self.data.unseen}
            self.figures["error_rates"][name] = {
                part: score.error_rates(model, examples) for part, examples in parts.items()
            }
            self._took(f"score {name}", time.perf_counter() - started)

    def export(self, model: TextToSemantic) -> None:
        """Writes the model folder, its weights in float16, and the recordings of the demo."""
        self.figures["data"]["parameters"] = sum(p.numel() for p in model.parameters())
        self._save_figures()
        # not model.half(): the speech tokenizer's centres stay as they were fitted
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
        model.save_pretrained(self.work / "model")
        folder = self.work / "demo"
        folder.mkdir(exist_ok=True)
        # the first of each known voice; the unseen one says other sentences
        firsts = {example.utterance.voice: example for example in reversed(self.data.known)}.values()
        chosen = sorted(firsts, key=lambda example: example.utterance.id)[:NUM_KNOWN_RECORDINGS]
        chosen += self.data.unseen[-NUM_UNSEEN_RECORDINGS:]
        with (folder / "truth.jsonl").open("w", encoding="utf-8") as truth:
            for example in chosen:
                name = f"{example.utterance.id}.flac"
                shutil.copyfile(self.work / "recordings" / name, folder / name)
                said = example.utterance
                row = {"id": said.id, "audio": name, "text": said.text, "voice": said.voice}
                truth.write(json.dumps(row | {"seen": said.voice != UNSEEN_VOICE}) + "\n")
        write_report(self.figures, self.work / "REPORT.md")

    def install(self) -> None:
        """Copies model, recordings and report over the committed ones."""
        for source, target in (("model", "model"), ("demo", "recordings")):
            shutil.rmtree(HERE / target, ignore_errors=True)
            shutil.copytree(self.work / source, HERE / target)
        for name in ("REPORT.md", "figures.json"):
            shutil.copyfile(self.work / name, HERE / name)

    def _took(self, stage: str, seconds: float) -> None:
        self.figures["seconds"][stage] = round(seconds, 1)
        self._save_figures()

    def _save_figures(self) -> None:
        text = json.dumps(self.figures, indent=2) + "\n"
        (self.work / "figures.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "build" / "espeak", help="working folder")
    parser.add_argument("--install", action="store_true", help="copy the result over the committed model and report")
    arguments = parser.parse_args()
    recipe = Recipe(arguments.work)
    try:
        recipe.prepare()
    except RuntimeError as error:
        parser.exit(2, f"recipe: {error}\n")
    models = recipe.models()
    recipe.score(models)
    recipe.export(models["all labels, pretrained"])
    if arguments.install:
        recipe.install()
    print((arguments.work / "REPORT.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
