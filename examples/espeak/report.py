"""The recipe's report, written from its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_report(figures: dict[str, Any], path: Path) -> None:
    """Writes the report as Markdown."""
    data, rates = figures["data"], figures["error_rates"]
    total = sum(figures["seconds"].values())
    lines = [
        "# What the recipe reached",
        "",
        "Written by `make recipe` (`examples/espeak/recipe.py`) from the figures of its last run, in `figures.json`.",
        "",
        f"* Training speech: {data['utterances']:,} utterances of {data['sentences']:,} sentences "
        f"({data['words']} different words), {data['hours']:.1f} hours, {len(set(data['training_voices']))} voices of "
        "espeak-ng at varied speeds and pitches.",
        f"* Test: {data['test_sentences']} sentences that are not in training, once by the known voices and once by "
        f"`{data['unseen_voice']}`, which no training saw.",
        f"* Speech tokens: {data['tokens_per_second']:.1f} a second, {data['codebook_size']} clusters. "
        f"Model: {data['parameters'] / 1e6:.1f} M parameters. Labels by beam search, 4 beams.",
        "",
        "| trained on | CER known voices | CER unseen | WER known | WER unseen | sentences right, known | unseen |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, parts in rates.items():
        cells = [f"{parts[part][rate]:.1%}" for rate in ("cer", "wer", "exact") for part in ("known", "unseen")]
        lines.append(f"| {_described(name, data)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "The aim with all labels was a CER of 2 % for known voices and 12 % for the unseen one.",
        "",
        "Pretraining is speech to speech on all training audio, without text, 60 % of the tokens deleted. CER: "
        "character error rate, WER: word error rate, both by jiwer over all test sentences, of the weights as stored "
        "(float16).",
        "",
        f"Training used {data['threads']} thread(s) of a machine with {data['cores']} cores.",
        "",
        "| stage | seconds |",
        "|---|---|",
        *(f"| {stage} | {seconds:,.0f} |" for stage, seconds in figures["seconds"].items()),
        f"| all | {total:,.0f} |",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _described(name: str, data: dict[str, Any]) -> str:
    few = f"{data['labelled_minutes']:.0f} minutes of labelled speech ({data['labelled_utterances']} utterances)"
    return name.replace("all labels", f"{data['hours']:.1f} hours of labelled speech").replace("few labels", few)
