"""Labelling jobs: speech (audio or token files) in, Parquet shards of text labels out; killed and resumed at will."""

from __future__ import annotations

from spear_fast.labelling.errors import Interrupted, LabellingError
from spear_fast.labelling.label_files import read_labels
from spear_fast.labelling.options import LabelOptions
from spear_fast.labelling.parts import finish, label_part, plan
from spear_fast.labelling.rows_pt import export_rows, import_rows
from spear_fast.labelling.runner import label

__all__ = [
    "Interrupted",
    "LabelOptions",
    "LabellingError",
    "export_rows",
    "finish",
    "import_rows",
    "label",
    "label_part",
    "plan",
    "read_labels",
]
