"""The modules run on the ops: same results, nothing stored that need not be, and watchers still see what they watch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spear_fast import TextToSemantic, ops
from spear_fast.losses.tokens import token_loss
from spear_fast.ops import providers
from spear_fast.transformer import GEGLU, FeedForward, RMSNorm


def plain_norm(norm, x):
    return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * norm.gamma


def plain_feed_forward(module, x):
    norm, widen, _, _, narrow = module
    values, gates = widen(plain_norm(norm, x)).chunk(2, dim=-1)
    return narrow(values * F.gelu(gates))


def build(**options):
    torch.manual_seed(0)
    sizes = {"dim": 16, "source_depth": 1, "target_depth": 2, "dim_head": 4, "heads": 2, "target_early_exit_layer": 1}
    return TextToSemantic(**sizes, num_text_token_ids=13, num_semantic_token_ids=17, cond_drop_prob=0.0, **options)


def ids():
    return {"source": torch.randint(1, 13, (3, 5)), "target": torch.randint(17, (3, 7))}


def loss_of(model, **options):
    torch.manual_seed(1)
    return model(**ids(), source_type="text", target_type="speech", return_loss=True, **options)


@pytest.mark.parametrize("module", [RMSNorm(12), FeedForward(12)], ids=["norm", "feed-forward"])
def test_modules_are_plain_torchs(module):
    plain = plain_norm if isinstance(module, RMSNorm) else plain_feed_forward
    module = module.double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    parameters = [x, *module.parameters()]
    found, wanted = module(x), plain(module, x)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), parameters), torch.autograd.grad(wanted.square().sum(), parameters)
    )


def test_feed_forward_keeps_its_names():
    module = FeedForward(12)
    assert isinstance(module, nn.Sequential)
    names = ["0.gamma", "1.weight", "1.bias", "4.weight", "4.bias"]
    assert list(module.state_dict()) == names
    assert module[1].weight.shape == (64, 12)


@pytest.mark.parametrize("watch", ["hook", "another linear", "another activation"])
def test_watched_parts_of_a_feed_forward_are_called(watch):
    module, x, seen = FeedForward(12), torch.randn(3, 12), []
    wanted = module(x)

    class Noting(nn.Linear if watch == "another linear" else GEGLU):
        def forward(self, x):
            seen.append(x.shape)
            return super().forward(x)

    if watch == "hook":
        module[1].register_forward_hook(lambda *arguments: seen.append(arguments[2].shape))
    elif watch == "another linear":
        module[1].__class__ = Noting
    else:
        module[2] = Noting()
    torch.testing.assert_close(module(x), wanted)
    assert len(seen) == 1


def test_loss_is_that_of_the_logits():
    model = build().double()
    loss = loss_of(model)
    both, logits = loss_of(model, return_logits=True)
    assert loss == both
    assert logits.shape == (3, 18, 8)
    torch.manual_seed(1)
    target = ids()["target"]
    wanted = F.cross_entropy(logits, F.pad(target, (0, 1), value=17))
    torch.testing.assert_close(loss, wanted)
    parameters = [parameter for parameter in model.target_transformer.parameters() if parameter.requires_grad]
    parameters.append(model.semantic_token_emb.weight)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters))


def test_no_logits_are_kept_for_the_backward():
    model, kept = build(), []

    def note(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model, return_early_exit_loss=True)
    assert not {(3, 8, 18), (3, 18, 8), (24, 18)} & set(kept)
    kept.clear()
    model.to_logits["speech"].register_forward_hook(lambda *arguments: None)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model)
    assert (3, 18, 8) in kept, "logits that are kept would show in this test"


def test_loss_without_any_label():
    linear = nn.Linear(4, 5, bias=False)
    hidden, labels = torch.randn(2, 3, 4), torch.full((2, 3), -100)
    assert token_loss(hidden, linear, labels).isnan()


def test_loss_through_more_than_a_matrix():
    """A bias, or a hook, is honoured."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(2, 3, 4), torch.tensor([[0, 1, -100], [4, 2, 2]])
    linear = nn.Linear(4, 5)
    wanted = F.cross_entropy(linear(hidden).transpose(1, 2), labels)
    torch.testing.assert_close(token_loss(hidden, linear, labels), wanted)
    bare, seen = nn.Linear(4, 5, bias=False), []
    wanted = token_loss(hidden, bare, labels)
    bare.register_forward_hook(lambda *arguments: seen.append(arguments[2].shape))
    torch.testing.assert_close(token_loss(hidden, bare, labels), wanted)
    assert seen == [(2, 3, 5)]


def test_under_autocast():
    """As with torch's own layers, matmuls are of bfloat16 and what is normalised stays in float32."""
    model, exact = build(), loss_of(build())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
        normed = RMSNorm(8)(torch.randn(2, 8))
        inner = FeedForward(12)(torch.randn(3, 12))
    assert loss.dtype == normed.dtype == torch.float32
    assert inner.dtype == torch.bfloat16
    assert loss != exact
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_any_provider_trains_the_same():
    losses = []
    for provider in ("reference", "cpu"):
        if providers.get("rms_norm", provider).missing():
            pytest.skip(providers.get("rms_norm", provider).missing())
        model = build().double()
        with ops.forced(f"rms_norm={provider},geglu={provider},cross_entropy={provider}"):
            loss = loss_of(model, return_early_exit_loss=True)
            loss.backward()
        losses.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*losses)
