"""What a labelling job may be told, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from spear_fast.decoding import DecodingOptions, KvDtype
from spear_fast.labelling.errors import LabellingError

# by kind of device: source tokens that are worked on together (on a CPU 32 utterances: more gain little), and rows of a
# shard
DEFAULT_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
DEFAULT_ROWS_PER_SHARD = {"cpu": 512, "cuda": 4096}


# of any size: beyond it 32-bit numbers end
LARGEST = 2**31 - 1
# how a label is searched for: what else `DecodingOptions` knows is not for labelling
DECODING = DecodingOptions(method="beam", beam_size=4, beam_mode="standard", max_length=512)
FIXED = ("method", "beam_mode", "num_return_sequences", "cond_scale", "return_alignment", "filter_logits", "generator")
# these stand in a job's identity as they always did, the others where they are not the default
ALWAYS_NAMED = (
    *("beam_size", "length_penalty", "early_stopping", "repetition_penalty", "no_repeat_ngram_size"),
    *("coverage_penalty", "max_length"),
)


@dataclass(frozen=True, init=False)
class LabelOptions:
    """The options that may change a label: all of them are part of a job's fingerprint.

    decoding: of the standard beam search. Its fields may be given as keywords instead, `LabelOptions(beam_size=8)`.
        A label that hits `max_length`, its end included, is flagged "truncated".
    max_source_tokens: a longer source is a failed row.
    batch_tokens: source tokens that are worked on together, taken as 256 an utterance: 8192 are 32 utterances, each of
        which leaves its slot to the next one as soon as it is done.
    dtype: of weights and activations; "int8" is float32 with the weights' matmuls made of 8 bits, on x86 CPUs.
    kv_dtype: of cross-attention's keys and values; "fp8" holds them in 8 bits, see `TextToSemantic.engine`.
    num_shards: files to write; by default one for every `rows_per_shard` rows.

    Raises LabellingError.
    """

    decoding: DecodingOptions
    max_source_tokens: int
    batch_tokens: int
    num_shards: int | None
    rows_per_shard: int
    device: str
    dtype: Literal["float32", "bfloat16", "float16", "int8"]
    kv_dtype: KvDtype

    def __init__(
        self,
        decoding: DecodingOptions = DECODING,
        *,
        max_source_tokens: int = 4096,
        batch_tokens: int = 8192,
        num_shards: int | None = None,
        rows_per_shard: int = 512,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32",
        kv_dtype: KvDtype = "exact",
        **decoding_fields: Any,
    ) -> None:
        values = dict(max_source_tokens=max_source_tokens, batch_tokens=batch_tokens, num_shards=num_shards)
        values |= dict(rows_per_shard=rows_per_shard)
        for name, value in values.items():
            if name == "num_shards" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
                raise LabellingError(f"{name} must be a whole number from 1 to {LARGEST}, got {value!r}.")
        if dtype not in ("float32", "bfloat16", "float16", "int8"):
            raise LabellingError(f"dtype must be float32, bfloat16, float16 or int8, got {dtype!r}.")
        if kv_dtype not in get_args(KvDtype):
            raise LabellingError(f"kv_dtype must be {' or '.join(get_args(KvDtype))}, got {kv_dtype!r}.")
        try:
            decoding = replace(decoding, **decoding_fields)
        except ValueError as error:
            raise LabellingError(str(error)) from error
        for name in FIXED:
            if getattr(decoding, name) != getattr(DECODING, name):
                raise LabellingError(
                    f"{name} must be {getattr(DECODING, name)!r} for labelling, got {getattr(decoding, name)!r}."
                )
        fields_of_job: dict[str, Any] = {**values, "decoding": decoding, "device": device, "dtype": dtype}
        fields_of_job["kv_dtype"] = kv_dtype
        for name, field_value in fields_of_job.items():
            object.__setattr__(self, name, field_value)

    def identity(self) -> dict[str, Any]:
        """Returns the options as they go into the fingerprint: of the device its kind only."""
        found = {name: getattr(self.decoding, name) for name in ALWAYS_NAMED}
        for each in fields(DECODING):
            if getattr(self.decoding, each.name) != getattr(DECODING, each.name):
                found[each.name] = getattr(self.decoding, each.name)
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "decoding"}
        if self.kv_dtype == "exact":
            # as in jobs from before there was another
            del own["kv_dtype"]
        return {**found, **own, "device": self.device.partition(":")[0]}
