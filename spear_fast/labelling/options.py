"""What a labelling job may be told, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from spear_fast.decoding import DecodingOptions
from spear_fast.labelling.errors import LabellingError

# by kind of device: source tokens that are worked on together (on a CPU 32 utterances: more gain little), and rows of a
# shard
DEFAULT_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
DEFAULT_ROWS_PER_SHARD = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """The options that may change a label: all of them are part of a job's fingerprint.

    beam_size, length_penalty, early_stopping: of the standard beam search; see `DecodingOptions`.
    repetition_penalty, no_repeat_ngram_size, coverage_penalty: the same; against loops and against skipped speech.
    max_length: tokens of a label, its end included; a label that hits it is flagged "truncated".
    max_source_tokens: a longer source is a failed row.
    batch_tokens: source tokens that are worked on together, taken as 256 an utterance: 8192 are 32 utterances, each of
        which leaves its place to the next one as soon as it is done.
    dtype: of weights and activations; "int8" is float32 with the weights' products made of 8 bits, on x86 CPUs.
    num_shards: files to write; by default one for every `rows_per_shard` rows.
    """

    beam_size: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    coverage_penalty: float = 0.0
    max_length: int = 512
    max_source_tokens: int = 4096
    batch_tokens: int = 8192
    num_shards: int | None = None
    rows_per_shard: int = 512
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"

    def __post_init__(self) -> None:
        for name in ("beam_size", "max_length", "max_source_tokens", "batch_tokens", "rows_per_shard", "num_shards"):
            value = getattr(self, name)
            if name == "num_shards" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LabellingError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if self.early_stopping not in (True, False, "never"):
            raise LabellingError(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}.")
        if self.dtype not in ("float32", "bfloat16", "float16", "int8"):
            raise LabellingError(f"dtype must be float32, bfloat16, float16 or int8, got {self.dtype!r}.")
        try:
            self.decoding()
        except ValueError as error:
            raise LabellingError(str(error)) from error

    def decoding(self) -> DecodingOptions:
        """Returns how each utterance is decoded."""
        return DecodingOptions(
            method="beam",
            beam_size=self.beam_size,
            beam_mode="standard",
            max_length=self.max_length,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            coverage_penalty=self.coverage_penalty,
        )

    def identity(self) -> dict[str, Any]:
        """Returns the options as they go into the fingerprint: of the device its kind only."""
        return {**asdict(self), "device": self.device.partition(":")[0]}
