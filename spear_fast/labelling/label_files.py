"""Files of labels: their columns, how they are written with a checksum and read back, and the card that explains them.

A file's footer holds a record: the job's fingerprint, which shard it is, totals, failed rows, and a digest of all bytes
before the footer.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear_fast.labelling.errors import LabellingError, reason_of
from spear_fast.labelling.labeller import FLAGS

METADATA_KEY = b"spear_fast"
# of the footer's length and the closing mark
TAIL_BYTES = 8
DATA_NAME = "data"
PATTERN = "labels-*.parquet"


def data_folder(out: Path) -> Path:
    """Returns where the shards of a folder of labels are: in `data`, or in the folder itself where it is an old one."""
    return out if any(out.glob(PATTERN)) else out / DATA_NAME


def label_paths(folder: str | Path) -> list[Path]:
    """Returns the shards of a folder of labels, old or new, in the order of their rows."""
    return sorted(data_folder(Path(folder)).glob(PATTERN))


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One labelled utterance as it is stored. source, target: `[n]`, integer, without pads and end-of-sequence."""

    id: str
    source: np.ndarray
    target: np.ndarray
    text: str | None
    score: float | None
    mean_logprob: float | None
    finished: bool | None
    flags: Sequence[str] = ()


def integer_type(vocabulary: int) -> pa.DataType:
    """Returns the narrowest Arrow integer type that holds ids 0 to `vocabulary - 1`, signed where both fit."""
    for dtype in (pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.int32(), pa.int64()):
        if vocabulary - 1 <= np.iinfo(dtype.to_pandas_dtype()).max:
            return dtype
    raise LabellingError(f"a vocabulary must have less than 2**63 ids, got {vocabulary}.")


def label_schema(speech_vocabulary: int, text_vocabulary: int) -> pa.Schema:
    """Returns the columns of a shard."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("source", pa.list_(integer_type(speech_vocabulary)), nullable=False),
            pa.field("target", pa.list_(integer_type(text_vocabulary)), nullable=False),
            pa.field("text", pa.string()),
            pa.field("score", pa.float32()),
            pa.field("mean_logprob", pa.float32()),
            pa.field("num_source", pa.int32(), nullable=False),
            pa.field("num_target", pa.int32(), nullable=False),
            pa.field("finished", pa.bool_()),
            pa.field("flags", pa.list_(pa.string()), nullable=False),
        ]
    )


def _lists(rows: Iterable[np.ndarray], dtype: pa.DataType) -> pa.Array:
    rows = list(rows)
    ends = np.cumsum([0, *map(len, rows)])
    values = np.concatenate([np.zeros(0, np.int64), *rows]).astype(dtype.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values, dtype))


def label_table(rows: Sequence[LabelRow], schema: pa.Schema) -> pa.Table:
    """Returns rows as the columns of a shard."""
    columns = {
        "source": _lists((row.source for row in rows), schema.field("source").type.value_type),
        "target": _lists((row.target for row in rows), schema.field("target").type.value_type),
        "num_source": pa.array([len(row.source) for row in rows], pa.int32()),
        "num_target": pa.array([len(row.target) for row in rows], pa.int32()),
        "flags": pa.array([list(row.flags) for row in rows], pa.list_(pa.string())),
    }
    for name in ("id", "text", "score", "mean_logprob", "finished"):
        columns[name] = pa.array([getattr(row, name) for row in rows], schema.field(name).type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def shard_bytes(rows: Sequence[LabelRow], schema: pa.Schema, record: dict[str, Any]) -> bytes:
    """Returns the content of a shard's file, `record` in its footer, with a digest of everything before that."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        # datasets takes its batch size from the first row group and fails on one without rows
        if len(rows):
            writer.write_table(label_table(rows, schema))
        record = {**record, "digest": _digest(buffer.getvalue())}
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(record)})
    return buffer.getvalue()


