"""Every provider of the decoding ops computes what the definition says, in every dtype and shape."""

from __future__ import annotations

import math

import ops_inputs
import ops_matrix
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_inputs import MAKE, OPS, attending, made
from ops_matrix import device_of, moved, runnable

from spear_fast import ops
from spear_fast.ops import backends, providers
from spear_fast.ops.reference import decode_attention as reference

ATTENTIONS = OPS[1:]

SHAPES = {
    "append_kv": [
        {},
        {"rows": 1, "groups": 1, "length": 1, "size": 2},
        {"rows": 7, "tokens": 5, "groups": 3, "length": 13, "size": 64},
        {"rows": 70, "groups": 2, "length": 5, "size": 10},
        {"rows": 2, "tokens": 6, "length": 6, "size": 16},
        {"rows": 0},
        {"tokens": 0},
        {"strided": True, "tokens": 3, "size": 34},
    ],
    "decode_self_attention": [
        {},
        {"utterances": 1, "beams": 1, "heads": 1, "groups": 1, "length": 1, "size": 2},
        {"utterances": 3, "beams": 4, "heads": 8, "groups": 2, "length": 65, "size": 64},
        {"utterances": 2, "beams": 5, "heads": 6, "groups": 6, "length": 130, "size": 34},
        {"utterances": 1, "beams": 10, "heads": 7, "groups": 1, "length": 63, "size": 80},
        {"utterances": 3, "beams": 1, "tokens": 5, "heads": 4, "groups": 2, "length": 67, "size": 64},
        {"utterances": 2, "beams": 3, "tokens": 3, "heads": 3, "groups": 1, "length": 9, "size": 16},
        # tokens before the first position
        {"tokens": 4, "lengths": torch.tensor([[0, 1, 2], [3, 4, 5]])},
        {"tokens": 11, "beams": 2, "length": 11, "lengths": torch.tensor([[11, 10], [11, 11]])},
        {"utterances": 0},
        {"tokens": 0},
        {"strided": True, "tokens": 2, "size": 16},
        {"lengths": torch.zeros(2, 3, dtype=torch.long)},
        {"lengths": torch.full((2, 3), 11)},
        # with what is new written in the same call
        {"append": True},
        {"append": True, "dim": 24},
        {"dim": 5},
        {"utterances": 3, "beams": 4, "heads": 8, "groups": 2, "length": 65, "size": 64, "append": True, "dim": 96},
        {"utterances": 2, "beams": 5, "heads": 6, "groups": 6, "length": 130, "size": 34, "append": True},
        {"utterances": 2, "beams": 3, "tokens": 3, "heads": 9, "groups": 1, "length": 40, "append": True, "dim": 16},
        {"tokens": 7, "heads": 6, "lengths": torch.tensor([[7, 8, 9], [10, 11, 7]]), "append": True, "dim": 16},
        {"length": 1, "append": True},
        {"utterances": 0, "append": True, "dim": 3},
        {"tokens": 0, "append": True, "dim": 3},
        {"strided": True, "tokens": 2, "size": 16, "append": True, "dim": 40},
    ],
    "decode_cross_attention": [
        {},
        {"utterances": 1, "beams": 1, "heads": 1, "source": 1, "size": 1, "return_weights": True},
        {"utterances": 3, "beams": 4, "heads": 8, "source": 63, "size": 64, "return_weights": True},
        {"utterances": 2, "beams": 5, "heads": 3, "source": 131, "size": 35},
        {"utterances": 1, "beams": 10, "heads": 2, "source": 64, "size": 80, "return_weights": True},
        {"utterances": 3, "beams": 2, "source": 131, "size": 16, "return_weights": True, "split": 32, "arrivals": 99},
        {"utterances": 2, "beams": 40, "heads": 2, "source": 33, "size": 35, "split": 17, "arrivals": 1},
        {"scaled": True, "return_weights": True},
        {"utterances": 3, "beams": 5, "source": 70, "size": 64, "split": 32, "arrivals": 12, "scaled": True},
        {"utterances": 1, "beams": 40, "source": 67, "size": 35, "scaled": True, "strided": True},
        {"scaled": True, "source": 0, "utterances": 1},
        {"scaled": True, "utterances": 0},
        {"utterances": 2, "beams": 7, "heads": 2, "source": 0, "return_weights": True},
        {"utterances": 0, "return_weights": True},
        {"strided": True, "size": 16, "return_weights": True},
        {"lengths": torch.zeros(2, dtype=torch.long), "return_weights": True},
        {"lengths": torch.full((2,), 11)},
        # of a residual that was not normed
        {"dim": 24, "return_weights": True},
        {"utterances": 2, "beams": 20, "heads": 2, "source": 33, "size": 16, "split": 16, "arrivals": 99, "dim": 200},
    ],
}
CASES = [(*row, shape) for row in runnable(*OPS) for shape in SHAPES[row[0]]]
PROVIDERS = list(dict.fromkeys(row[:2] for row in runnable(*OPS)))


