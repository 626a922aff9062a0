"""What a labelling job comes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Summary:
    """Totals over the whole folder, rates of this run; None where not known.

    hours: of audio. mean_confidence: mean over rows of exp(mean_logprob). tokens_per_second: generated text tokens.
    tokenizing_speed, labelling_speed: seconds of audio per second.
    """

    rows: int
    failed: int
    shards: int
    hours: float | None
    mean_confidence: float | None
    unfinished_share: float | None
    tokens_per_second: float | None
    tokenizing_speed: float | None
    labelling_speed: float | None
    rows_this_run: int
    seconds: float

    def text(self, out: Path) -> str:
        """Returns the closing words for people."""
        lines = [f"{self.rows} utterances labelled in {out}, {self.rows_this_run} of them in this run"]
        values = (
            ("audio", self.hours, "{:.2f} h"),
            ("tokens/s", self.tokens_per_second, "{:,.0f}"),
            ("tokenizing", self.tokenizing_speed, "{:,.0f} x real time"),
            ("labelling", self.labelling_speed, "{:,.1f} x real time"),
            ("mean confidence", self.mean_confidence, "{:.3f}"),
            ("unfinished", self.unfinished_share, "{:.1%}"),
        )
        lines += [f"  {name:<17} {form.format(value)}" for name, value, form in values if value is not None]
        if self.unfinished_share:
            lines.append("  raise --max-length (with another --out) to let more labels end")
        if self.failed:
            lines.append(f"  failed            {self.failed} (see {out / 'failed.jsonl'})")
        return "\n".join(lines)
