"""Defects of the reference in `forward` and training: each test shows the reference failing, and ours right."""

from __future__ import annotations

import random
import socket

import pytest
import torch
import torch.multiprocessing as mp
from reference import assert_as_exact, build_pair, build_reference, load_reference, pad_rows, random_ids

import spear_fast
from spear_fast.losses import gather


def loss_of(model, source, target, source_type="speech", target_type="text", **kwargs) -> torch.Tensor:
    return model(source, target, source_type=source_type, target_type=target_type, return_loss=True, **kwargs)


def test_training_with_flash_attention() -> None:
    # with attention dropout, or off the CPU; without dropout torch's CPU kernel happens to take mask and causality both
    reference, ours = build_pair(attn_flash=True, attn_dropout=0.1)
    source, target = random_ids(2, 6, 17), random_ids(2, 5, 13)
    with pytest.raises(RuntimeError, match="Explicit attn_mask should not be set when is_causal=True"):
        loss_of(reference.train(), source, target)
    plain, _ = build_pair()
    expected = loss_of(plain, source, target)
    torch.testing.assert_close(loss_of(ours, source, target), expected, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    ours.train()
    losses = torch.stack([loss_of(ours, source, target) for _ in range(16)])
    losses.mean().backward()
    assert losses.std() > 0, "dropout has to show"
    assert abs(losses.mean() - expected) < 0.5
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)


def test_padded_batch_of_speech() -> None:
    reference, ours = build_pair(dtype=torch.float64)
    source, target = pad_rows(random_ids(3, 7, 17), [7, 4, 2], -1), pad_rows(random_ids(3, 5, 13), [5, 3, 4], 0)
    speech_target = pad_rows(random_ids(3, 6, 17, seed=1), [2, 6, 5], -1)
    for arguments in ((source, target, "speech", "text"), (source, speech_target, "speech", "speech")):
        with pytest.raises(IndexError, match="index out of range"):
            loss_of(reference, *arguments)
        # right is: every row as it is alone, weighted by its number of labels
        rows = list(zip(source, arguments[1], strict=True))
        pads = [-1 if arguments[2] == "speech" else 0, -1 if arguments[3] == "speech" else 0]
        alone = [[row[row != pad][None] for row, pad in zip(pair, pads, strict=True)] for pair in rows]
        weights = torch.tensor([pair[1].shape[1] + 1.0 for pair in alone], dtype=torch.float64)
        losses = torch.stack([loss_of(reference, *pair, *arguments[2:]) for pair in alone])
        torch.testing.assert_close(loss_of(ours, *arguments), (losses * weights).sum() / weights.sum())


def test_padded_batch_of_speech_in_pretraining() -> None:
    reference, ours = build_pair()
    rows = pad_rows(random_ids(3, 12, 17), [12, 8, 5], -1)
    with pytest.raises((IndexError, RuntimeError)):
        load_reference().SpeechSpeechPretrainWrapper(reference, mask_id=3, reconstruct_seq=True)(rows)
    for options in ({}, dict(reconstruct_seq=True), dict(reconstruct_seq=True, mask_id=3)):
        loss, _ = spear_fast.SpeechSpeechPretrainWrapper(ours, **options)(rows)
        assert torch.isfinite(loss)
        assert loss > 0


def test_pretraining_never_deletes_or_predicts_pads() -> None:
    seen = []

    class Recorder(torch.nn.Module):
        wav2vec, semantic_pad_id, num_semantic_token_ids, device = None, -1, 1000, torch.device("cpu")

        def forward(self, source, target, **kwargs):
            seen.append((source, target))
            return torch.zeros(()), source

    rows = pad_rows(torch.arange(60).reshape(3, 20), [20, 10, 4], -1)
    spear_fast.SpeechSpeechPretrainWrapper(Recorder(), deletion_prob=0.5)(rows)
    source, target = seen[0]
    for row, kept, deleted, length in zip(rows, source, target, (20, 10, 4), strict=True):
        kept, deleted = kept[kept != -1], deleted[deleted != -1]
        assert len(kept) == len(deleted) == length // 2
        assert torch.equal(torch.cat((kept, deleted)).sort().values, row[row != -1])
    for ids in (source, target):
        assert ((ids == -1).long().diff(dim=-1) >= 0).all(), "pads belong at the end"


