"""Every provider of every op computes what the definition says, in every dtype and shape."""

from __future__ import annotations

import math

import ops_inputs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_inputs import DTYPES, MAKE, OPS, function_of
from tolerance import assert_within, to_float64

from spear_fast import ops
from spear_fast.ops import providers
from spear_fast.ops.reference import decode_attention as reference

PROVIDERS = [(op, name) for op in OPS for name in providers.names(op)]

SHAPES = {
    "append_kv": [
        {},
        {"rows": 1, "groups": 1, "length": 1, "size": 2},
        {"rows": 7, "groups": 3, "length": 13, "size": 64},
        {"rows": 70, "groups": 2, "length": 5, "size": 10},
        {"rows": 0},
        {"strided": True, "size": 34},
    ],
    "decode_self_attention": [
        {},
        {"utterances": 1, "beams": 1, "heads": 1, "groups": 1, "length": 1, "size": 2},
        {"utterances": 3, "beams": 4, "heads": 8, "groups": 2, "length": 65, "size": 64},
        {"utterances": 2, "beams": 5, "heads": 6, "groups": 6, "length": 130, "size": 34},
        {"utterances": 1, "beams": 10, "heads": 7, "groups": 1, "length": 63, "size": 80},
        {"utterances": 0},
        {"strided": True, "size": 16},
        {"lengths": torch.zeros(2, 3, dtype=torch.long)},
        {"lengths": torch.full((2, 3), 11)},
    ],
    "decode_cross_attention": [
        {},
        {"utterances": 1, "beams": 1, "heads": 1, "source": 1, "size": 1},
        {"utterances": 3, "beams": 4, "heads": 8, "source": 63, "size": 64},
        {"utterances": 2, "beams": 5, "heads": 3, "source": 131, "size": 35},
        {"utterances": 1, "beams": 10, "heads": 2, "source": 64, "size": 80},
        {"utterances": 2, "beams": 7, "heads": 2, "source": 0},
        {"utterances": 0},
        {"strided": True, "size": 16},
        {"lengths": torch.zeros(2, dtype=torch.long)},
        {"lengths": torch.full((2,), 11)},
    ],
}
CASES = [(op, name, shape) for op, name in PROVIDERS for shape in SHAPES[op]]


def compute(op, function, arguments):
    """Returns what the op makes: its result, or the caches that it wrote."""
    result = function(*arguments)
    return list(arguments[-2:]) if op == "append_kv" else [result]


def assert_right(op, provider, arguments):
    """Compares a provider with the definition in float64, by the error that the definition makes in the same dtype."""
    function, definition = function_of(op, provider), getattr(reference, op)
    copies = [argument.clone() for argument in arguments]
    truths = compute(op, definition, to_float64(copies))
    yardsticks = compute(op, definition, [argument.clone() for argument in arguments])
    for result, truth, yardstick in zip(compute(op, function, arguments), truths, yardsticks, strict=True):
        assert_within(result, truth, yardstick, what=op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "provider", "shape"), CASES, ids=lambda value: str(value).replace("torch.", ""))
@pytest.mark.usefixtures("nan_filled_empty")
def test_result(op, provider, shape, dtype):
    assert_right(op, provider, MAKE[op](**shape, dtype=dtype))


@pytest.mark.parametrize(("op", "provider"), [pair for pair in PROVIDERS if pair[1] != "reference"])
@pytest.mark.usefixtures("nan_filled_empty")
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(op, provider, data):
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    shape = {"dtype": data.draw(st.sampled_from(DTYPES)), "strided": data.draw(st.booleans())}
    if op == "append_kv":
        shape |= {"rows": draw(0, 40), "groups": draw(1, 4), "length": draw(1, 20), "size": 2 * draw(1, 40)}
    elif op == "decode_self_attention":
        groups = draw(1, 3)
        shape |= {"groups": groups, "heads": groups * draw(1, 5), "length": draw(1, 140), "size": 2 * draw(1, 40)}
        shape |= {"utterances": draw(1, 4), "beams": draw(1, 11)}
    else:
        shape |= {"heads": draw(1, 4), "source": draw(0, 140), "size": draw(1, 80)}
        shape |= {"utterances": draw(1, 4), "beams": draw(1, 11)}
    assert_right(op, provider, MAKE[op](**shape))


@pytest.mark.parametrize("provider", providers.names("append_kv"))
def test_rotation_by_hand(provider):
    """At frequency pi / 2, position 1 turns (1, 0) into (0, 1): pairs are neighbours, not halves."""
    key = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])
    caches = torch.zeros(2, 1, 1, 2, 4).unbind()
    function_of("append_kv", provider)(key, key * 3, torch.tensor([math.pi / 2, math.pi]), torch.tensor([1]), *caches)
    torch.testing.assert_close(caches[0][0, 0], torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, -1.0]]))
    assert caches[1][0, 0].tolist() == [[0.0] * 4, [3.0, 0.0, 0.0, 3.0]]


@pytest.mark.parametrize("provider", providers.names("append_kv"))
def test_append_leaves_all_else(provider):
    arguments = MAKE["append_kv"](rows=5, length=9, positions=torch.tensor([0, 8, 3, 3, 1]))
    before = [cache.clone() for cache in arguments[-2:]]
    function_of("append_kv", provider)(*arguments)
    for cache, old in zip(arguments[-2:], before, strict=True):
        changed = (cache != old).any(-1).any(1)
        assert changed.nonzero().tolist() == [[0, 0], [1, 8], [2, 3], [3, 3], [4, 1]]


