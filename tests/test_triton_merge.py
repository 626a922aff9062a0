"""Merging splits inside of the launch that computed them: by the last program to arrive, whichever that is."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops_matrix import device_of
from tolerance import assert_within

from spear_fast.ops import providers

ROW = providers.get("decode_self_attention", "triton")
pytestmark = pytest.mark.skipif(ROW.missing() is not None, reason=str(ROW.missing()))

if ROW.missing() is None:
    import triton
    import triton.language as tl
    from spear_fast.kernels.blocks import arrived_last, merge_splits, merged

    @triton.jit
    def write_and_merge_kernel(
        parts, logs, order, partial, log_sums, arrivals, out, seen, rows, splits,
        HEAD_DIM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """A program writes one split of ROWS rows, `order` says which; the last of the splits merges them."""
        i_tile = tl.program_id(0)
        i_split = tl.load(order + tl.program_id(1))
        o_row = i_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        m_row = o_row < rows
        o_size = tl.arange(0, SIZE)
        b_log = tl.load(logs + i_split * rows + o_row, mask=m_row, other=float("-inf"))
        m_write = (b_log != float("-inf"))[:, None] & (o_size < HEAD_DIM)[None, :]
        o_part = (i_split * rows + o_row)[:, None] * HEAD_DIM + o_size[None, :]
        tl.store(partial + o_part, tl.load(parts + o_part, mask=m_write, other=0.0), mask=m_write)
        tl.store(log_sums + i_split * rows + o_row, b_log, mask=m_row)
        if arrived_last(arrivals + i_tile, splits):
            b_out = merged(partial, log_sums, o_row, m_row, rows, splits, HEAD_DIM, SIZE, ROWS)
            m_out = m_row[:, None] & (o_size < HEAD_DIM)[None, :]
            tl.store(out + o_row[:, None] * HEAD_DIM + o_size[None, :], b_out.to(out.dtype.element_ty), mask=m_out)
            tl.store(seen + i_tile, tl.load(seen + i_tile) + 1)


ROWS, SIZE = 10, 24


def inputs(splits):
    """Returns parts `[splits, rows, head_dim]`, NaN where nobody may read, and log-sums `[splits, rows]`."""
    generator = torch.Generator().manual_seed(splits)
    parts = torch.randn(splits, ROWS, SIZE, generator=generator)
    logs = torch.randn(splits, ROWS, generator=generator) * 3
    # one row that no split has read, and rows that only some have
    logs[:, 3] = float("-inf")
    logs[1:, 4] = float("-inf")
    logs[0, 9] = float("-inf")
    parts[logs == float("-inf")] = float("nan")
    return parts.to(device_of(ROW)), logs.to(device_of(ROW))


def truth(parts, logs):
    weights = torch.where(logs == float("-inf"), 0.0, 2.0 ** logs.double())
    total = weights.sum(0)
    sums = (parts.double().nan_to_num(0.0) * weights[..., None]).sum(0)
    return sums / torch.where(total == 0, 1.0, total)[:, None]


def merge_inside(parts, logs, order, arrivals):
    splits, rows, size = parts.shape
    out, seen = torch.full_like(parts[0], float("nan")), torch.zeros_like(arrivals)
    partial, log_sums = torch.full_like(parts, float("nan")), torch.full_like(logs, float("nan"))
    order = torch.tensor(order, dtype=torch.int32, device=parts.device)
    write_and_merge_kernel[(len(arrivals), splits)](
        parts, logs, order, partial, log_sums, arrivals, out, seen, rows, splits, HEAD_DIM=size, SIZE=32, ROWS=4
    )
    assert seen.tolist() == [1] * len(arrivals), "each tile is merged once"
    assert arrivals.tolist() == [0] * len(arrivals), "the last leaves the count as it was found"
    return out


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_the_last_to_arrive_merges_all_in_their_order(splits):
    parts, logs = inputs(splits)
    wanted = torch.full_like(parts[0], float("nan"))
    merge_splits(parts, logs, wanted)
    baseline = truth(parts, logs).float()
    assert_within(wanted.cpu(), truth(parts, logs).cpu(), baseline.cpu(), what="merge_splits")
    # zeroed once: each launch finds the counts as the one before left them
    arrivals = torch.zeros(3, dtype=torch.int32, device=parts.device)
    for order in itertools.permutations(range(splits)):
        assert torch.equal(merge_inside(parts, logs, order, arrivals), wanted), order
    assert not wanted[3].any()
