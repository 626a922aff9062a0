"""What the shared tests of the ops do not reach in the Triton kernels: edges of splits and tiles, and isolation.

Interpreted, the kernels use the smallest rows of tiles.py: splits of 32 positions, tiles of 16 or 32 query rows.
"""

from __future__ import annotations

import pytest
import torch
from ops_inputs import MAKE, attending, frequencies
from ops_matrix import device_of, moved
from ops_pointwise_inputs import MAKE as POINTWISE
from tolerance import assert_within, to_float64

from spear_fast.ops import providers
from spear_fast.ops.reference import cross_entropy as loss_reference
from spear_fast.ops.reference import decode_attention as reference

SELF = providers.get("decode_self_attention", "triton")
pytestmark = pytest.mark.skipif(SELF.missing() is not None, reason=str(SELF.missing()))


def run(op, arguments):
    """Returns what Triton's kernels make of these arguments."""
    row = providers.get(op, "triton")
    return row.function(*moved(arguments, device_of(row)))


def assert_right(op, arguments):
    definition = getattr(reference, op)
    truth, baseline = definition(*to_float64(arguments)), definition(*arguments)
    results = run(op, arguments)
    if op == "decode_self_attention":
        truth, baseline, results = [truth], [baseline], [results]
    for i, each in enumerate(zip(results, truth, baseline, strict=True)):
        assert_within(each[0].cpu(), *each[1:], what=f"{op}, result {i}")


@pytest.mark.parametrize("length", [31, 32, 33, 64, 65])
@pytest.mark.usefixtures("nan_filled_empty")
def test_edges_of_splits(length):
    lengths = torch.tensor([[length, 1, min(length, 32)], [length - 1, 33 % length, 0]])
    assert_right("decode_self_attention", MAKE["decode_self_attention"](length=length, lengths=lengths))
    lengths = torch.tensor([length, length - 1])
    sizes = {"beams": 2, "heads": 2, "source": length, "lengths": lengths}
    for more in ({"split": 32}, {"return_weights": True}):
        assert_right("decode_cross_attention", MAKE["decode_cross_attention"](**sizes, **more))


@pytest.mark.parametrize(
    ("beams", "heads", "groups", "tokens"),
    [
        pytest.param(4, 4, 1, 1, id="few rows full"),
        pytest.param(4, 4, 1, 2, id="many rows full"),
        pytest.param(3, 4, 1, 3, id="one row too many, gathered"),
        pytest.param(2, 17, 1, 2, id="gathered in two tiles a beam"),
        pytest.param(1, 9, 1, 4, id="one beam in two tiles"),
    ],
)
@pytest.mark.usefixtures("nan_filled_empty")
def test_edges_of_query_tiles(beams, heads, groups, tokens):
    sizes = {"utterances": 1, "beams": beams, "heads": heads, "groups": groups, "tokens": tokens, "length": 21}
    assert_right("decode_self_attention", MAKE["decode_self_attention"](**sizes, lengths=torch.full((1, beams), 20)))


def test_a_longer_buffer_changes_no_bit():
    """Splits are of a fixed size, and one that nobody reads counts for nothing."""
    query, freqs, *caches, ancestors, lengths = MAKE["decode_self_attention"](length=100, lengths=None)[:6]
    lengths = lengths.clamp(max=40)
    whole = run("decode_self_attention", attending((query, freqs, *caches, ancestors, lengths)))
    short = [cache[:, :, :40] for cache in caches]
    again = attending((query, freqs, *short, ancestors[:, :, :40], lengths))
    assert torch.equal(run("decode_self_attention", again), whole)


@pytest.mark.usefixtures("nan_filled_empty")
def test_splits_are_counted_in_what_the_owner_keeps():
    """Zeros before and after, whatever has arrived; splits past the length are waited for by nobody."""
    for lengths in ([65, 0], [1, 33], [64, 32]):
        query, *others = MAKE["decode_cross_attention"](
            beams=3, heads=2, source=65, lengths=torch.tensor(lengths), arrivals=4, split=16
        )
        assert_right("decode_cross_attention", (query, *others))
        found = run("decode_cross_attention", (query, *others))[0]
        for count in (4, 9, 3, 0):
            arrivals = torch.zeros(count, dtype=torch.int32, device=device_of(SELF))
            again = run("decode_cross_attention", (query, *others[:-3], arrivals, 16, None))[0]
            assert torch.equal(again, found)
            assert not arrivals.any()
            # the same buffer for the next layer
            assert torch.equal(run("decode_cross_attention", (query, *others[:-3], arrivals, 16, None))[0], found)
        # fewer utterances, as after some have left
        part = [each[1:] for each in (query, *others[:2])]
        alone = run("decode_cross_attention", (*part, *others[2:4], others[4][1:], *others[5:]))[0]
        assert torch.equal(alone, found[1:])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("cache", [2, 3], ids=["key", "value"])
