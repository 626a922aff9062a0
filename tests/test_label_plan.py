"""Shards and batches are functions of the rows and the options alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_fast.labelling.plan import LEAST_ROW_TOKENS, WINDOW_ROWS, compose_batches, plan_shards


@settings(deadline=None)
@given(rows=st.integers(1, 20_000), shards=st.none() | st.integers(1, 300), size=st.integers(1, 5_000))
def test_shards_cover_every_row_once_in_order(rows, shards, size):
    plan = plan_shards(rows, shards, size)
    assert plan[0].start == 0
    assert plan[-1].stop == rows
    assert all(before.stop == after.start for before, after in pairwise(plan))
    assert max(map(len, plan)) - min(map(len, plan)) <= 1
    assert min(map(len, plan)) >= 1
    if shards is not None:
        assert len(plan) == min(shards, rows)
    else:
        assert max(map(len, plan)) <= size
    for shard in plan:
        windows = list(shard.windows())
        assert windows[0][0] == shard.start
        assert windows[-1][1] == shard.stop
        assert all(stop - start <= WINDOW_ROWS for start, stop in windows)


def test_names_sort_in_order_and_carry_the_count():
    assert [shard.name for shard in plan_shards(10, 2, 1)] == [
        "labels-00000-of-00002.parquet",
        "labels-00001-of-00002.parquet",
    ]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 500), max_size=200), budget=st.integers(1, 5_000))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    batches = compose_batches(lengths, budget)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    in_order = [lengths[position] for batch in batches for position in batch]
    assert in_order == sorted(lengths, reverse=True)
    for batch in batches:
        padded = len(batch) * (max(lengths[position] for position in batch) + 1)
        assert padded <= budget or len(batch) == 1


def test_batches_are_filled():
    assert [len(batch) for batch in compose_batches([127] * 10, 512)] == [4, 4, 2]
    # rows of equal length keep their order
    assert compose_batches([127] * 5, 256) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("length", [1, LEAST_ROW_TOKENS - 1])
def test_short_rows_cost_at_least_a_little(length):
    assert len(compose_batches([length] * 1000, 10 * LEAST_ROW_TOKENS)[0]) == 10