def test_eos_goes_behind_the_last_token_not_over_a_pad_inside() -> None:
    _reference, ours = build_pair()
    row = torch.tensor([[7, 0, 9, 4]])
    broken = load_reference().spear_tts_pytorch.set_eos_id(row, 13, pad_id=0)
    assert broken.tolist() == [[7, 13, 9, 4, 0]]
    _, mask, ids = ours.encode(row, source_type="text")
    assert ids.tolist() == [[7, 0, 9, 4, 13]]
    assert mask.tolist() == [[True] * 5]
    _, mask, ids = ours.encode(torch.tensor([[7, 0, 9, 0, 0], [0, 0, 0, 0, 0]]), source_type="text")
    assert ids.tolist() == [[7, 0, 9, 13, 0, 0], [13, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[True] * 4 + [False] * 2, [True] + [False] * 5]
    # and the label of the 0 inside is learnt
    logits = ours(torch.tensor([[3, 4]]), row, source_type="speech", target_type="text")
    expected = torch.nn.functional.cross_entropy(logits[0], torch.tensor([7, 0, 9, 4, 13]))
    torch.testing.assert_close(loss_of(ours, torch.tensor([[3, 4]]), row), expected)


def test_text_id_zero_is_usable_with_a_pad_that_is_no_token() -> None:
    reference, ours = build_pair(text_pad_id=-1, dtype=torch.float64)
    text = torch.tensor([[0, 5, 0], [0, -1, -1]])
    speech = random_ids(2, 4, 17)
    with pytest.raises(IndexError, match="index out of range"):
        loss_of(reference, text, speech, "text", "speech")
    alone = [
        loss_of(reference, row[row != -1][None], target[None], "text", "speech")
        for row, target in zip(text, speech, strict=True)
    ]
    torch.testing.assert_close(loss_of(ours, text, speech, "text", "speech"), sum(alone) / 2)


@pytest.mark.parametrize("which", ["source_mask", "target_mask"])
def test_explicit_masks_as_wide_as_the_ids(which: str) -> None:
    reference, ours = build_pair(dtype=torch.float64)
    source, target = random_ids(2, 6, 17), random_ids(2, 5, 13)
    lengths = [6, 3] if which == "source_mask" else [2, 5]
    ids = source if which == "source_mask" else target
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    with pytest.raises(RuntimeError, match="must match the size"):
        loss_of(reference, source, target, **{which: mask})
    # right is what ids without the masked tail give
    alone, weights = [], []
    for index in range(2):
        pair = [source[index : index + 1], target[index : index + 1]]
        at = 0 if which == "source_mask" else 1
        pair[at] = pair[at][:, : lengths[index]]
        alone.append(loss_of(reference, *pair))
        weights.append(pair[1].shape[1] + 1)
    expected = sum(value * weight for value, weight in zip(alone, weights, strict=True)) / sum(weights)
    torch.testing.assert_close(loss_of(ours, source, target, **{which: mask}), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_narrow_integer_ids(dtype: torch.dtype) -> None:
    reference, ours = build_pair(dtype=torch.float64, cond_drop_prob=0.5)
    source, target = pad_rows(random_ids(2, 6, 13), [6, 2], 0), random_ids(2, 5, 17)
    kwargs = dict(source_type="text", target_type="speech", cond_drop_prob=0.0)
    right = reference(source, target, **kwargs)
    if dtype is torch.int32:
        # no mask: the pads are attended to
        assert (reference(source.int(), target, **kwargs) - right).abs().max() > 0.01
        with pytest.raises(TypeError, match="NoneType"):
            reference(source.int(), target, source_type="text", target_type="speech", cond_drop_prob=1.0)
        with pytest.raises(AttributeError, match="NoneType"):
            reference.generate(source.int(), source_type="text", target_type="speech", max_length=3, cond_scale=2.0)
    torch.testing.assert_close(ours(source.to(dtype), target.to(dtype), **kwargs), right, rtol=1e-5, atol=1e-5)
    generated = [
        ours.generate(
            ids, source_type="text", target_type="speech", max_length=6, cond_scale=2.0, temperature=0.0
        ).tolist()
        for ids in (source, source.to(dtype))
    ]
    assert generated[0] == generated[1]


def test_condition_is_dropped_row_by_row() -> None:
    reference, ours = build_pair(dtype=torch.float64)
    source, target = random_ids(1, 6, 17).expand(64, -1), random_ids(1, 5, 13).expand(64, -1)
    kwargs = dict(source_type="speech", target_type="text", cond_drop_prob=0.5)
    random.seed(0)
    for _ in range(4):
        logits = reference(source, target, **kwargs)
        assert (logits - logits[:1]).abs().max() < 1e-12, (
            "the reference would have to drop rows one by one for this to fail"
        )
    torch.manual_seed(0)
    logits = ours(source, target, **kwargs)
    kept = reference(source[:1], target[:1], source_type="speech", target_type="text")
    dropped = reference(source[:1], target[:1], source_type="speech", target_type="text", cond_drop_prob=1.0)
    is_kept = (logits - kept).abs().amax(dim=(1, 2)) < 1e-10
    is_dropped = (logits - dropped).abs().amax(dim=(1, 2)) < 1e-10
    assert (is_kept ^ is_dropped).all()
    assert 16 <= int(is_dropped.sum()) <= 48


@pytest.mark.parametrize("logsumexp", [True, False])
def test_regulariser_of_a_single_row(logsumexp: bool) -> None:
    reference, ours = build_pair(align_reg_use_logsumexp_pool=logsumexp)
    source, target = random_ids(1, 6, 17), random_ids(1, 5, 13)
    assert torch.isnan(loss_of(reference, source, target, cond_drop_prob=1.0))
    loss = loss_of(ours, source, target, cond_drop_prob=1.0)
    torch.testing.assert_close(
        loss, loss_of(reference, source, target, cond_drop_prob=1.0, should_sim_regularize=False)
    )
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)


def test_rotary_positions_in_bfloat16() -> None:
    # the first pair rotates by one radian a position, of which bf16 keeps 8 bits: one radian off past 256, two past 512
    inner = load_reference().spear_tts_pytorch
    rotary = inner.RotaryEmbedding(64)
    vector = torch.eye(64)[0].expand(1, 1, 700, 64)
    truth = rotary.rotate_queries_or_keys(vector)[0, 0]
    shipped = inner.RotaryEmbedding(64).bfloat16().rotate_queries_or_keys(vector.bfloat16())[0, 0].float()
    from spear_fast import ops
    from spear_fast.transformer import RotaryEmbedding

    ours = ops.rotary(vector.bfloat16().transpose(1, 2), RotaryEmbedding(64).bfloat16().freqs)[0, :, 0].float()
    errors = [(value - truth).norm(dim=-1) for value in (shipped, ours)]
    assert errors[0][:257].max() < 0.01
    assert errors[0][257:512].max() > 0.95
    assert errors[0][512:].max() > 1.6
    assert errors[1].max() < 0.01
    # through a whole model: half the parameters' precision, not half the positions'
    reference, model = build_pair(dim_head=32)
    source, target = random_ids(1, 4, 17), random_ids(1, 600, 13)
    kwargs = dict(source_type="speech", target_type="text")
    exact = reference(source, target, **kwargs)[:, 300:]
    theirs, found = (
        (m.bfloat16()(source, target, **kwargs).float()[:, 300:] - exact).square().mean().sqrt()
        for m in (reference, model)
    )
    assert found < 0.7 * theirs


def test_regulariser_uses_no_undefined_names_across_processes(tmp_path) -> None:
    reference_distributed = __import__("sys").modules[load_reference().__name__ + ".distributed"]
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "one"), 1), rank=0, world_size=1
    )
    try:
        with pytest.raises(NameError, match="exists"):
            reference_distributed.all_gather_variable_dim(torch.zeros(2, 3))
    finally:
        torch.distributed.destroy_process_group()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_regulariser_in_two_processes, args=(port, str(tmp_path)), nprocs=2, start_method="fork")
    _, ours = build_pair(dtype=torch.float64)
    loss, gradients = _regularised(ours, slice(None))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["term"], loss)
        if rank == 0:
            total = found["gradients"]
            continue
        for name, gradient in found["gradients"].items():
            # averaged over processes, as DistributedDataParallel does
            torch.testing.assert_close(
                (total[name] + gradient) / 2,
                gradients[name],
                rtol=1e-6,
                atol=1e-9,
                msg=lambda text, n=name: f"{n}: {text}",
            )