def of(*wanted):
    """Returns (op, provider) for all that can run here and whose op is one of these."""
    return [row for row in PROVIDERS if row[0] in wanted]


def assert_right(op, provider, arguments):
    ops_matrix.assert_right(
        op,
        provider,
        getattr(reference, op),
        arguments,
        results=lambda result, arguments: made(op, result, arguments),
    )


def computed(op, provider, arguments):
    """Returns what a provider makes of these arguments where it is tested, back on the CPU."""
    row = providers.get(op, provider)
    there = moved(arguments, device_of(row))
    return [tensor.cpu() for tensor in made(op, row.function(*there), there)]


@pytest.mark.parametrize(("op", "provider", "dtype", "shape"), CASES, ids=lambda v: str(v).replace("torch.", ""))
@pytest.mark.usefixtures("nan_filled_empty")
def test_result(op, provider, dtype, shape):
    assert_right(op, provider, MAKE[op](**shape, dtype=dtype))


@pytest.mark.parametrize(("op", "provider"), [row for row in PROVIDERS if row[1] != "reference"])
@pytest.mark.usefixtures("nan_filled_empty")
@settings(max_examples=8 if backends.interpreted() else 40, deadline=None)
@given(data=st.data())
def test_any_shape(op, provider, data):
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dtypes = [row[2] for row in runnable(op) if row[1] == provider]
    shape = {"dtype": data.draw(st.sampled_from(dtypes)), "strided": data.draw(st.booleans())}
    if op == "append_kv":
        tokens = draw(0, 6)
        shape |= {"rows": draw(0, 40), "tokens": tokens, "groups": draw(1, 4), "size": 2 * draw(1, 40)}
        shape |= {"length": draw(max(tokens, 1), 20)}
    elif op == "decode_self_attention":
        groups = draw(1, 3)
        shape |= {"groups": groups, "heads": groups * draw(1, 5), "length": draw(1, 140), "size": 2 * draw(1, 40)}
        shape |= {"utterances": draw(1, 4), "beams": draw(1, 11), "tokens": draw(1, min(6, shape["length"]))}
        shape |= {"append": data.draw(st.booleans()), "dim": data.draw(st.sampled_from([None, 1, 7, 130]))}
    else:
        shape |= {"heads": draw(1, 4), "source": draw(0, 140), "size": draw(1, 80)}
        shape |= {"utterances": draw(1, 4), "beams": draw(1, 11), "return_weights": data.draw(st.booleans())}
        shape |= {"dim": data.draw(st.sampled_from([None, 1, 7, 130]))}
        shape |= {"split": draw(0, 70), "arrivals": data.draw(st.sampled_from([None, 1, 999]))}
        shape |= {"scaled": data.draw(st.booleans())}
    assert_right(op, provider, MAKE[op](**shape))


@pytest.mark.parametrize(("op", "provider"), of("append_kv"))
def test_rotation_by_hand(op, provider):
    """At frequency pi / 2, position 1 turns (1, 0) into (0, 1): pairs are neighbours, not halves."""
    key = torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(1, 2, 1, 4)
    caches = torch.zeros(2, 1, 1, 4, 4).unbind()
    freqs = torch.tensor([math.pi / 2, math.pi])
    keys, values = computed(op, provider, [key, key * 3, freqs, torch.tensor([1]), *caches])
    rows = [[0.0] * 4, [0.0, 1.0, 0.0, -1.0], [-1.0, 0.0, 0.0, 1.0], [0.0] * 4]
    torch.testing.assert_close(keys[0, 0], torch.tensor(rows))
    assert values[0, 0].tolist() == [[0.0] * 4, [3.0, 0.0, 0.0, 3.0], [3.0, 0.0, 0.0, 3.0], [0.0] * 4]


@pytest.mark.parametrize(("op", "provider"), of("append_kv"))
def test_append_leaves_all_else(op, provider):
    arguments = MAKE[op](rows=5, tokens=2, length=9, positions=torch.tensor([0, 7, 3, 3, 1]))
    before = [cache.clone() for cache in arguments[-2:]]
    for cache, old in zip(computed(op, provider, arguments), before, strict=True):
        changed = (cache != old).any(-1).any(1)
        written = [(0, 0), (0, 1), (1, 7), (1, 8), (2, 3), (2, 4), (3, 3), (3, 4), (4, 1), (4, 2)]
        assert [tuple(place) for place in changed.nonzero().tolist()] == written


