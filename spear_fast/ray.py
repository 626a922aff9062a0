"""Labelling on Ray: a planned job on a cluster, and labels for the rows of anybody's own `ray.data` pipeline.

Needs the extra `ray`: pip install 'spear-fast[ray]'. Nothing else in this package imports Ray.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spear_fast.labelling.items import Item, identify
from spear_fast.labelling.label_files import LabelRow, label_schema, label_table
from spear_fast.labelling.on_ray import connect, label_on_ray
from spear_fast.labelling.options import DEFAULT_BATCH_TOKENS, LabelOptions
from spear_fast.labelling.prepare import Failure
from spear_fast.labelling.row_labeller import RowLabeller
from spear_fast.labelling.runner import sizes_of
from spear_fast.labelling.token_files import as_tokens

__all__ = ["Labeller", "connect", "label_on_ray"]


class Labeller:
    """Labels the rows of a dataset: a class for `ds.map_batches`, as the page on labelling shows.

    A batch has a column `tokens` of lists of semantic token ids, or `audio` of paths (`audio_filepath` will do), with
    `offset` and `duration` in seconds for segments. Returned are its columns, and beside them those of a folder of
    labels (`id` where there is none, else as it is; `source`, `target`, `text`, `score`, …) and `failed`: why a row has
    no label, null where it has one. Of two columns of one name, such as `text`, the label's is returned: rename yours.

    Ray keeps several batches at an actor at once; their rows share the engine, so that its slots are full across
    batches. A row gets the same label whatever it is batched with.

    model: folder or checkpoint. options: by default of the device that the actor has. workers: threads that read audio.
    """

    def __init__(self, model: str, options: LabelOptions | None = None, *, workers: int | None = None) -> None:
        import torch

        from spear_fast.checkpoints.load import load_model

        if options is None:
            kind = "cuda" if torch.cuda.is_available() else "cpu"
            options = LabelOptions(device=kind, batch_tokens=DEFAULT_BATCH_TOKENS[kind])
        loaded = load_model(model)
        self._schema = label_schema(*sizes_of(loaded))
        self._rows = RowLabeller(loaded, options, workers=workers)

    async def __call__(self, batch: pa.Table | dict[str, Any]) -> Any:
        table = batch
        if isinstance(table, dict):
            table = pa.table({name: _column(each) for name, each in table.items()})
        rows = table.to_pylist()
        futures = [asyncio.wrap_future(self._rows.submit(_item(row, number))) for number, row in enumerate(rows)]
        yield self._labelled(table, await asyncio.gather(*futures))

    def _labelled(self, table: pa.Table, outcomes: list[LabelRow | Failure]) -> pa.Table:
        none = np.zeros(0, np.int64)
        rows = [
            LabelRow(outcome.id, none, none, None, None, None, None) if isinstance(outcome, Failure) else outcome
            for outcome in outcomes
        ]
        reasons = [outcome.reason if isinstance(outcome, Failure) else None for outcome in outcomes]
        labels = label_table(rows, self._schema).append_column("failed", pa.array(reasons, pa.string()))
        for name in labels.column_names:
            if name != "id" and name in table.column_names:
                table = table.drop_columns([name])
        for name in labels.column_names:
            if name != "id" or "id" not in table.column_names:
                table = table.append_column(labels.schema.field(name), labels.column(name))
        return table


def _column(values: Any) -> pa.Array:
    """Returns a column as numpy's batches have it."""
    return pa.array([value.tolist() if isinstance(value, np.ndarray) else value for value in values])


def _item(row: dict[str, Any], number: int) -> Item:
    """Returns a row of a batch; one that has neither tokens nor audio has a problem."""
    audio = row.get("audio") or row.get("audio_filepath")
    name = str(audio or f"row {number} of its batch")
    origin = name
    try:
        if row.get("id") is not None:
            name = identify(row["id"])
        if row.get("tokens") is not None:
            return Item(name, origin, tokens=as_tokens(row["tokens"]))
        if audio is None:
            return Item(name, origin, problem="the row has neither tokens nor audio; give one of them.")
        offset = float(row.get("offset") or 0.0)
        return Item(name, origin, audio=Path(audio), offset=offset, duration=row.get("duration"))
    except Exception as error:
        return Item(name, origin, problem=str(error))
