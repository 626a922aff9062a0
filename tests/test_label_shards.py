"""Shards, order and slots are functions of the rows and the options alone."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from spear_fast.labelling.shards import WINDOW_ROWS, longest_first, plan_shards, slots_for


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
@given(lengths=st.lists(st.integers(1, 500), max_size=200))
def test_the_longest_go_first_and_equal_ones_keep_their_order(lengths):
    order = longest_first(lengths)
    assert sorted(order) == list(range(len(lengths)))
    assert all(
        lengths[one] > lengths[other] or (lengths[one] == lengths[other] and one < other)
        for one, other in pairwise(order)
    )


def test_places_follow_the_tokens_and_the_rows():
    assert [slots_for(tokens, 1000) for tokens in (1, 255, 256, 511, 512, 8192, 65536)] == [1, 1, 1, 1, 2, 32, 256]
    assert [slots_for(8192, rows) for rows in (0, 1, 20, 32, 33)] == [1, 1, 20, 32, 32]