def test_a_spoilt_hypothesis_is_spoilt_alone(cache, poison):
    """The beams of an utterance share a tile; NaN or infinity that one of them wrote stays its own."""
    arguments = list(MAKE["decode_self_attention"](lengths=torch.full((2, 3), 9)))
    ancestors = arguments[4]
    ancestors[:, :, :9] = torch.arange(3, dtype=torch.uint8)[:, None]
    wanted = run("decode_self_attention", arguments).clone()
    arguments[cache][1, :, 8] = poison
    found = run("decode_self_attention", arguments)
    siblings = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.equal(found[siblings], wanted[siblings])
    assert not found[~siblings].isfinite().all()


def test_integers_outside_the_buffers_touch_nothing():
    """A direct caller's wrong positions, lengths or ancestors are not followed out of the memory."""
    key, value, freqs, positions, *caches = MAKE["append_kv"](rows=3, length=5, positions=torch.tensor([-1, 5, 4]))
    before = [cache.clone() for cache in caches]
    there = moved((key, value, freqs, positions, *caches), device_of(SELF))
    providers.get("append_kv", "triton").function(*there)
    for cache, old in zip(there[-2:], before, strict=True):
        changed = (cache.cpu() != old).any(-1).any(1)
        assert changed.nonzero().tolist() == [[2, 4]]
    for beams in (3, 40):
        arguments = list(MAKE["decode_self_attention"](utterances=1, beams=beams, heads=1, groups=1))
        arguments[4] = torch.full_like(arguments[4], 255)
        arguments[5] = torch.full_like(arguments[5], 1000)
        run("decode_self_attention", arguments)


def test_rotation_far_out():
    """Angles of thousands of radians, as long sequences have, either way."""
    x, freqs, _, _ = POINTWISE["rotary"](shape=(64,), heads=1, size=2)
    positions = torch.randint(-6000, 6000, (64,))
    x = torch.tensor([1.0, 0.0]).expand(64, 1, 2)
    found = run("rotary", (x, torch.ones_like(freqs), positions, False)).cpu()[:, 0]
    wanted = torch.stack((positions.double().cos(), positions.double().sin()), -1)
    assert (found - wanted).abs().max() < 1.5e-7


def test_no_more_logits_than_a_chunk(monkeypatch):
    """Rows are taken in turn where their logits are more than may be held; the gradients are the same."""
    from spear_fast.kernels import cross_entropy as kernels

    arguments = POINTWISE["cross_entropy_backward"](rows=40, vocab=7, dtype=torch.float32)
    whole = run("cross_entropy_backward", arguments)
    monkeypatch.setattr(kernels, "CHUNK", 16 * 7)
    parts = run("cross_entropy_backward", arguments)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close([each.cpu() for each in whole], [*loss_reference.cross_entropy_backward(*arguments)])


def test_small_gradients_of_losses_survive_float16():
    """A mean over very many labels has gradients that float16 cannot hold before they are added up."""
    grad, *others = POINTWISE["cross_entropy_backward"](rows=9, dtype=torch.float16, ignored="none")
    full = run("cross_entropy_backward", (torch.ones_like(grad), *others))[1].float()
    tiny = run("cross_entropy_backward", (torch.full_like(grad, 2.0**-12), *others))[1].float()
    torch.testing.assert_close(tiny * 2.0**12, full, rtol=0, atol=full.abs().max().item() * 2e-3)


def test_rows_that_do_not_fit_a_program_are_left_to_others():
    row = providers.get("rms_norm", "triton")
    inputs = providers.ProviderQuery(device_of(row), torch.float32, 8193)
    assert row.refusal(inputs) == "holds whole rows, of at most 8192 numbers"
    assert row.refusal(inputs._replace(size=8192)) is None
    assert "not torch.float64" in row.refusal(inputs._replace(dtype=torch.float64))


def test_frequencies_may_be_strided():
    query, freqs, *others = MAKE["decode_self_attention"]()
    apart = torch.stack((freqs, freqs * torch.nan), 1)[:, 0]
    assert apart.stride(0) == 2
    assert torch.equal(frequencies(8), apart)
    wanted = run("decode_self_attention", (query, freqs, *others))
    assert torch.equal(run("decode_self_attention", (query, apart, *others)), wanted)
