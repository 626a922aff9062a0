"""`forward` against the reference: logits, losses and every gradient, over sizes, types, masks and early exits."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import assert_as_exact, build_pair, pad_rows, random_ids
from torch import Tensor

VOCABULARY = {"text": 13, "speech": 17}
SIZES = {
    "plain": {},
    "one kv head": dict(target_kv_heads=1),
    "two kv heads": dict(target_kv_heads=2),
    "odd inner": dict(dim=20, ff_mult=3),
    "one head": dict(heads=1, dim_head=6),
    "deep": dict(source_depth=3, target_depth=4, target_kv_heads=2),
    "head wider than dim": dict(dim=16, dim_head=32, heads=2),
    "no eos": dict(autoset_semantic_eos_id=False, autoset_text_eos_id=False),
    "text eos only": dict(autoset_semantic_eos_id=False),
    "speech eos only": dict(autoset_text_eos_id=False),
}
DIRECTIONS = [("speech", "text"), ("text", "speech"), ("speech", "speech"), ("text", "text")]


# of the weights, so that roundings do not grow: see `randomise_`
SPREAD = 1.5


class Trio:
    """The reference in float32 and float64 (the truth) and ours in both, with one set of weights."""

    def __init__(self, seed: int = 0, **kwargs) -> None:
        self.theirs, self.ours = build_pair(seed, spread=SPREAD, **kwargs)
        self.truth, self.ours_double = build_pair(seed, dtype=torch.float64, spread=SPREAD, **kwargs)

    def compare(self, run) -> Tensor:
        """Runs `run(model) -> Tensor` on all four and compares; returns ours."""
        truth = run(self.truth)
        torch.testing.assert_close(run(self.ours_double), truth, rtol=1e-10, atol=1e-10)
        ours = run(self.ours)
        assert_as_exact(ours, run(self.theirs), truth)
        return ours

    def compare_gradients(self, run, factor: float = 3.0) -> dict[str, Tensor]:
        """The same for the gradient of every parameter, in training, where ours packs; returns ours by name."""
        found = []
        for model in (self.ours, self.theirs, self.truth, self.ours_double):
            model.zero_grad(set_to_none=True)
            run(model.train()).backward()
            model.eval()
            found.append({name: p.grad for name, p in model.named_parameters()})
        ours, theirs, truth, ours_double = found
        assert {n for n, g in ours.items() if g is not None} == {n for n, g in theirs.items() if g is not None}
        for name, gradient in ours.items():
            if gradient is None:
                continue
            torch.testing.assert_close(
                ours_double[name], truth[name], rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )
            try:
                assert_as_exact(gradient, theirs[name], truth[name], factor=factor, floor=2e-5)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        # one tensor's maximum is a matter of luck; over all of them ours must be as exact as the reference
        squares = [0.0, 0.0]
        for name in filter(lambda name: ours[name] is not None, ours):
            for index, gradient in enumerate((ours[name], theirs[name])):
                squares[index] += (gradient.double() - truth[name]).square().sum().item()
        assert squares[0] ** 0.5 <= factor * squares[1] ** 0.5 + 1e-6
        return ours


def batch(
    source_type: str,
    target_type: str,
    *,
    lengths=(7, 4, 1),
    target_lengths=(5, 2, 6),
    padded: bool = True,
    seed: int = 0,
):
    """`(source, target)` ids: text rows padded with 0, speech rows full, as the reference cannot pad them."""
    rows = []
    for kind, sizes, offset in ((source_type, lengths, 0), (target_type, target_lengths, 100)):
        ids = random_ids(len(sizes), max(sizes), VOCABULARY[kind], seed=seed + offset)
        rows.append(pad_rows(ids, sizes, 0) if padded and kind == "text" else ids)
    return rows[0], rows[1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("types", DIRECTIONS, ids="-".join)
def test_logits_and_loss(size: str, types: tuple[str, str]) -> None:
    trio = Trio(**SIZES[size])
    source, target = batch(*types)
    kwargs = dict(source_type=types[0], target_type=types[1])
    logits = trio.compare(lambda model: model(source, target, **kwargs))
    assert logits.shape[:2] == (3, target.shape[1] + 1)
    trio.compare(lambda model: model(source, target, return_loss=True, **kwargs))
    trio.compare(lambda model: model(source, target, return_loss=True, return_logits=True, **kwargs)[1])
    loss, _ = trio.ours(source, target, return_loss=True, return_logits=True, **kwargs)
    assert loss == trio.ours(source, target, return_loss=True, **kwargs)
    assert loss.ndim == 0


@pytest.mark.parametrize("size", ["plain", "one kv head", "two kv heads", "odd inner", "no eos", "deep"])
@pytest.mark.parametrize("types", DIRECTIONS, ids="-".join)
def test_gradients_of_every_parameter(size: str, types: tuple[str, str]) -> None:
    trio = Trio(1, **SIZES[size])
    source, target = batch(*types, seed=1)
    gradients = trio.compare_gradients(
        lambda model: model(source, target, source_type=types[0], target_type=types[1], return_loss=True)
    )
    assert sum(float(g.abs().sum()) for g in gradients.values() if g is not None) > 0.1


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_early_exit_loss(detach: bool, layer: int, drop: float) -> None:
    trio = Trio(2, target_early_exit_layer=layer, detach_early_exit_embed=detach, target_kv_heads=2)
    source, target = batch("text", "speech")
    kwargs = dict(
        source_type="text", target_type="speech", return_loss=True, return_early_exit_loss=True, cond_drop_prob=drop
    )
    trio.compare(lambda model: model(source, target, **kwargs))
    gradients = trio.compare_gradients(lambda model: model(source, target, **kwargs))
    assert gradients["to_early_exit_semantic_logits.2.weight"].abs().sum() > 0


@pytest.mark.parametrize("logsumexp", [True, False])
@pytest.mark.parametrize("types", DIRECTIONS, ids="-".join)
@pytest.mark.parametrize("how", ["argument", "constructor"])
def test_dropped_condition_and_alignment_regulariser(logsumexp: bool, types: tuple[str, str], how: str) -> None:
    # 1 - 1e-9 is the nearest to "always" that the reference's constructor takes
    construct = dict(cond_drop_prob=1 - 1e-9) if how == "constructor" else {}
    trio = Trio(
        3,
        align_reg_use_logsumexp_pool=logsumexp,
        align_reg_loss_weight=0.7,
        align_reg_logsumexp_pool_temp=0.2,
        **construct,
    )
    source, target = batch(*types)
    kwargs = dict(source_type=types[0], target_type=types[1], **({} if construct else dict(cond_drop_prob=1.0)))
    trio.compare(lambda model: model(source, target, **kwargs))
    with_term = trio.compare(lambda model: model(source, target, return_loss=True, **kwargs))
    without = trio.compare(lambda model: model(source, target, return_loss=True, should_sim_regularize=False, **kwargs))
    assert (with_term != without) == (types[0] != types[1])
    trio.compare_gradients(lambda model: model(source, target, return_loss=True, **kwargs))


def test_dropped_condition_hides_the_source() -> None:
    trio = Trio(4)
    source, target = batch("text", "speech")
    kwargs = dict(source_type="text", target_type="speech", cond_drop_prob=1.0)
    one = trio.compare(lambda model: model(source, target, **kwargs))
    other = trio.ours(source.flip(0).roll(1, 1), target, **kwargs)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_explicit_masks_without_eos(kv_heads: int | None) -> None:
    trio = Trio(5, autoset_semantic_eos_id=False, autoset_text_eos_id=False, target_kv_heads=kv_heads)
    source, target = batch("speech", "text", padded=False)
    generator = torch.Generator().manual_seed(0)
    source_mask = torch.rand(source.shape, generator=generator) > 0.4
    # one column more than the target: the start vector is masked by hand too
    target_mask = torch.rand(target.shape[0], target.shape[1] + 1, generator=generator) > 0.3
    source_mask[:, 0] = target_mask[:, 0] = True
    kwargs = dict(source_type="speech", target_type="text")
    for masks in (
        dict(source_mask=source_mask),
        dict(target_mask=target_mask),
        dict(source_mask=source_mask, target_mask=target_mask),
    ):
        trio.compare(partial(torch.nn.Module.__call__, source=source, target=target, **kwargs, **masks))
        trio.compare(
            partial(torch.nn.Module.__call__, source=source, target=target, return_loss=True, **kwargs, **masks)
        )
    trio.compare_gradients(
        lambda model: model(
            source, target, source_mask=source_mask, target_mask=target_mask, return_loss=True, **kwargs
        )
    )
    trio.compare(
        lambda model: model(source, target, source_mask=source_mask, return_loss=True, cond_drop_prob=1.0, **kwargs)
    )


def test_explicit_masks_as_wide_as_the_ids_with_eos() -> None:
    trio = Trio(6)
    source, target = batch("speech", "text", padded=False)
    source_mask, target_mask = torch.ones(3, source.shape[1] + 1).bool(), torch.ones(3, target.shape[1] + 2).bool()
    source_mask[1, 3:6] = False
    target_mask[2, 2] = False
    kwargs = dict(source_type="speech", target_type="text", return_loss=True)
    trio.compare(lambda model: model(source, target, source_mask=source_mask, **kwargs))
    trio.compare(lambda model: model(source, target, target_mask=target_mask, **kwargs))
    trio.compare(lambda model: model(source, target, source_mask=source_mask, target_mask=target_mask, **kwargs))


def test_source_row_of_pads_alone() -> None:
    trio = Trio(7, autoset_text_eos_id=False)
    source, target = batch("text", "speech", lengths=(4, 0, 2))
    trio.compare(lambda model: model(source, target, source_type="text", target_type="speech", return_loss=True))
    trio.compare_gradients(
        lambda model: model(source, target, source_type="text", target_type="speech", return_loss=True)
    )
    trio = Trio(7)
    trio.compare(lambda model: model(source, target, source_type="text", target_type="speech", return_loss=True))


def test_empty_target_gives_the_first_token_s_logits() -> None:
    trio = Trio(8)
    source, _ = batch("speech", "text")
    empty = torch.empty(3, 0, dtype=torch.long)
    assert trio.compare(lambda model: model(source, empty, source_type="speech", target_type="text")).shape == (
        3,
        1,
        14,
    )
    trio.compare(lambda model: model(source, empty, source_type="speech", target_type="text", return_loss=True))


def test_strings_and_raw_audio() -> None:
    from reference import ByteTokenizer, fake_speech_tokenizer

    encode = ByteTokenizer().tokenize
    kwargs = dict(num_text_token_ids=257, tokenizer_encode=encode)
    trio = Trio(9, wav2vec=fake_speech_tokenizer(17), **kwargs)
    wave, texts = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)), ["to be", "or"]
    for source, target, types in (
        (wave, texts, ("speech", "text")),
        (texts, random_ids(2, 5, 17), ("text", "speech")),
        (texts, ["é", "not"], ("text", "text")),
    ):
        asked = dict(source_type=types[0], target_type=types[1], return_loss=True, return_logits=True)
        for i in range(2):
            trio.compare(lambda model, i=i, given=(source, target), asked=asked: model(*given, **asked)[i])


def test_flash_forward_is_the_reference_without_flash() -> None:
    # its own forward with attn_flash=True can raise (tests/test_defects_forward.py): its plain path is the measure
    theirs, _ = build_pair(10, target_kv_heads=2)
    _, ours = build_pair(10, target_kv_heads=2, attn_flash=True)
    source, target = batch("text", "text")
    results = [
        model(source, target, source_type="text", target_type="text", return_loss=True, return_logits=True)
        for model in (ours, theirs)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_long_sequences() -> None:
    trio = Trio(11, target_kv_heads=1)
    source, target = random_ids(1, 300, 17), random_ids(1, 260, 13)
    trio.compare(lambda model: model(source, target, source_type="speech", target_type="text"))


def test_one_training_step_keeps_step_with_the_reference() -> None:
    # in float64: in float32 five steps already spread the rounding of the first to 1e-3
    theirs, ours = build_pair(12, dtype=torch.float64, target_early_exit_layer=1)
    source, target = batch("text", "speech")
    losses = {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        model.train()
        losses[name] = []
        for _ in range(5):
            loss = model(
                source, target, source_type="text", target_type="speech", return_loss=True, return_early_exit_loss=True
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-9)
    assert losses["ours"][-1] < losses["ours"][0]
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-8, atol=1e-9)


PAIRS = {}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kv_heads=st.sampled_from([None, 1, 2]),
    eos=st.booleans(),
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4),
    drop=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_padding(kv_heads, eos, rows, drop, seed) -> None:
    key = kv_heads, eos
    if key not in PAIRS:
        PAIRS[key] = build_pair(13, dtype=torch.float64, target_kv_heads=kv_heads, autoset_text_eos_id=eos)
    theirs, ours = PAIRS[key]
    lengths, target_lengths = zip(*rows, strict=True)
    source = pad_rows(random_ids(len(rows), max(1, *lengths), 13, seed=seed), lengths, 0)
    target = pad_rows(random_ids(len(rows), max(1, *target_lengths), 13, seed=seed + 1), target_lengths, 0)
    kwargs = dict(source_type="text", target_type="text", cond_drop_prob=float(drop))
    torch.testing.assert_close(ours(source, target, **kwargs), theirs(source, target, **kwargs), rtol=1e-10, atol=1e-10)
    theirs_loss = theirs(source, target, return_loss=True, **kwargs).item()
    if math.isfinite(theirs_loss):
        assert ours(source, target, return_loss=True, **kwargs).item() == pytest.approx(theirs_loss, rel=1e-10)
