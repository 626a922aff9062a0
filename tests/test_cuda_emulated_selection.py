"""The logic of the CUDA selection, run on the CPU, computes what the definition says."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from cuda_emulator import emulator
from ops_selection_inputs import Buffers, new_buffers, random_state, settings_of
from tolerance import assert_within, to_float64
from torch import Tensor

from spear_fast.ops import providers
from spear_fast.ops.cuda.beam_step import beam_step
from spear_fast.ops.cuda.sample_step import sample_step
from spear_fast.ops.reference import selection as reference
from spear_fast.ops.selection_params import SelectionMethod

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
# what beam_step keeps where, and how it finds its candidates, hangs on sizes
BEAM_SHAPES = {
    "a model's": {"utterances": 3, "beams": 5, "vocab": 512, "capacity": 64},
    "more values than a block has room for": {"utterances": 2, "beams": 9, "vocab": 1000, "capacity": 40},
    "more beams than lanes": {"utterances": 2, "beams": 40, "vocab": 64, "capacity": 16},
    "as many beams as threads": {"utterances": 1, "beams": 256, "vocab": 5, "capacity": 12, "plain": True},
    "ancestors in words, guided": {"utterances": 9, "beams": 4, "vocab": 33, "capacity": 64, "guided": True},
    "more ancestors than a block has room for": {"utterances": 3, "beams": 6, "vocab": 20, "capacity": 1600},
}
STEPS = {"beam_step": beam_step, "sample_step": sample_step}
# where what is written begins among the arguments
WRITTEN = {"beam_step": 5, "sample_step": 7}


def copies(arguments):
    return [each.clone() if isinstance(each, Tensor) else each for each in arguments]


def assert_same_state(found, truth, baseline):
    """Integers exactly; of floats, where they are finite and their values."""
    for ours, exact, torchs in zip(found, truth, baseline, strict=True):
        if not ours.dtype.is_floating_point:
            assert torch.equal(ours.long(), exact.long())
            continue
        for special in (torch.isnan, torch.isneginf):
            assert torch.equal(special(ours), special(exact))
        finite = exact.isfinite()
        assert_within(ours.where(finite, 0.0), exact.where(finite, 0.0), torchs.where(finite, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("op", STEPS)
@pytest.mark.usefixtures("nan_filled_empty", "emulator")
def test_one_step(op, shape, dtype):
    for seed in range(8 if dtype == torch.float32 else 1):
        filtered = op == "sample_step" and seed % 3 == 2
        arguments = random_state(op, **shape, dtype=dtype, seed=seed, filtered=filtered)
        truth, baseline = to_float64(copies(arguments)), copies(arguments)
        getattr(reference, op)(*truth)
        getattr(reference, op)(*baseline)
        STEPS[op](*arguments)
        first = WRITTEN[op]
        assert_same_state(arguments[first:], truth[first:], baseline[first:])


@pytest.mark.parametrize("shape", BEAM_SHAPES.values(), ids=BEAM_SHAPES)
@pytest.mark.usefixtures("nan_filled_empty", "emulator")
def test_a_step_of_beams_at_other_sizes(shape):
    for seed in range(4):
        arguments = random_state("beam_step", **shape, seed=seed)
        truth, baseline = to_float64(copies(arguments)), copies(arguments)
        reference.beam_step(*truth)
        reference.beam_step(*baseline)
        beam_step(*arguments)
        assert_same_state(arguments[5:], truth[5:], baseline[5:])


@pytest.mark.parametrize("vocab", [7, 200, 512])
@pytest.mark.parametrize("odd", [None, "nan", "-inf", "one lane"])
@pytest.mark.usefixtures("emulator")
def test_candidates_that_are_equal_in_great_number(vocab, odd):
    """More than are ranked by counting; then, or where all the best are one thread's, the least is found by halving."""
    arguments = random_state("beam_step", utterances=2, beams=5, vocab=vocab, plain=True)
    arguments[-1].fill_(False)
    arguments[0].fill_(0.5)
    arguments[6].fill_(-1.0)
    if odd == "one lane":
        # a thread's share of the vocabulary
        arguments[0][:, :, 3::256] = 2.0
    elif odd is not None:
        arguments[0][0, 1:4, vocab // 2 :] = float(odd)
    wanted = copies(arguments)
    reference.beam_step(*wanted)
    beam_step(*arguments)
    for ours, theirs in zip(arguments[5:], wanted[5:], strict=True):
        if not ours.dtype.is_floating_point:
            assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("emulator")
def test_the_pool_takes_equals_in_the_order_of_their_coming():
    """What was there first, then what ended by its rank, then what reached the limit by its beam index."""
    arguments = random_state("beam_step", utterances=1, beams=4, vocab=6, capacity=8)
    arguments[2], arguments[3], arguments[4] = settings_of([{"eos_id": 2, "max_length": 3, "length_penalty": 0.0}], 4)
    names = [field.name for field in fields(Buffers)][: len(arguments) - 5]
    state = dict(zip(names, arguments[5:], strict=True))
    state["done"].fill_(False)
    state["lengths"].fill_(2)
    arguments[0].fill_(0.0)
    state["scores"].copy_(torch.tensor([[0.0, 0.0, -0.5, -1.0]]))
    # as good as what ends now: the log-probability of one of six
    state["pool_scores"].copy_(-torch.tensor([[1.0, 6.0, 6.0, 40.0]]).log())
    wanted = copies(arguments)
    reference.beam_step(*wanted)
    beam_step(*arguments)
    for name, ours, theirs in zip(names, arguments[5:], wanted[5:], strict=True):
        assert torch.equal(ours, theirs) or ours.dtype.is_floating_point, name
    assert state["ended"].item() == wanted[-2].item()


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


def drawn_by(function, logits, settings):
    """Returns the tokens that a step draws for logits `[utterances, beams, vocabulary]`."""
    buffers = new_buffers(logits.shape[0], logits.shape[1], 2)
    rows = [{"method": SelectionMethod.SAMPLE, **settings}] * logits.shape[0]
    function(logits, None, None, *settings_of(rows, logits.shape[1]), *buffers.sample())
    return buffers.tokens[:, 0]


FILTERS = {
    "plain": {},
    "cold": {"temperature": 0.0},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.7, "temperature": 1.3},
    "both": {"top_k": 40, "top_p": 0.9, "temperature": 0.8},
    "the best alone": {"top_p": 0.0},
    "one": {"top_k": 1},
}