@pytest.mark.parametrize("provider", providers.names("decode_self_attention"))
def test_self_attention_is_attention_over_gathered_caches(provider):
    """Following ancestors gives what torch's attention gives when each hypothesis has its own gathered cache."""
    utterances, beams, heads, groups, length, size = 2, 3, 4, 2, 9, 16
    lengths = torch.tensor([[9, 4, 1], [5, 5, 8]])
    query, freqs, cache_key, cache_value, ancestors, lengths = MAKE["decode_self_attention"](
        utterances, beams, heads, groups, length, size, lengths=lengths
    )
    out = function_of("decode_self_attention", provider)(query, freqs, cache_key, cache_value, ancestors, lengths)
    turned = reference.rotate(query, freqs, lengths - 1)
    for utterance in range(utterances):
        for beam in range(beams):
            count = int(lengths[utterance, beam])
            slots = ancestors[utterance, beam, :count].long() + utterance * beams
            key, value = (
                cache[slots, :, torch.arange(count)].transpose(0, 1).repeat_interleave(heads // groups, 0)
                for cache in (cache_key, cache_value)
            )
            wanted = torch.nn.functional.scaled_dot_product_attention(turned[utterance, beam, :, None], key, value)
            torch.testing.assert_close(out[utterance, beam], wanted[:, 0])


@pytest.mark.parametrize("provider", providers.names("decode_cross_attention"))
def test_cross_attention_is_attention_with_null_key(provider):
    lengths = torch.tensor([0, 11])
    query, key, value, null_key, null_value, lengths = MAKE["decode_cross_attention"](lengths=lengths)
    out = function_of("decode_cross_attention", provider)(query, key, value, null_key, null_value, lengths)
    torch.testing.assert_close(out[0], null_value.expand_as(out[0]))
    keys, values = (torch.cat((null[:, None], full[1]), 1) for null, full in ((null_key, key), (null_value, value)))
    wanted = torch.nn.functional.scaled_dot_product_attention(query[1].transpose(0, 1), keys, values)
    torch.testing.assert_close(out[1], wanted.transpose(0, 1))


@pytest.mark.parametrize(("op", "provider"), PROVIDERS[2:])
def test_nothing_past_the_lengths_counts(op, provider):
    """Unwritten cache memory may hold anything, NaN too; a source's padding any finite numbers."""
    arguments = list(MAKE[op]())
    wanted = function_of(op, provider)(*arguments)
    if op == "decode_self_attention":
        _, _, key, value, ancestors, lengths = arguments
        written = torch.zeros(2, 3, key.shape[2], dtype=torch.bool)
        for utterance, beam in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            for position in range(int(lengths[utterance, beam])):
                written[utterance, int(ancestors[utterance, beam, position]), position] = True
        unread, junk = ~written.flatten(0, 1)[:, None, :, None], torch.nan
    else:
        _, key, value, _, _, lengths = arguments
        unread, junk = (torch.arange(key.shape[2]) >= lengths[:, None])[:, None, :, None], 1e9
    key.masked_fill_(unread, junk)
    value.masked_fill_(unread, junk)
    assert torch.equal(function_of(op, provider)(*arguments), wanted)


@pytest.mark.parametrize(("op", "provider"), PROVIDERS[2:])
def test_a_batch_is_its_utterances_one_by_one(op, provider):
    """The same bits whatever else is in the batch."""
    if provider == "reference":
        pytest.skip("a product of another size may round otherwise in plain torch")
    function = function_of(op, provider)
    beams = 3
    arguments = MAKE[op](utterances=4, beams=beams, length=70) if "self" in op else MAKE[op](utterances=4, source=70)
    whole = function(*arguments)
    for i in range(4):
        if "self" in op:
            query, freqs, key, value, ancestors, lengths = arguments
            rows = slice(i * beams, (i + 1) * beams)
            one = query[i : i + 1], freqs, key[rows], value[rows], ancestors[i : i + 1], lengths[i : i + 1]
        else:
            query, key, value, *null, lengths = arguments
            one = *(tensor[i : i + 1] for tensor in (query, key, value)), *null, lengths[i : i + 1]
        assert torch.equal(function(*one)[0], whole[i])


@pytest.mark.skipif(torch.get_num_threads() > 1, reason="wants to set the number of threads itself")
@pytest.mark.parametrize("op", OPS)
def test_threads_change_nothing(op):
    function = function_of(op, "cpu")
    arguments = ops_inputs.MAKE[op]()
    one = [tensor.clone() for tensor in compute(op, function, arguments)]
    try:
        torch.set_num_threads(3)
        many = compute(op, function, arguments)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_cached_steps_equal_one_pass():
    """Appending token by token and attending each time gives causal attention over the whole sequence."""
    rows, heads, groups, length, size = 2, 4, 2, 12, 16
    query, key, value = (torch.randn(rows, length, count, size) for count in (heads, groups, groups))
    freqs = ops_inputs.frequencies(size)
    caches = [torch.full((rows, groups, length, size), torch.nan) for _ in range(2)]
    ancestors = torch.zeros(rows, 1, length, dtype=torch.uint8)
    outs = []
    for t in range(length):
        ops.append_kv(key[:, t], value[:, t], freqs, torch.full((rows,), t), *caches)
        outs.append(
            ops.decode_self_attention(query[:, t : t + 1], freqs, *caches, ancestors, torch.full((rows, 1), t + 1))
        )
    positions = torch.arange(length).expand(rows, -1)
    turned = [reference.rotate(heads, freqs, positions).transpose(1, 2) for heads in (query, key)]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *turned, value.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(torch.cat(outs, 1), wanted.transpose(1, 2))