def _regularised(model, rows: slice) -> tuple:
    """The regulariser alone, by difference, over `rows` of a batch of five."""
    source, target = pad_rows(random_ids(5, 7, 17), [7, 5, 3, 6, 2], -1)[rows], random_ids(5, 4, 13)[rows]
    model.zero_grad()
    term = loss_of(model, source, target, cond_drop_prob=1.0) - loss_of(
        model, source, target, cond_drop_prob=1.0, should_sim_regularize=False
    )
    term.backward()
    return term.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _regulariser_in_two_processes(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    assert gather.is_distributed()
    _, ours = build_pair(dtype=torch.float64)
    term, gradients = _regularised(ours, slice(0, 2) if rank == 0 else slice(2, 5))
    torch.save({"term": term, "gradients": gradients}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_freezing_never_makes_rotary_frequencies_trainable() -> None:
    reference, ours = build_pair()
    name = "source_transformer.layers.0.0.rotary_emb.freqs"
    assert not reference.get_parameter(name).requires_grad
    for model in (reference, ours):
        model.unfreeze_all()
    assert reference.get_parameter(name).requires_grad, "weight decay would now shrink the positions"
    assert not any(p.requires_grad for n, p in ours.named_parameters() if n.endswith("freqs"))


def test_loaded_rotary_frequencies_take_effect_after_a_run() -> None:
    other = build_reference()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("freqs"):
                parameter.mul_(0.5)
    source, target = random_ids(1, 6, 17), random_ids(1, 5, 13)
    kwargs = dict(source_type="speech", target_type="text")
    expected = other(source, target, **kwargs)
    reference, ours = build_pair()
    for model in (reference, ours):
        model(source, target, **kwargs)
        model.load_state_dict(other.state_dict())
    # the reference continues with the table that it made from the old ones
    assert (reference(source, target, **kwargs) - expected).abs().max() > 1e-2
    torch.testing.assert_close(ours(source, target, **kwargs), expected, rtol=1e-4, atol=1e-5)


def test_interior_pads_and_masks_keep_float64_exactness() -> None:
    # the mended paths are held to the same standard as the rest: against rows alone in float64
    truth, ours_double = build_pair(2, dtype=torch.float64)
    theirs, ours = build_pair(2)
    source, target = pad_rows(random_ids(3, 9, 17, seed=4), [9, 1, 5], -1), random_ids(3, 4, 13, seed=5)
    kwargs = dict(source_type="speech", target_type="text")
    alone = {
        name: torch.cat(
            [model(row[row != -1][None], ids[None], **kwargs) for row, ids in zip(source, target, strict=True)]
        )
        for name, model in (("truth", truth), ("theirs", theirs))
    }
    torch.testing.assert_close(ours_double(source, target, **kwargs), alone["truth"], rtol=1e-10, atol=1e-10)
    assert_as_exact(ours(source, target, **kwargs), alone["theirs"], alone["truth"])
