"""Every provider of `attention` computes what the definition says, and its gradients, with every option."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_attention_inputs import CASES, KEY, QUERY, VALUE, by_position, make, offsets, wanting
from ops_matrix import DTYPES, assert_gradients, assert_right, device_of, runnable
from torch._subclasses.fake_tensor import FakeTensorMode

from spear_fast import ops
from spear_fast.ops import providers
from spear_fast.ops.attention_arguments import AttentionArgs, options_of
from spear_fast.ops.reference import attention as reference
from spear_fast.ops.reference.philox import dropout_mask


def takes(provider, dtype, arguments):
    """Returns whether a provider computes both the values and the gradients for such arguments."""
    row = providers.get("attention", provider)
    inputs = providers.ProviderQuery(device_of(row), dtype, arguments[QUERY].shape[-1], options_of(*arguments))
    return row.refusal(inputs) is None


MATRIX = [
    pytest.param(provider, dtype, case, id=f"{provider}-{str(dtype)[6:]}-{name}")
    for _, provider, dtype in runnable("attention")
    for name, case in CASES.items()
    if takes(provider, dtype, make(**case, dtype=dtype))
]
PROVIDERS = sorted({(provider, dtype) for _, provider, dtype in runnable("attention")}, key=str)


def comparable(result, arguments):
    """Returns the result with the log-sum-exps of rows that read nothing apart from the others."""
    out, lse = result
    empty = lse.isneginf()
    return [out, empty, lse.masked_fill(empty, 0)]


def assert_all_right(provider, arguments):
    assert_right("attention", provider, reference.attention, arguments, results=comparable)


@pytest.mark.parametrize(("provider", "dtype", "case"), MATRIX)
@pytest.mark.usefixtures("nan_filled_empty")
def test_values(provider, dtype, case):
    assert_all_right(provider, make(**case, dtype=dtype))


@pytest.mark.parametrize(("provider", "dtype", "case"), MATRIX)
@pytest.mark.usefixtures("nan_filled_empty")
def test_gradients(provider, dtype, case):
    arguments = make(**case, dtype=dtype)
    assert_gradients("attention", provider, by_position, reference.attention, arguments, wanting=wanting(arguments))


@pytest.mark.parametrize("provider", sorted({provider for provider, _ in PROVIDERS}))
@pytest.mark.usefixtures("nan_filled_empty")
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(provider, data):
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    flip = lambda: data.draw(st.booleans())  # noqa: E731
    kv_heads = draw(1, 3)
    case = {"kv_heads": kv_heads, "heads": kv_heads * draw(1, 3), "size": 2 * draw(1, 20), "null": flip()}
    case |= {"rotary": flip(), "causal": flip(), "modulo": flip(), "spread": flip()}
    case |= {"dropout": data.draw(st.sampled_from((0.0, 0.4)))}
    lengths = st.lists(st.integers(0, 40), min_size=1, max_size=4)
    if flip():
        case["lengths"] = data.draw(lengths)
        if not case["causal"]:
            case["key_lengths"] = [draw(0, 40) for _ in case["lengths"]]
    else:
        case |= {"batch": draw(1, 3), "length": draw(0, 70), "mask": data.draw(st.sampled_from((None, "random")))}
        case |= {} if case["causal"] else {"key_length": draw(0, 70)}
    dtype = data.draw(st.sampled_from([dtype for name, dtype in PROVIDERS if name == provider]))
    arguments = make(**case, dtype=dtype)
    if not takes(provider, dtype, arguments):
        return
    assert_all_right(provider, arguments)
    # a lone key's score has the gradient zero: all that is left is the rounding of what was saved, which torch has not
    if arguments[KEY].shape[-3] < 2:
        return
    assert_gradients("attention", provider, by_position, reference.attention, arguments, wanting=wanting(arguments))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("provider", sorted({provider for provider, dtype in PROVIDERS if dtype == torch.float32}))
def test_it_is_torch_attention(provider, causal):
    arguments = make(length=21, causal=causal, size=16)
    query, key, value = (each.transpose(1, 2) for each in arguments[:3])
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)
    device = device_of(providers.get("attention", provider))
    with ops.forced(f"attention={provider}"):
        found = ops.attention(*(each.to(device) for each in arguments[:3]), causal=causal)
    torch.testing.assert_close(found.cpu(), wanted)


@pytest.mark.parametrize("options", [{}, {"null": True, "rotary": True, "kv_heads": 2, "modulo": True}], ids=str)
def test_packed_is_each_sequence_alone(options):
    lengths = [4, 9, 1]
    arguments = make(lengths=lengths, **options)
    out, lse = reference.attention(*arguments)
    for tokens, at in zip(torch.arange(14).split(lengths), range(3), strict=True):
        alone = [arguments[i][tokens][None] for i in (QUERY, KEY, VALUE)]
        wanted, wanted_lse = reference.attention(*alone, None, None, None, 0, 0, *arguments[8:])
        torch.testing.assert_close(out[tokens], wanted[0], msg=f"sequence {at}")
        torch.testing.assert_close(lse[:, tokens], wanted_lse[0])


def test_lengths_are_found_where_they_are_left_out():
    query, key, value = make(lengths=[3, 8], key_lengths=[2, 6])[:3]
    packing = {"cu_query": offsets([3, 8]), "cu_key": offsets([2, 6])}
    found = ops.attention(query, key, value, **packing)
    torch.testing.assert_close(found, ops.attention(query, key, value, **packing, max_query=8, max_key=6))


def test_masked_keys_are_as_if_they_were_not_there():
    query, key, value = make(batch=1, length=6, key_length=9)[:3]
    mask = torch.tensor([[True, False, True, True, False, False, True, False, True]])
    wanted = ops.attention(query, key[:, mask[0]], value[:, mask[0]])
    torch.testing.assert_close(ops.attention(query, key, value, key_mask=mask), wanted)


@pytest.mark.parametrize("provider", sorted({provider for provider, dtype in PROVIDERS if dtype == torch.float32}))
def test_dropout_drops_the_weights_that_the_seed_says(provider):
    """With values that are the unit vectors, the result is the weights themselves."""
    size = 16
    query, key = (torch.randn(3, size, 2, size) for _ in range(2))
    value = torch.eye(size)[None, :, None].repeat(3, 1, 2, 1)
    arguments = [query, key, value, *[None] * 3, 0, 0, *[None] * 3, False, False, 0.5, torch.tensor(-(2**62) + 12345)]
    if not takes(provider, torch.float32, arguments):
        pytest.skip("takes no dropout")
    row = providers.get("attention", provider)
    device = device_of(row)
    sent = [each.to(device) if isinstance(each, torch.Tensor) else each for each in arguments]
    weights = row.function(*sent)[0].cpu().transpose(1, 2)
    whole = reference.attention(*arguments[:13], 0.0, None)[0].transpose(1, 2)
    torch.testing.assert_close(weights, whole * 2 * dropout_mask(arguments[14], (3, 2, size, size), 0.5))


def test_dropout_keeps_its_share():
    share = dropout_mask(torch.tensor(7), (4, 2, 100, 100), 0.3).double()
    assert abs(share.mean().item() - 0.7) < 5 * (0.3 * 0.7 / share.numel()) ** 0.5
    assert share.mean((0, 1, 2)).std() < 0.05
    assert dropout_mask(torch.tensor(7), (1, 1, 9, 9), 0.0).all()


def test_the_seed_is_drawn_from_torch_s_generator():
    query, key, value = make(length=20)[:3]

    def drawn(seed):
        torch.manual_seed(seed)
        return ops.attention(query, key, value, dropout=0.5)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_the_log_sum_exp_has_no_gradient():
    query, key, value = (each.requires_grad_() for each in make()[:3])
    out, lse = ops.attention(query, key, value, return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad


def test_a_transposed_query_is_taken():
    query, key, value = make(size=7)[:3]
    spread = query.transpose(1, 3).contiguous().transpose(1, 3)
    torch.testing.assert_close(ops.attention(spread, key, value), ops.attention(query, key, value))


OPCHECKED = ["plain", "all", "packed all"]


def overloads(op):
    packet = getattr(torch.ops.spear_fast, op)
    return [getattr(packet, name) for name in packet.overloads()]


@pytest.mark.parametrize("case", OPCHECKED)
def test_opcheck(case):
    arguments = make(**CASES[case])
    out, lse = reference.attention(*arguments)
    for overload in overloads("attention_backward"):
        torch.library.opcheck(overload, AttentionArgs(*arguments).backward(torch.randn_like(out), out, lse))
    for i in wanting(arguments):
        arguments[i].requires_grad_()
    torch.library.opcheck(torch.ops.spear_fast.attention.default, arguments)


@pytest.mark.parametrize("case", OPCHECKED)
def test_eager_gradients_are_those_of_the_dispatcher(case):
    """Eager calls go past it, to the bit the same; a graph that is kept can be gone through twice."""
    arguments = make(**CASES[case])
    leaves = [arguments[i].requires_grad_() for i in wanting(arguments)]
    out, (wanted, _) = by_position(*arguments), torch.ops.spear_fast.attention(*arguments)
    noise = torch.randn_like(out)
    gradients = torch.autograd.grad(wanted, leaves, noise)
    for _ in range(2):
        found = torch.autograd.grad(out, leaves, noise, retain_graph=True)
        assert all(torch.equal(one, other) for one, other in zip(found, gradients, strict=True))
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", OPCHECKED)
def test_compiles_whole(case, dynamic):
    """One graph, no break, forward and backward, the same numbers."""

    def doubled(query, *others):
        return by_position(query * 2, *others) * 2

    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (8, 16):
        arguments = make(**CASES[case] | {"size": size})
        found = []
        for function in (compiled, doubled):
            inputs = [each.clone() if isinstance(each, torch.Tensor) else each for each in arguments]
            leaves = [inputs[i].requires_grad_() for i in wanting(inputs)]
            out = function(*inputs)
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for result, wanted in zip(*found, strict=True):
            torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("case", OPCHECKED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_tensors_give_shape_and_dtype(case, dtype):
    arguments = make(**CASES[case], dtype=dtype)
    real = torch.ops.spear_fast.attention(*arguments)
    both = AttentionArgs(*arguments).backward(torch.randn_like(real[0]), *real)
    with FakeTensorMode() as mode:
        imagine = lambda each: mode.from_tensor(each) if isinstance(each, torch.Tensor) else each  # noqa: E731
        fake = torch.ops.spear_fast.attention(*map(imagine, arguments))
        fake += torch.ops.spear_fast.attention_backward(*map(imagine, both))
    real += torch.ops.spear_fast.attention_backward(*both)
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