def read_record(path: Path) -> dict[str, Any]:
    """Returns the record of a shard's file, whose bytes are checked. Raises ValueError, OSError or ArrowException.

    Files of earlier versions have no digest: of these the footer alone is looked at.
    """
    content = path.read_bytes()
    metadata = pq.read_metadata(pa.BufferReader(content))
    record = json.loads(metadata.metadata[METADATA_KEY])
    footer = int.from_bytes(content[-TAIL_BYTES:-4], "little") + TAIL_BYTES
    if "digest" in record and record["digest"] != _digest(content[:-footer]):
        raise ValueError("its bytes are not those that were written")
    if record["totals"]["rows"] != metadata.num_rows:
        raise ValueError("it holds another number of rows than was written")
    return record


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_ids(path: Path) -> list[str]:
    """Returns the ids in a shard's file."""
    with open(path, "rb") as file:
        return pq.ParquetFile(file).read(columns=["id"]).column("id").to_pylist()


def read_labels(folder: str | Path) -> Iterator[LabelRow]:
    """Yields the labelled rows of a folder in the order of its source.

    Raises LabellingError when it holds no labels, or they are damaged.
    """
    folder = Path(folder)
    paths = label_paths(folder)
    if not paths:
        raise LabellingError(f"there are no labels in {folder}; wanted a folder of spear-fast label or import-pt.")
    for path in paths:
        try:
            # opened here: the name need not be UTF-8
            with open(path, "rb") as file:
                batches = list(pq.ParquetFile(file).iter_batches())
        except (pa.ArrowException, OSError) as error:
            raise LabellingError(f"{path} is damaged: {reason_of(error)}; label it again.") from error
        for row in (row for batch in batches for row in batch.to_pylist()):
            del row["num_source"], row["num_target"]
            row["source"], row["target"] = (np.array(row[name], dtype=np.int64) for name in ("source", "target"))
            yield LabelRow(**row)


SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)

COLUMNS = """| column | type | content |
|---|---|---|
| id | string | the utterance's id |
| source | list of integers | semantic speech tokens, without pads and end-of-sequence |
| target | list of integers | text tokens of the label, without pads and end-of-sequence |
| text | string | the label; null when the model has no text tokenizer |
| score | float | what the beam search ranked by |
| mean_logprob | float | log-probability in nats per generated token, end-of-sequence included |
| num_source, num_target | integer | lengths of the two lists |
| finished | bool | whether the label ended by itself |
| flags | list of strings | {flags} |"""

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: {pattern}
tags:
- speech
- semantic-tokens
- pseudo-labels
- spear-tts
size_categories:
- {size}
---

# Text labels of speech

{rows} utterances labelled by a SPEAR-TTS model with `spear-fast`{state}; {failed} could not be labelled (see
`failed.jsonl`). `manifest.json` holds the model, options, tokenizers and row counts.

{columns}

The labels are the files `{pattern}`:

    datasets.load_dataset("parquet", data_files="{pattern}")
    duckdb.sql("SELECT id, text FROM '{pattern}' WHERE finished AND mean_logprob > -0.5")
    pandas.read_parquet(sorted(glob.glob("{pattern}")))
    pyarrow.parquet.read_table(sorted(glob.glob("{pattern}")))
"""


def card_text(manifest: dict[str, Any], pattern: str) -> str:
    """Returns the README.md of a folder whose manifest is given; pattern: of its shards' names, as seen from there."""
    totals = manifest["totals"]
    flags = "; ".join(f"`{name}`: {meaning}" for name, meaning in FLAGS.items())
    size = next((name for limit, name in SIZES if totals["rows"] < limit), "n>10M")
    return CARD.format(
        size=size,
        pattern=pattern,
        rows=totals["rows"],
        failed=totals["failed"],
        state="" if manifest["complete"] else " so far (the job is not complete)",
        columns=COLUMNS.format(flags=flags),
    )
