"""What flash-attn and xformers are asked, shown by stand-ins, and what they are not asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ops_attention_inputs import CASES, make

from spear_fast.ops import attention_peers as peers
from spear_fast.ops import attention_sdpa as sdpa
from spear_fast.ops.attention_arguments import AttentionArgs, options_of
from spear_fast.ops.providers import ProviderQuery
from spear_fast.ops.reference import attention as reference

CUDA = torch.device("cuda")


def reason(why_not, case, dtype=torch.bfloat16, device=CUDA, size=64):
    return why_not(ProviderQuery(device, dtype, size, options_of(*make(**case))))


@pytest.mark.parametrize("why_not", [peers.flash_attn_why_not, peers.xformers_why_not, sdpa.why_not])
def test_what_is_lacking_is_named(why_not):
    assert reason(why_not, {}) is None
    assert reason(why_not, CASES["dropout"]) == "has no dropout by seed"
    assert "key mask" in reason(why_not, CASES["masked"])
    assert "torch.float64" in reason(why_not, {}, torch.float64)


@pytest.mark.parametrize("why_not", [peers.flash_attn_why_not, peers.xformers_why_not])
def test_packages_have_no_null_key(why_not):
    assert reason(why_not, CASES["null"]) == "has no null key"


def test_torch_has_a_null_key_for_padded_rows():
    assert reason(sdpa.why_not, CASES["null"]) is None
    packed = {"lengths": [3, 2], "null": True}
    assert reason(sdpa.why_not, packed) == "has no null key for packed rows"
    on_the_cpu = reason(sdpa.why_not, packed, device=torch.device("cpu"))
    assert on_the_cpu == "takes no packed rows on the CPU"


def test_head_sizes_of_flash_attn():
    assert "multiples of 8" in reason(peers.flash_attn_why_not, {}, size=36)
    assert "multiples of 8" in reason(peers.flash_attn_why_not, {}, size=264)


def by_definition(query, key, value, cu_query=None, cu_key=None, max_query=0, max_key=0, *, causal, **others):
    packing = None, cu_query, cu_key, max_query, max_key
    out, lse = reference.attention(query, key, value, *packing, *[None] * 3, causal, False, 0.0, None)
    # flash-attn's sign for a query that reads nothing
    return out, lse.masked_fill(lse.isneginf(), torch.inf), None


@pytest.mark.parametrize("case", ["causal", "grouped", "packed", "packed causal rotary"])
def test_flash_attn_is_asked_for_the_same(case, monkeypatch):
    arguments = make(**{**CASES[case], "rotary": False})
    asked = []

    def backward(*positional, dropout_p, softmax_scale, causal, **others):
        asked.append((len(positional), dropout_p, softmax_scale, causal))
        for target in positional[6:9]:
            target.fill_(1)

    standing_in = SimpleNamespace(
        flash_attn_func=by_definition,
        flash_attn_varlen_func=by_definition,
        _flash_attn_backward=backward,
        _flash_attn_varlen_backward=backward,
    )
    monkeypatch.setattr(peers, "_flash_attn", lambda: standing_in)
    out, lse = peers._flash_attn_forward(*arguments)
    wanted = reference.attention(*arguments)
    torch.testing.assert_close((out, lse), wanted)
    grads = peers._flash_attn_backward(*AttentionArgs(*arguments).backward(out, out, lse))
    assert [each.shape for each in grads[:3]] == [each.shape for each in arguments[:3]]
    assert all((each == 1).all() for each in grads[:3])
    assert asked == [(9 if arguments[4] is None else 13, 0.0, 8**-0.5, arguments[11])]


@pytest.mark.parametrize("case", ["plain", "causal"])
def test_xformers_is_asked_for_the_same(case, monkeypatch):
    arguments = make(**CASES[case])
    length = arguments[0].shape[1]
    asked = []

    def forward(query, key, value, attn_bias):
        out, lse, _ = by_definition(query, key, value, causal=attn_bias == "lower triangle")
        return out, torch.nn.functional.pad(lse, (0, -length % 32), value=torch.inf)

    def backward(grad, out, lse, query, key, value, attn_bias):
        asked.append((lse.shape[-1], attn_bias))
        return query * 2, key * 3, value * 4

    standing_in = SimpleNamespace(
        attn_bias=SimpleNamespace(LowerTriangularMask=lambda: "lower triangle"),
        memory_efficient_attention_forward_requires_grad=forward,
        memory_efficient_attention_backward=backward,
    )
    monkeypatch.setattr(peers, "_xformers", lambda: standing_in)
    out, lse = peers._xformers_forward(*arguments)
    torch.testing.assert_close((out, lse), reference.attention(*arguments))
    grads = peers._xformers_backward(*AttentionArgs(*arguments).backward(out, out, lse))
    for gradient, argument, factor in zip(grads[:3], arguments[:3], (2, 3, 4), strict=True):
        assert torch.equal(gradient, argument * factor)
    assert asked == [((length + 31) // 32 * 32, "lower triangle" if case == "causal" else None)]
