"""The logic of the CUDA selection, run on the CPU, computes what the definition says."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import emulator
from ops_selection_inputs import random_state
from tolerance import assert_within, to_float64
from torch import Tensor

from spear_fast.ops.cuda.beam_step import beam_step
from spear_fast.ops.reference import selection as reference

__all__ = ["emulator"]

SHAPES = {
    "default": {},
    "smallest": {"utterances": 1, "beams": 1, "vocab": 1, "capacity": 2},
    "few candidates": {"utterances": 3, "beams": 5, "vocab": 2, "guided": True},
    "guided": {"utterances": 9, "beams": 4, "vocab": 131, "capacity": 67, "guided": True},
    "plain": {"utterances": 4, "beams": 5, "vocab": 257, "plain": True},
    "strided, more beams than warps": {"utterances": 2, "beams": 17, "vocab": 19, "strided": True},
    "no utterances": {"utterances": 0},
}


def copies(arguments):
    return [each.clone() if isinstance(each, Tensor) else each for each in arguments]


def assert_same_state(found, truth, yardstick):
    """Integers exactly; of floats, where they are finite and their values."""
    for ours, exact, torchs in zip(found, truth, yardstick, strict=True):
        if not ours.dtype.is_floating_point:
            assert torch.equal(ours.long(), exact.long())
            continue
        for special in (torch.isnan, torch.isneginf):
            assert torch.equal(special(ours), special(exact))
        finite = exact.isfinite()
        assert_within(ours.where(finite, 0.0), exact.where(finite, 0.0), torchs.where(finite, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.usefixtures("nan_filled_empty", "emulator")
def test_beam_step(shape, dtype):
    for seed in range(8 if dtype == torch.float32 else 1):
        arguments = random_state("beam_step", **shape, dtype=dtype, seed=seed)
        truth, yardstick = to_float64(copies(arguments)), copies(arguments)
        reference.beam_step(*truth)
        reference.beam_step(*yardstick)
        beam_step(*arguments)
        assert_same_state(arguments[5:], truth[5:], yardstick[5:])


@pytest.mark.usefixtures("emulator")
def test_ties_go_to_the_lower_beam_and_id():
    """And NaN counts as the best, and ends the utterance."""
    arguments = random_state("beam_step", utterances=2, beams=3, vocab=40, plain=True)
    arguments[-1].fill_(False)
    arguments[0].fill_(1.0)
    arguments[0][1, 2, 7] = torch.nan
    arguments[6].fill_(0.0)
    wanted = copies(arguments)
    reference.beam_step(*wanted)
    beam_step(*arguments)
    assert arguments[5][0].tolist() == [0, 1, 2]
    assert arguments[-1].tolist() == wanted[-1].tolist() == [False, True]
    for ours, theirs in zip(arguments[5:], wanted[5:], strict=True):
        if not ours.dtype.is_floating_point:
            assert torch.equal(ours, theirs)


def test_the_order_of_threads_changes_nothing(emulator):
    results = []
    for emulator.seed in range(3):
        arguments = random_state("beam_step", utterances=3, beams=4, vocab=70, capacity=20, guided=True, seed=5)
        beam_step(*arguments)
        results.append(arguments[5:])
    for other in results[1:]:
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results[0], other, strict=True))
