"""`beam_step` and `sample_step`: every provider against the definition, whole searches, draws, ties, ends and bans."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_matrix import assert_right, runnable
from ops_selection_inputs import new_buffers, random_rows, random_state, settings_of
from ops_selection_search import Table, call, logprob_sums, pool_of, run
from plain_selection import slow_beam_search, slow_sample

from spear_fast.ops.reference import selection as reference
from spear_fast.ops.selection_params import EarlyStopping, SelectionMethod

OPS = ("beam_step", "sample_step")
CASES = runnable(*OPS)
PROVIDERS = sorted({(op, provider) for op, provider, _ in CASES})
BEAM = [provider for op, provider in PROVIDERS if op == "beam_step"]
SAMPLE = [provider for op, provider in PROVIDERS if op == "sample_step"]

SHAPES = [
    {},
    {"utterances": 1, "beams": 1, "vocab": 1, "capacity": 2},
    {"utterances": 3, "beams": 5, "vocab": 2, "guided": True},
    {"utterances": 9, "beams": 4, "vocab": 131, "capacity": 67, "guided": True},
    {"utterances": 8, "beams": 4, "vocab": 257, "plain": True},
    {"utterances": 2, "beams": 17, "vocab": 19, "strided": True},
    {"utterances": 0},
]


def written(op):
    """What an op writes: integers, and of floats which are finite and their values."""
    first = {"beam_step": 5, "sample_step": 7}[op]

    def compared(result, arguments):
        floats = [each for each in arguments[first:] if each.is_floating_point()]
        kinds = [torch.where(each.isnan(), 2, each == -torch.inf) for each in floats]
        finite = [each.masked_fill(~each.isfinite(), 0) for each in floats]
        return [*kinds, *finite, *(each for each in arguments[first:] if not each.is_floating_point())]

    return compared


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "provider", "dtype"), CASES, ids=lambda value: str(value).replace("torch.", ""))
@pytest.mark.usefixtures("nan_filled_empty")
def test_one_step(op, provider, dtype, shape):
    for seed in range(3):
        arguments = random_state(op, **shape, dtype=dtype, seed=seed, filtered=op == "sample_step" and seed == 2)
        assert_right(op, provider, getattr(reference, op), arguments, results=written(op))


@pytest.mark.parametrize(("op", "provider"), [pair for pair in PROVIDERS if pair[1] != "reference"])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    shape=st.fixed_dictionaries(
        {
            "utterances": st.integers(1, 4),
            "beams": st.integers(1, 9),
            "vocab": st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 65]),
            "capacity": st.integers(2, 12),
            "guided": st.booleans(),
            "strided": st.booleans(),
        }
    ),
)
def test_any_step(op, provider, seed, shape):
    arguments = random_state(op, **shape, seed=seed)
    assert_right(op, provider, getattr(reference, op), arguments, results=written(op))


def any_rows(seed, count, beams, vocab, method):
    generator = torch.Generator().manual_seed(seed)
    rows = random_rows(generator, count, beams, vocab, method)
    for row in rows:
        row["max_length"] = min(row["max_length"], 8)
        row["min_length"] = min(row["min_length"], row["max_length"] - 1)
        if row["eos_id"] in row["prefix"][:-1]:
            row["prefix"] = ()
    return rows


@pytest.mark.parametrize("provider", BEAM)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), beams=st.integers(1, 5), vocab=st.integers(2, 7), guided=st.booleans())
def test_whole_searches(provider, seed, beams, vocab, guided):
    """Utterances of one batch with settings of their own, begun at different times, find what each finds alone."""
    count = 4
    rows = any_rows(seed, count, beams, vocab, SelectionMethod.BEAM)
    tables = [Table(vocab, seed + i) for i in range(count)]
    buffers = run(provider, SelectionMethod.BEAM, tables, rows, beams, 8, starts=[0, 3, 1, 0], guided=guided)
    for i, row in enumerate(rows):
        wanted = slow_beam_search(tables[i], **{"beam_size": beams, **row})
        found = pool_of(buffers, i, row["eos_id"])
        assert [each.tokens for each in found] == [each.tokens for each in wanted]
        assert [each.finished for each in found] == [each.finished for each in wanted]
        for one, other in zip(found, wanted, strict=True):
            assert math.isclose(one.score, other.score, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("provider", SAMPLE)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), beams=st.integers(1, 5), vocab=st.integers(2, 7), filtered=st.booleans())
def test_whole_draws(provider, seed, beams, vocab, filtered):
    count = 4
    rows = any_rows(seed, count, beams, vocab, SelectionMethod.SAMPLE)
    for row in rows:
        # an n-gram ban can leave nothing to draw from, see below
        row["no_repeat_ngram_size"] = 3 if row["no_repeat_ngram_size"] and vocab > 5 else 0
    tables = [Table(vocab, seed + i) for i in range(count)]
    buffers = run(provider, SelectionMethod.SAMPLE, tables, rows, beams, 8, starts=[2, 0, 1, 0], guided=not filtered,
                  filtered=filtered)  # fmt: skip
    sums = logprob_sums(buffers)
    for i, row in enumerate(rows):
        for k in range(row["beam_size"]):
            tokens, total, finished = slow_sample(tables[i], int(buffers.seeds[i]), k, **row)
            length = int(buffers.lengths[i, k])
            assert tuple(buffers.tokens[i, :length, k].tolist()) == tokens
            assert bool(buffers.finished[i, k]) == finished
            assert math.isclose(float(buffers.scores[i, k]), total, rel_tol=1e-9, abs_tol=1e-9)
            if not row["prefix"]:
                assert math.isclose(float(sums[i, k]), total, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("provider", SAMPLE)
def test_draws_follow_the_distribution(provider):
    """Chi-squared of first tokens over many seeds; the limit is passed once in 30,000."""
    vocab, count = 6, 4000
    logits, buffers = torch.randn(vocab) * 2, new_buffers(count // 2, 2, 1)
    settings = settings_of([{"method": SelectionMethod.SAMPLE, "temperature": 1.5}] * (count // 2), 2)
    call("sample_step", provider, [logits.expand(count // 2, 2, vocab), None, None, *settings], buffers.sample())
    chances = (logits / 1.5).softmax(0) * count
    seen = buffers.tokens.flatten().long().bincount(minlength=vocab)
    assert float(((seen - chances) ** 2 / chances).sum()) < 28


def by_hand(provider, logits, rows, *, capacity=4, change=lambda buffers: None):
    """One beam step with these logits `[utterances, beams, vocabulary]`; returns the buffers."""
    logits = torch.tensor(logits)
    buffers = new_buffers(logits.shape[0], logits.shape[1], capacity)
    change(buffers)
    call("beam_step", provider, [logits, None, *settings_of(rows, logits.shape[1])], buffers.beam())
    return buffers


@pytest.mark.parametrize("provider", BEAM)
def test_a_step_by_hand(provider):
    """Two hypotheses in the third step: the second one's best end enters the pool, ties go to the lower beam and id."""
    half, quarter, eighth = (math.log(share) for share in (0.5, 0.25, 0.125))

    def change(buffers):
        buffers.scores.copy_(torch.tensor([[-1.0, -1.0]]))
        buffers.lengths.fill_(2)
        buffers.ancestors.copy_(torch.tensor([[[0, 1, 0, 9], [1, 0, 1, 9]]]))
        buffers.tokens[0, :2] = torch.tensor([[5, 6], [7, 8]])

    logits = [[[eighth, half, quarter, eighth], [quarter, eighth, eighth, half]]]
    buffers = by_hand(provider, logits, [{"eos_id": 3, "length_penalty": 2.0}], change=change)
    # candidates: (0, 1) and (1, 3) at half, then (0, 2) and (1, 0) at a quarter
    assert buffers.inputs.tolist() == [[1, 2]]
    torch.testing.assert_close(buffers.scores, torch.tensor([[-1 + half, -1 + quarter]]))
    assert buffers.lengths.tolist() == [[3, 3]]
    assert buffers.ancestors.tolist() == [[[0, 1, 0, 0], [0, 1, 0, 1]]]
    assert buffers.tokens[0].tolist() == [[5, 6], [7, 8], [1, 2], [0, 0]]
    assert buffers.parents[0, 2].tolist() == [0, 0]
    torch.testing.assert_close(buffers.logprobs[0, 2], torch.tensor([half, quarter]))
    torch.testing.assert_close(buffers.pool_scores, torch.tensor([[(-1 + half) / 9, -torch.inf]]))
    assert (buffers.pool_beams[0, 0], buffers.pool_ends[0, 0], buffers.pool_finished[0, 0]) == (1, 2, True)
    torch.testing.assert_close(buffers.pool_last_logprobs[0, 0], torch.tensor(half))
    assert buffers.ended.tolist() == [1]
    assert not buffers.done.any()


