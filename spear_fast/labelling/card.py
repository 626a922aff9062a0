"""The dataset card: what a folder of labels is, and front matter so that `datasets.load_dataset(folder)` reads it."""

from __future__ import annotations

from typing import Any

from spear_fast.labelling.labeller import FLAGS

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
    path: labels-*.parquet
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
`failed.jsonl`). Model, options, tokenizers and row counts stand in `manifest.json`.

{columns}

    datasets.load_dataset("parquet", data_files="labels-*.parquet")
    duckdb.sql("SELECT id, text FROM 'labels-*.parquet' WHERE finished AND mean_logprob > -0.5")
"""


def card_text(manifest: dict[str, Any]) -> str:
    """Returns the README.md of a folder whose manifest is given."""
    totals = manifest["totals"]
    flags = "; ".join(f"`{name}`: {meaning}" for name, meaning in FLAGS.items())
    size = next((name for limit, name in SIZES if totals["rows"] < limit), "n>10M")
    return CARD.format(
        size=size,
        rows=totals["rows"],
        failed=totals["failed"],
        state="" if manifest["complete"] else " so far (the job is not complete)",
        columns=COLUMNS.format(flags=flags),
    )
