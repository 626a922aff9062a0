"""What wrong arguments of `attention` are answered with: one sentence, the same from every provider."""

from __future__ import annotations

import pytest
import torch
from ops_attention_inputs import by_position, make, offsets
from ops_inputs import function_of

from spear_fast import ops
from spear_fast.ops import providers
from spear_fast.ops.attention_arguments import AttentionArgs

PADDED = {"mask": "random", "null": True, "rotary": True, "kv_heads": 2, "dropout": 0.1, "causal": True}
PACKED = {"lengths": [3, 4], "null": True, "rotary": True}
# case, position of the argument, what is wrong with it, what is said
WRONG = [
    (PADDED, 0, lambda t: t[0], "query must be [batch, length, heads, head_dim], got [7, 4, 8]"),
    (PADDED, 0, lambda t: t.long(), "query must be floating point, got torch.int64"),
    (PADDED, 0, lambda t: t[:, :, :3], "kv_heads must be a divisor of the 3 heads, got 2"),
    (PADDED, 0, lambda t: t[:, :5], "key must be as long as query (5) where causal, got 7"),
    (PADDED, 1, lambda t: t[:1], "key must be [batch, key_length, kv_heads, head_dim] like query [2, 7, 4, 8], got"),
    (PADDED, 1, lambda t: t[..., :6], "key must be [batch, key_length, kv_heads, head_dim] like query"),
    (PADDED, 1, lambda t: t.bfloat16(), "key must be torch.float32 like query, got torch.bfloat16"),
    (PADDED, 1, lambda t: t.to("meta"), "key must be on query's device cpu, got meta"),
    (PADDED, 2, lambda t: t[:, 1:], "value must be [batch, key_length, kv_heads, head_dim] = [2, 7, 2, 8], got"),
    (PADDED, 3, lambda t: t[:, 1:], "key_mask must be [batch, key_length] = [2, 7], got [2, 6]"),
    (PADDED, 3, lambda t: t.int(), "key_mask must be torch.bool, got torch.int32"),
    (PADDED, 4, lambda t: offsets([7, 7]), "cu_key must be given with cu_query, got None"),
    (PADDED, 8, lambda t: None, "null_key must be given with null_value, got None"),
    (PADDED, 9, lambda t: None, "null_value must be given with null_key, got None"),
    (PADDED, 9, lambda t: t[:1], "null_value must be [kv_heads, head_dim] = [2, 8], got [1, 8]"),
    (PADDED, 10, lambda t: t[1:], "freqs must be [head_dim / 2] = [4], got [3]"),
    (PADDED, 10, lambda t: t.half(), "freqs must be torch.float32, got torch.float16"),
    (PADDED, 13, lambda p: 1.0, "dropout must be in 0..1 and below 1, got 1.0"),
    (PADDED, 13, lambda p: -0.5, "dropout must be in 0..1 and below 1, got -0.5"),
    (PADDED, 14, lambda t: t.int(), "seed must be torch.int64, got torch.int32"),
    (PADDED, 14, lambda t: t[None], "seed must be [] = [], got [1]"),
    (PACKED, 0, lambda t: t[None], "query must be [total, heads, head_dim], got [1, 7, 4, 8]"),
    (PACKED, 3, lambda t: torch.ones(2, 4, dtype=torch.bool), "key_mask must be None with packed rows, got [2, 4]"),
    (PACKED, 4, lambda t: t.long(), "cu_query must be torch.int32, got torch.int64"),
    (PACKED, 4, lambda t: t[:, None], "cu_query must be [sequences + 1], got [3, 1]"),
    (PACKED, 4, lambda t: t - 1, "cu_query must rise from 0 to 7, got [-1, 2, 6]"),
    (PACKED, 4, lambda t: t * 2, "cu_query must rise from 0 to 7, got [0, 6, 14]"),
    (PACKED, 4, lambda t: torch.tensor([0, 9, 7]).int(), "cu_query must rise from 0 to 7, got [0, 9, 7]"),
    (PACKED, 5, lambda t: t[1:], "cu_key must be [sequences + 1] = [3], got [2]"),
    (PACKED, 5, lambda t: None, "cu_key must be given with cu_query, got None"),
    (PACKED, 5, lambda t: t - 1, "cu_key must rise from 0 to 7, got [-1, 2, 6]"),
    (PACKED, 6, lambda n: 3, "max_query must be at least the longest length 4, got 3"),
    (PACKED, 6, lambda n: -1, "max_query must be the longest length, got -1"),
    (PACKED, 7, lambda n: 3, "max_key must be at least the longest length 4, got 3"),
    (PACKED | {"causal": True}, 5, lambda t: offsets([4, 3]), "cu_key must equal cu_query, got other lengths"),
    (PACKED | {"lengths": [7]}, 4, lambda t: t[:1], "cu_key must be [sequences + 1] = [1], got [2]"),
]


@pytest.mark.parametrize("provider", [name for name in ("cpu", "reference") if name in providers.names("attention")])
@pytest.mark.parametrize(("case", "index", "spoil", "said"), WRONG, ids=[f"{row[1]}-{row[3][:40]}" for row in WRONG])
def test_wrong_argument(case, index, spoil, said, provider):
    function_of("attention", provider)
    arguments = make(**case)
    arguments[index] = spoil(arguments[index])
    with ops.forced(f"attention={provider}"), pytest.raises(ValueError) as caught:
        torch.ops.spear_fast.attention(*arguments)
    text = str(caught.value)
    assert text.startswith("attention: ")
    assert said in text
    assert "; " in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("index", "spoil", "said"),
    [
        (0, lambda t: t[:, 1:], "grad_out must be [batch, length, heads, head_dim] = [2, 7, 4, 8], got [2, 6, 4, 8]"),
        (0, lambda t: t.double(), "grad_out must be torch.float32 like query"),
        (4, lambda t: t[..., 1:], "out must be [batch, length, heads, head_dim] = [2, 7, 4, 8], got"),
        (5, lambda t: t[0], "lse must be [batch, heads, length] = [2, 4, 7], got [4, 7]"),
        (5, lambda t: t.double(), "lse must be torch.float32 on cpu, got torch.float64 on cpu; pass what"),
    ],
)
def test_wrong_argument_of_backward(index, spoil, said):
    arguments = make(**PADDED)
    out, lse = torch.ops.spear_fast.attention(*arguments)
    both = list(AttentionArgs(*arguments).backward(out.clone(), out, lse))
    both[index] = spoil(both[index])
    with pytest.raises(ValueError, match="attention_backward: ") as caught:
        torch.ops.spear_fast.attention_backward(*both)
    assert said in str(caught.value)


def test_odd_heads_cannot_be_rotated():
    arguments = make(size=4, rotary=True)
    for i in range(3):
        arguments[i] = arguments[i][..., :3]
    with pytest.raises(ValueError, match="head_dim must be even to be rotated, got 3"):
        by_position(*arguments)


def test_dropout_needs_a_seed():
    arguments = make()
    arguments[13] = 0.5
    with pytest.raises(ValueError, match="seed must be an int64 tensor where there is dropout, got None"):
        torch.ops.spear_fast.attention(*arguments)


def test_rows_must_be_dense():
    arguments = make()
    arguments[0] = arguments[0].transpose(1, 3).contiguous().transpose(1, 3)
    with pytest.raises(ValueError, match="query must be dense in its last dimension, got stride"):
        torch.ops.spear_fast.attention(*arguments)
