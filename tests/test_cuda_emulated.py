"""The logic of the CUDA kernels, run on the CPU, computes what the definition says."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import emulator
from ops_inputs import MAKE
from tolerance import assert_within, to_float64

from spear_fast.ops.cuda.decode_self_attention import decode_self_attention
from spear_fast.ops.reference import decode_attention as reference

__all__ = ["emulator"]

SELF_ATTENTION = {
    "default": {},
    "smallest": {"utterances": 1, "beams": 1, "heads": 1, "groups": 1, "length": 1, "size": 2},
    "one row": {"utterances": 2, "beams": 1, "heads": 2, "groups": 2, "length": 131, "size": 64},
    "five beams": {"utterances": 2, "beams": 5, "heads": 2, "groups": 2, "length": 129, "size": 64},
    "several tiles": {"utterances": 1, "beams": 5, "heads": 8, "groups": 2, "length": 40, "size": 64},
    "tokens": {"utterances": 2, "beams": 2, "tokens": 3, "heads": 4, "groups": 2, "length": 17, "size": 16},
    "three chunks": {"utterances": 1, "beams": 3, "heads": 1, "groups": 1, "length": 270, "size": 32},
    "unaligned": {"utterances": 1, "beams": 2, "heads": 2, "groups": 1, "length": 130, "size": 34},
    "128 wide": {"utterances": 1, "beams": 2, "heads": 2, "groups": 2, "length": 20, "size": 128},
    "strided": {"strided": True, "tokens": 2, "size": 16},
    "before the first": {"tokens": 4, "lengths": torch.tensor([[0, 1, 2], [3, 4, 5]])},
    "empty": {"lengths": torch.zeros(2, 3, dtype=torch.long)},
    "no beams": {"utterances": 0},
}


SHORT = ("default", "several tiles", "three chunks", "unaligned")
CASES = [(name, torch.float32) for name in SELF_ATTENTION] + [(name, torch.bfloat16) for name in SHORT]


@pytest.mark.parametrize(("name", "dtype"), [*CASES, ("five beams", torch.float16)], ids=str)
@pytest.mark.usefixtures("nan_filled_empty", "emulator")
def test_self_attention(name, dtype):
    arguments = MAKE["decode_self_attention"](**SELF_ATTENTION[name], dtype=dtype)
    truth = reference.decode_self_attention(*to_float64(arguments))
    baseline = reference.decode_self_attention(*[tensor.clone() for tensor in arguments])
    assert_within(decode_self_attention(*arguments), truth, baseline)


def test_the_order_of_threads_changes_nothing(emulator):
    """A barrier that is missing would let one thread read what another has yet to write."""
    arguments = MAKE["decode_self_attention"](utterances=2, beams=3, length=140, size=64)
    results = []
    for emulator.seed in range(3):
        results.append(decode_self_attention(*arguments))
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.usefixtures("emulator")
def test_nothing_past_the_lengths_is_read():
    """Unwritten memory may hold NaN, and beam indices that do not exist."""
    query, freqs, key, value, ancestors, lengths = MAKE["decode_self_attention"](length=131)
    wanted = decode_self_attention(query, freqs, key, value, ancestors, lengths)
    written = torch.zeros(2, 3, 131, dtype=torch.bool)
    for utterance, beam in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        for position in range(int(lengths[utterance, beam])):
            written[utterance, int(ancestors[utterance, beam, position]), position] = True
    unread = ~written.flatten(0, 1)[:, None, :, None]
    key.masked_fill_(unread, torch.nan)
    value.masked_fill_(unread, torch.nan)
    assert torch.equal(decode_self_attention(query, freqs, key, value, ancestors, lengths), wanted)


@pytest.mark.usefixtures("emulator")
def test_a_wrong_table_stays_inside_the_caches():
    """Beam indices and lengths that are out of range give wrong numbers, not a read outside."""
    *tensors, ancestors, lengths = MAKE["decode_self_attention"](lengths=torch.full((2, 3), 11))
    last = torch.full_like(ancestors, 2)
    wanted = decode_self_attention(*tensors, last, lengths)
    assert torch.equal(decode_self_attention(*tensors, torch.full_like(ancestors, 255), lengths + 1000), wanted)


@pytest.mark.usefixtures("emulator")
def test_one_poisoned_beam_leaves_the_others_alone():
    """What one hypothesis reads does not reach another, not even times zero."""
    arguments = MAKE["decode_self_attention"](utterances=1, beams=3, length=20, lengths=torch.tensor([[20, 12, 5]]))
    *_, value, ancestors, _ = arguments
    ancestors[0] = torch.arange(3)[:, None]
    wanted = decode_self_attention(*arguments)
    value[0] = torch.inf
    found = decode_self_attention(*arguments)
    assert not found[0, 0].isfinite().any()
    assert torch.equal(found[0, 1:], wanted[0, 1:])


@pytest.mark.usefixtures("emulator")
def test_a_batch_is_its_utterances_one_by_one():
    query, freqs, key, value, ancestors, lengths = MAKE["decode_self_attention"](utterances=3, length=140)
    whole = decode_self_attention(query, freqs, key, value, ancestors, lengths)
    for i in range(3):
        rows = slice(3 * i, 3 * i + 3)
        one = query[i : i + 1], freqs, key[rows], value[rows], ancestors[i : i + 1], lengths[i : i + 1]
        assert torch.equal(decode_self_attention(*one)[0], whole[i])


def test_what_is_launched(emulator):
    arguments = MAKE["decode_self_attention"](beams=5, heads=8, groups=2, length=300, size=64, dtype=torch.bfloat16)
    decode_self_attention(*arguments)
    first, merge = emulator.launched
    assert first.kernel == "spear_fast::decode_self_attention<spear_fast::BFloat16, 8, 8, true>"
    # utterances × key heads × chunks × tiles of 20 query rows
    assert (first.blocks, first.threads) == (2 * 2 * 3 * 3, 128)
    assert merge.kernel == "spear_fast::merge_self_attention<spear_fast::BFloat16>"
    assert merge.blocks == 2 * 5 * 8 // 4


def test_caches_must_be_dense_in_their_rows():
    query, freqs, key, value, ancestors, lengths = MAKE["decode_self_attention"]()
    sparse = torch.stack((key, key), -1)[..., 0]
    with pytest.raises(ValueError, match=r"the caches must be contiguous in their last dimension, got .*; call"):
        decode_self_attention(query, freqs, sparse, value, ancestors, lengths)
