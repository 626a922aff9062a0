"""What a job says, running and at its end: a bar on a terminal, plain lines elsewhere, JSON events for machines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

LINE_SECONDS = 10.0
PLAIN_COLUMNS = 120


class Reporter(Protocol):
    """Takes the events of a job.

    "start" (rows, done, shards, shards_done, fingerprint) · "prepared" (rows, failed, audio_seconds, seconds) · "batch"
    (rows, tokens, source_tokens, audio_seconds, seconds, restored): some more utterances have labels · "shard" (name,
    rows, failed) · "warning" (message) · "summary" (see `Summary`). "restored" ones were decoded by an earlier run.
    Of several devices also "process" (device, pid), and a `pid` in what each says; what a dead one had is taken back.
    """

    def __call__(self, event: str, **fields: Any) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Meter:
    """Rates of this run alone: rows that were labelled before do not count."""

    rows: int = 0
    tokens: int = 0
    label_seconds: float = 0.0
    label_audio: float = 0.0
    prepare_seconds: float = 0.0
    prepare_audio: float = 0.0
    began: float = 0.0

    def take(self, event: str, fields: dict[str, Any]) -> None:
        if event == "start":
            self.began = time.monotonic()
        if event == "prepared":
            self.prepare_seconds += fields["seconds"]
            self.prepare_audio += fields["audio_seconds"]
        if event == "batch" and not fields["restored"]:
            self.rows += fields["rows"]
            self.tokens += fields["tokens"]
            self.label_seconds += fields["seconds"]
            self.label_audio += fields["audio_seconds"]

    @property
    def tokens_per_second(self) -> float | None:
        """Generated text tokens per second of labelling."""
        return self.tokens / self.label_seconds if self.label_seconds > 0 else None

    @property
    def labelling_speed(self) -> float | None:
        """Seconds of audio labelled per second; None when the length of the audio is not known."""
        return self.label_audio / self.label_seconds if self.label_audio > 0 and self.label_seconds > 0 else None

    @property
    def tokenizing_speed(self) -> float | None:
        """Seconds of audio read and tokenized per second."""
        return (
            self.prepare_audio / self.prepare_seconds if self.prepare_audio > 0 and self.prepare_seconds > 0 else None
        )

    def rates(self) -> str:
        """Returns the rates as a clause, without those that are not known."""
        parts = []
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.tokenizing_speed is not None:
            parts.append(f"tokenizing {self.tokenizing_speed:,.0f}x")
        if self.labelling_speed is not None:
            parts.append(f"labelling {self.labelling_speed:,.1f}x real time")
        return ", ".join(parts)


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


class Silent:
    """Says nothing."""

    def __call__(self, event: str, **fields: Any) -> None:
        return None

    def close(self) -> None:
        return None


class JsonEvents:
    """One JSON object a line and event, as it happens."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout

    def __call__(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self._stream, flush=True)

    def close(self) -> None:
        return None


class Lines:
    """A line every ten seconds, for logs."""

    def __init__(self, stream: IO[str] | None = None, every: float = LINE_SECONDS) -> None:
        self._stream = stream or sys.stderr
        self._every = every
        self._meter = Meter()
        self._total = self._done = self._done_before = 0
        self._last = -math.inf

    def __call__(self, event: str, **fields: Any) -> None:
        self._meter.take(event, fields)
        if event == "warning":
            self._say(f"warning: {fields['message']}")
        if event == "start":
            self._total, self._done = fields["rows"], fields["done"]
            self._done_before = self._done
            self._say(f"{self._done}/{self._total} utterances are done; shards in all: {fields['shards']}")
            self._last = time.monotonic()
        if event == "prepared":
            self._done += fields["failed"]
        if event == "batch":
            self._done += fields["rows"]
        if event in ("prepared", "batch") and time.monotonic() - self._last >= self._every:
            self._progress()

    def _progress(self) -> None:
        self._last = time.monotonic()
        parts = [f"{self._done}/{self._total} utterances", self._meter.rates(), self._left()]
        self._say(", ".join(part for part in parts if part))

    def _left(self) -> str:
        done = self._done - self._done_before
        if done <= 0:
            return ""
        seconds = (time.monotonic() - self._meter.began) / done * (self._total - self._done)
        return f"{clock(seconds)} left"

    def _say(self, text: str) -> None:
        print(f"spear-fast: {text}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._total:
            self._progress()


def _size(stream: IO[str]) -> dict[str, Any]:
    """Returns tqdm's arguments for a terminal's size: some say that it is 0, and tqdm would show nothing."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except OSError:
        columns = 0
    return {"dynamic_ncols": True} if columns else {"ncols": PLAIN_COLUMNS, "nrows": 2}


class Bar:
    """One bar on a terminal."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._meter = Meter()
        self._bar: Any = None

    def __call__(self, event: str, **fields: Any) -> None:
        from tqdm import tqdm

        self._meter.take(event, fields)
        if event == "start":
            self._bar = tqdm(
                total=fields["rows"],
                initial=fields["done"],
                unit="utt",
                desc="labelling",
                file=self._stream,
                **_size(self._stream),
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )
        if self._bar is None:
            return
        if event == "warning":
            self._bar.write(f"spear-fast: warning: {fields['message']}", file=self._stream)
        if event == "prepared":
            self._bar.set_postfix_str(self._meter.rates(), refresh=False)
            self._bar.update(fields["failed"])
        if event == "batch":
            self._bar.set_postfix_str(self._meter.rates(), refresh=False)
            self._bar.update(fields["rows"])

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def make_reporter(*, quiet: bool, as_json: bool) -> Reporter:
    """Returns what fits the options and standard error: silence, JSON events, a bar, or lines."""
    if as_json:
        return JsonEvents()
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()


def clock(seconds: float) -> str:
    """Returns a duration as 1:02:03 or 2:03."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