@pytest.mark.parametrize("settings", FILTERS.values(), ids=FILTERS)
@pytest.mark.usefixtures("nan_filled_empty", "emulator")
def test_draws_are_those_of_the_cpu(settings):
    """Token by token, at a model's vocabulary; many equals, infinities and rows that are NaN among them."""
    cpu = providers.get("sample_step", "cpu")
    if cpu.missing():
        pytest.skip(cpu.missing())
    logits = 3 * torch.randn(24, 2, 515)
    logits[:8] = logits[:8].round()
    # zeros of both signs are equals as well
    logits[8] = torch.tensor([0.0, -0.0] * 257 + [0.0])
    logits[9, :, ::2] = -torch.inf
    logits[10, 0, 100], logits[10, 1, 100] = torch.inf, torch.nan
    logits[11, :, 1:] = -torch.inf
    assert torch.equal(drawn_by(sample_step, logits, settings), drawn_by(cpu.function, logits, settings))


@pytest.mark.parametrize(("top_k", "top_p", "left"), [(3, 1.0, 3), (0, 0.5, 6), (0, 0.51, 7), (8, 0.5, 4)])
@pytest.mark.usefixtures("emulator")
def test_filters_keep_the_lower_ids_of_equals(top_k, top_p, left):
    """Of twelve equals the first ones stay; all that stay are drawn."""
    logits = torch.full((200, 1, 40), -torch.inf)
    logits[..., 7:19] = 1.5
    drawn = drawn_by(sample_step, logits, {"top_k": top_k, "top_p": top_p})
    assert sorted(set(drawn.flatten().tolist())) == list(range(7, 7 + left))


@pytest.mark.parametrize("op", STEPS)
def test_the_order_of_threads_changes_nothing(op, emulator):
    results = []
    for emulator.seed in range(3):
        arguments = random_state(op, utterances=3, beams=4, vocab=70, capacity=20, guided=True, seed=5)
        STEPS[op](*arguments)
        results.append(arguments[WRITTEN[op] :])
    for other in results[1:]:
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results[0], other, strict=True))
