"""The table of hardware numbers: which row a launch gets, and which rows the audit compiles."""

from __future__ import annotations

import pytest
import torch
from spear_fast.kernels import tiles
from spear_fast.kernels.tiles import Entry

ROWS = (
    Entry("copy", 0, 64, 16, 1, 1, {"BLOCK": 4}),
    Entry("copy", 80, 64, 16, 4, 2, {"BLOCK": 16}),
    Entry("copy", 80, 128, 16, 8, 2, {"BLOCK": 32}),
    Entry("copy", 80, 64, 32, 4, 1, {"BLOCK": 8}),
    Entry("copy", 90, 64, 16, 4, 3, {"BLOCK": 64}),
    Entry("plain", 80, 64, 16, 4, 3, {"BLOCK": 1}),
)


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(tiles, "TABLE", ROWS)
    tiles.lookup.cache_clear()
    yield
    tiles.lookup.cache_clear()


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("wanted", "row"),
    [
        (("copy", 0, 64, 32), 0),
        (("copy", 80, 16, 16), 1),
        (("copy", 80, 64, 16), 1),
        (("copy", 80, 65, 16), 2),
        (("copy", 80, 999, 16), 2),
        (("copy", 90, 64, 16), 4),
        (("copy", 90, 128, 16), 4),
        (("copy", 90, 64, 32), 3),
        (("copy", 100, 64, 16), 4),
        (("copy", 75, 64, 16), 1),
        (("plain", 0, 64, 16), 5),
    ],
)
def test_the_nearest_row_is_taken(wanted, row):
    assert tiles.lookup(*wanted) is ROWS[row]


@pytest.mark.usefixtures("table")
def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="tile: kernel must be one of copy, plain, got move; add its rows"):
        tiles.lookup("move", 80, 64, 16)


@pytest.mark.usefixtures("table")
def test_a_launch_gets_keywords_of_its_own():
    keywords = tiles.tile("copy", torch.device("cpu"), 64, torch.bfloat16)
    assert keywords == {"BLOCK": 4, "num_warps": 1, "num_stages": 1}
    keywords["BLOCK"] = 5
    assert tiles.tile("copy", torch.device("cpu"), 64, torch.bfloat16)["BLOCK"] == 4


@pytest.mark.usefixtures("table")
def test_the_audit_sees_what_each_architecture_would_launch():
    seen = {(row.architecture, row.size, row.bits): row.blocks["BLOCK"] for row in tiles.entries("copy")}
    assert seen == {
        (80, 64, 16): 16,
        (80, 128, 16): 32,
        (80, 64, 32): 8,
        (90, 64, 16): 64,
        (90, 128, 16): 64,
        (90, 64, 32): 8,
        (100, 64, 16): 64,
        (100, 128, 16): 64,
        (100, 64, 32): 8,
    }


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((7, 5), 80), ((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)],
)
def test_devices_get_rows_that_fit_them(capability, architecture):
    assert tiles.nearest_architecture(*capability) == architecture


def test_every_row_is_well_formed():
    assert len({row[:4] for row in tiles.TABLE}) == len(tiles.TABLE)
    for row in tiles.TABLE:
        assert row.architecture in (tiles.INTERPRETER, *tiles.ARCHITECTURES), row
        assert row.bits in (16, 32), row
        assert row.num_warps in (1, 2, 4, 8, 16), row