@pytest.mark.parametrize(("op", "provider"), of("append_kv", "decode_self_attention"))
def test_tokens_together_are_tokens_one_by_one(op, provider):
    """The rows of a verification are those that single steps would have made."""
    tokens = 4
    if op == "append_kv":
        key, value, freqs, positions, *caches = MAKE[op](tokens=tokens, length=9, size=16)
        copies = [cache.clone() for cache in caches]
        together = computed(op, provider, [key, value, freqs, positions, *caches])
        for t in range(tokens):
            one = slice(t, t + 1)
            copies = computed(op, provider, [key[:, one], value[:, one], freqs, positions + t, *copies])
    else:
        counts = torch.tensor([[70, 4, 9], [66, 65, 8]])
        query, *others, lengths = MAKE[op](tokens=tokens, length=70, lengths=counts)[:6]
        (together,) = computed(op, provider, attending([query, *others, lengths]))
        counts = [lengths - (tokens - 1 - t) for t in range(tokens)]
        calls = [attending([query[:, :, t : t + 1], *others, count]) for t, count in enumerate(counts)]
        outs = [computed(op, provider, call)[0] for call in calls]
        together, copies = [together], [torch.cat(outs, dim=2)]
    torch.testing.assert_close(together, copies, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("op", "provider"), of("decode_self_attention"))