@pytest.mark.parametrize("provider", BEAM)
def test_ties_go_to_the_lowest(provider):
    def change(buffers):
        buffers.scores.zero_()

    buffers = by_hand(provider, [[[-0.0, 0.0] * 40] * 3], [{}], change=change)
    assert buffers.inputs.tolist() == [[0, 1, 2]]
    assert buffers.parents[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("provider", BEAM)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_ends_its_utterance_alone(provider, sign):
    nan = math.copysign(math.nan, sign)
    logits = [[[0.1, 0.2, 0.3]] * 2, [[0.1, nan, 0.3]] * 2, [[0.3, 0.2, 0.1]] * 2]
    buffers = by_hand(provider, logits, [{"eos_id": 2}] * 3)
    assert buffers.done.tolist() == [False, True, False]
    assert buffers.inputs[[0, 2]].tolist() == [[1, 0], [0, 1]]
    assert not (buffers.pool_scores[1] > -torch.inf).any()


@pytest.mark.parametrize("provider", BEAM)
def test_what_is_done_or_another_method_stays(provider):
    arguments = random_state("beam_step", 3, plain=True)
    arguments[3][0, 0] = SelectionMethod.SAMPLE
    arguments[-1][:] = torch.tensor([False, True, False])
    arguments[3][2, 1] = 2
    before = [each.clone() for each in arguments[5:]]
    assert_right("beam_step", provider, reference.beam_step, arguments, results=written("beam_step"))
    for old, new in zip(before, arguments[5:], strict=True):
        new = new.cpu()
        assert torch.equal(old[:2], new[:2])
        if old.dim() == 2:
            # the third beam is not in use
            assert torch.equal(old[2, 2], new[2, 2])


@pytest.mark.parametrize("provider", SAMPLE)
def test_nothing_left_ends_a_hypothesis(provider):
    """Every token came before and none may come again: the hypothesis ends with a score that says so."""
    rows = [{"no_repeat_ngram_size": 1, "temperature": temperature} for temperature in (0.0, 1.0)]
    buffers = run(provider, SelectionMethod.SAMPLE, [Table(3, 1)] * 2, rows, 1, 6)
    assert sorted(buffers.tokens[0, :3, 0].tolist()) == [0, 1, 2]
    assert buffers.lengths.flatten().tolist() == [4, 4]
    assert buffers.finished.all()
    assert (buffers.scores == -torch.inf).all()


@pytest.mark.parametrize("provider", BEAM)
def test_early_stopping_and_patience_differ(provider):
    """On some model each mode, and each patience, ends a search at another step."""
    lengths = {}
    for name, setting in {
        "at once": {"early_stopping": EarlyStopping.AT_ONCE},
        "impatient": {"early_stopping": EarlyStopping.AT_ONCE, "patience": 0.5},
        "patient": {"early_stopping": EarlyStopping.AT_ONCE, "patience": 2.0},
        "at bound": {},
        "never": {"early_stopping": EarlyStopping.NEVER},
    }.items():
        rows = [{"eos_id": 3, "max_length": 20, "length_penalty": 2.0, **setting}] * 8
        buffers = run(provider, SelectionMethod.BEAM, [Table(4, seed) for seed in range(8)], rows, 2, 20)
        lengths[name] = buffers.lengths[:, 0].tolist()
    assert sum(lengths["impatient"]) < sum(lengths["at once"]) < sum(lengths["patient"])
    assert sum(lengths["at once"]) < sum(lengths["at bound"]) < sum(lengths["never"])
