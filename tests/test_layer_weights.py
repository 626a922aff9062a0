"""A layer's weights, side by side, padded and cast: the same numbers, and the same gradients, by one copy each way."""

from __future__ import annotations

import pytest
import torch
from launches import CountLaunches

from spear_fast.layer_weights import layer_weights
from spear_fast.transformer import Transformer

SIZES = {"decoder": dict(cross_attend=True, kv_heads=2), "encoder": dict(cross_attend=False)}


def layer_of(kind: str):
    torch.manual_seed(0)
    made = Transformer(dim=20, depth=1, heads=4, dim_head=6, ff_mult=3, **SIZES[kind])
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return made.layers[0]


def flat(weights) -> list[torch.Tensor]:
    return [each for part in weights if part is not None for each in part if each is not None]


@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize("kind", SIZES)
def test_what_is_made_holds_every_parameter_once(kind, alignment):
    layer = layer_of(kind)
    whole = layer_weights(layer, alignment=alignment)
    own, cross, forward = whole
    assert torch.equal(own.query, torch.cat((layer[0].to_q[0].weight, layer[0].to_kv[0].weight)))
    inner = layer[2][-1].in_features
    padded = -(-inner // alignment) * alignment
    assert forward.down.shape == (20, padded)
    assert forward.up_gate.shape == (2 * padded, 20)
    assert torch.equal(forward.down[:, :inner], layer[2][-1].weight)
    assert not forward.down[:, inner:].any()
    for wide, plain in ((forward.up_gate, layer[2][1].weight), (forward.bias, layer[2][1].bias)):
        halves = wide.unflatten(0, (2, -1))
        assert torch.equal(halves[:, :inner].flatten(0, 1), plain)
        assert not halves[:, inner:].any()
    assert (cross is None) == (kind == "encoder")
    if cross is not None:
        assert cross.null_key_value is layer[1].null_kv
    numbers = sum(each.numel() for each in layer.parameters() if each.requires_grad)
    assert sum(each.numel() for each in flat(whole)) == numbers + (padded - inner) * (2 * 20 + 2 + 20)


@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize("kind", SIZES)
def test_cast_they_are_the_same_and_so_are_their_gradients(kind, alignment):
    layer = layer_of(kind)
    found = []
    for dtype in (None, torch.bfloat16):
        weights = flat(layer_weights(layer, dtype, alignment=alignment))
        generator = torch.Generator().manual_seed(1)
        # gradients that bfloat16 holds exactly
        outer = [torch.randint(-9, 9, each.shape, generator=generator).to(each.dtype) for each in weights]
        layer.zero_grad(set_to_none=True)
        torch.autograd.backward(weights, outer)
        found.append((weights, [each.grad for each in layer.parameters() if each.requires_grad]))
    (whole, gradients), (cast, others) = found
    assert all(each.dtype == torch.bfloat16 for each in cast)
    for one, other in zip(whole, cast, strict=True):
        assert torch.equal(one.to(torch.bfloat16), other)
    for one, other in zip(gradients, others, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)


def test_what_is_frozen_or_unused_gets_no_gradient():
    layer = layer_of("decoder")
    layer[0].to_kv[0].weight.requires_grad_(False)
    weights = layer_weights(layer, torch.bfloat16)
    (weights.self_attention.query.sum() + weights.feed_forward.bias.sum()).backward()
    assert layer[0].to_kv[0].weight.grad is None
    assert layer[2][1].weight.grad is None
    assert torch.equal(layer[0].to_q[0].weight.grad, torch.ones_like(layer[0].to_q[0].weight))
    assert torch.equal(layer[2][1].bias.grad, torch.ones_like(layer[2][1].bias))


def test_a_layer_is_cast_by_one_copy_each_way():
    layer = layer_of("decoder")
    with CountLaunches() as mode:
        weights = flat(layer_weights(layer, torch.bfloat16))
    assert dict(mode.counted) == {"aten::_foreach_copy_": 1}
    outer = [torch.ones_like(each) for each in weights]
    with CountLaunches() as mode:
        torch.autograd.grad(weights, [each for each in layer.parameters() if each.requires_grad], outer)
    assert dict(mode.counted) == {"aten::_foreach_copy_": 1}
