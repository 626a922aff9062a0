"""Ids that stand twice are found among many too, whose hashes lie in files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spear_fast.labelling import LabellingError, duplicates
from spear_fast.labelling.duplicates import Repeated
from spear_fast.labelling.sources import open_sources


@pytest.mark.parametrize("held", [10, 1000, 10**6])
def test_what_comes_twice_is_found_wherever_it_stands(held, monkeypatch):
    monkeypatch.setattr(duplicates, "HELD", held)
    generator = np.random.default_rng(held)
    hashes = np.unique(generator.integers(-(2**63), 2**63 - 1, 5000))
    generator.shuffle(hashes)
    twice = {int(hash_) for hash_ in hashes[:7]}
    with Repeated() as repeated:
        for part in np.array_split(np.concatenate((hashes, hashes[:7], hashes[:1])), 13):
            repeated.add(part)
        assert repeated.found() == twice
        assert bool(repeated._files) == (held < 5000)
        files = repeated._files
    assert all(file.closed for file in files)
    with Repeated() as repeated:
        assert repeated.found() == set()
        repeated.add(hashes)
        assert repeated.found() == set()


def test_a_listing_names_ids_that_stand_in_two_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "HELD", 1000)
    for name, ids in (("a", range(4000)), ("b", range(3999, 8000))):
        table = pa.table({"id": [f"u{number}" for number in ids], "tokens": [[1]] * len(ids)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(LabellingError, match=r"'u3999' \(row 4000 of a\.parquet and row 1 of b\.parquet\)"):
        open_sources([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert len(open_sources([tmp_path / "b.parquet"])) == 4001