def test_self_attention_is_attention_over_gathered_caches(op, provider):
    """Following ancestors gives what torch's attention gives when each hypothesis has its own gathered cache."""
    utterances, beams, tokens, heads, groups, length, size = 2, 3, 2, 4, 2, 9, 16
    lengths = torch.tensor([[9, 4, 2], [5, 5, 8]])
    arguments = MAKE[op](utterances, beams, tokens, heads, groups, length, size, lengths=lengths)
    query, freqs, cache_key, cache_value, ancestors, lengths = arguments[:6]
    (out,) = computed(op, provider, arguments)
    for utterance in range(utterances):
        for beam in range(beams):
            count = int(lengths[utterance, beam])
            rows = ancestors[utterance, beam, :count].long() + utterance * beams
            key, value = (
                cache[rows, :, torch.arange(count)].transpose(0, 1).repeat_interleave(heads // groups, 0)
                for cache in (cache_key, cache_value)
            )
            position = torch.arange(count - tokens, count)
            turned = reference.rotate(query[utterance, beam], freqs, position).transpose(0, 1)
            reads = torch.arange(count) <= position[:, None]
            wanted = torch.nn.functional.scaled_dot_product_attention(turned, key, value, attn_mask=reads)
            torch.testing.assert_close(out[utterance, beam], wanted.transpose(0, 1))


@pytest.mark.parametrize(("op", "provider"), of("decode_self_attention"))
def test_no_token_sees_those_behind_it(op, provider):
    """Not even where they are NaN."""
    arguments = MAKE[op](tokens=3, lengths=torch.full((2, 3), 11))
    ancestors, value = arguments[4], arguments[3]
    # each its own beam index, as the steps leave it
    ancestors[:, :, -2:] = torch.arange(3, dtype=torch.uint8)[:, None]
    (wanted,) = computed(op, provider, arguments)
    value[:, :, -1] = torch.nan
    arguments[2][:, :, -1] = torch.nan
    (out,) = computed(op, provider, arguments)
    assert out[:, :, -1].isnan().all()
    assert torch.equal(out[:, :, :-1], wanted[:, :, :-1])


@pytest.mark.parametrize(("op", "provider"), of("decode_cross_attention"))
def test_cross_attention_is_attention_with_null_key(op, provider):
    lengths = torch.tensor([0, 11])
    arguments = MAKE[op](lengths=lengths, return_weights=True)
    query, key, value, null_key, null_value, *_ = arguments
    out, weights = computed(op, provider, arguments)
    torch.testing.assert_close(out[0], null_value.expand_as(out[0]))
    keys, values = (torch.cat((null[:, None], full[1]), 1) for null, full in ((null_key, key), (null_value, value)))
    wanted = torch.nn.functional.scaled_dot_product_attention(query[1].transpose(0, 1), keys, values)
    torch.testing.assert_close(out[1], wanted.transpose(0, 1))
    # the weights say where the output comes from: the null position first
    assert weights[0, ..., 0].eq(1).all()
    assert weights[0, ..., 1:].eq(0).all()
    torch.testing.assert_close((weights[1].transpose(0, 1) @ values).transpose(0, 1), out[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize(("op", "provider"), of(*ATTENTIONS))
def test_nothing_past_the_lengths_counts(op, provider):
    """Unwritten cache memory and a source's padding may hold anything, NaN too."""
    arguments = MAKE[op](**({"tokens": 2} if op == "decode_self_attention" else {"return_weights": True}))
    wanted = computed(op, provider, arguments)
    if op == "decode_self_attention":
        _, _, key, value, ancestors, lengths = arguments[:6]
        written = torch.zeros(2, 3, key.shape[2], dtype=torch.bool)
        for utterance, beam in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            for position in range(int(lengths[utterance, beam])):
                written[utterance, int(ancestors[utterance, beam, position]), position] = True
        unread = ~written.flatten(0, 1)[:, None, :, None]
    else:
        key, value, lengths = arguments[1], arguments[2], arguments[5]
        unread = (torch.arange(key.shape[2]) >= lengths[:, None])[:, None, :, None]
    assert unread.any()
    key.masked_fill_(unread, torch.nan)
    value.masked_fill_(unread, torch.nan)
    for before, after in zip(wanted, computed(op, provider, arguments), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(("op", "provider"), of(*ATTENTIONS))
def test_a_batch_is_its_utterances_one_by_one(op, provider):
    """The same bits whatever else is in the batch."""
    if provider == "reference":
        pytest.skip("a product of another size may round otherwise in plain torch")
    beams = 3
    kept = op == "decode_self_attention"
    arguments = MAKE[op](
        utterances=4, beams=beams, **({"length": 70, "tokens": 2} if kept else {"source": 70, "split": 16})
    )
    whole = computed(op, provider, arguments)[0]
    for i in range(4):
        if kept:
            query, freqs, key, value, ancestors, lengths = arguments[:6]
            rows = slice(i * beams, (i + 1) * beams)
            one = attending((query[i : i + 1], freqs, key[rows], value[rows], ancestors[i : i + 1], lengths[i : i + 1]))
        else:
            query, key, value, *null, lengths, return_weights, _, arrivals, split, _ = arguments
            one = *(tensor[i : i + 1] for tensor in (query, key, value)), *null, lengths[i : i + 1], return_weights
            one = *one, None, arrivals, split, None
        assert torch.equal(computed(op, provider, one)[0][0], whole[i])


@pytest.mark.skipif(torch.get_num_threads() > 1, reason="wants to set the number of threads itself")
@pytest.mark.parametrize("op", OPS)
def test_threads_change_nothing(op):
    arguments = MAKE[op](**({} if op == "decode_cross_attention" else {"tokens": 2}))
    one = [tensor.clone() for tensor in computed(op, "cpu", arguments)]
    try:
        torch.set_num_threads(3)
        many = computed(op, "cpu", arguments)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("provider", [provider for _, provider in of("decode_self_attention")])
def test_cached_steps_equal_one_pass(provider, count):
    """Appending some tokens and attending, again and again, gives causal attention over the whole sequence."""
    rows, heads, groups, length, size = 2, 4, 2, 12, 16
    query, key, value = (torch.randn(rows, length, each, size) for each in (heads, groups, groups))
    freqs = ops_inputs.frequencies(size)
    caches = [torch.full((rows, groups, length, size), torch.nan) for _ in range(2)]
    ancestors = torch.zeros(rows, 1, length, dtype=torch.uint8)
    outs = []
    for t in range(0, length, count):
        new = slice(t, t + count)
        arguments = [key[:, new], value[:, new], freqs, torch.full((rows,), t), *caches]
        caches = computed("append_kv", provider, arguments)
        arguments = [query[:, None, new], freqs, *caches, ancestors, torch.full((rows, 1), t + count)]
        outs += computed("decode_self_attention", provider, attending(arguments))
    positions = torch.arange(length).expand(rows, -1)
    turned = [reference.rotate(heads, freqs, positions).transpose(1, 2) for heads in (query, key)]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *turned, value.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(torch.cat(outs, 2)[:, 0], wanted.transpose(1, 2))


def test_the_public_function_returns_weights_on_request_only():
    arguments = MAKE["decode_cross_attention"]()[:6]
    out, weights = ops.decode_cross_attention(*arguments, return_weights=True)
    assert weights.shape == (2, 3, 4, 12)
    assert torch.equal(ops.decode_cross_attention(*arguments), out)


def test_all_providers_of_an_op_are_in_the_matrix():
    for op in OPS:
        for name in providers.names(op):
            assert (op, name) in PROVIDERS or providers.get(op, name).missing()
