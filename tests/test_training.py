"""The trainers learn, go on where they stopped, and do not have the reference's defects."""

from __future__ import annotations

import contextlib
import math
import os
import socket

import pytest
import torch
import torch.multiprocessing as multiprocessing
from reference import load_reference
from torch.utils.data import TensorDataset

from spear_fast import SemanticToTextTrainer, SpeechSpeechPretrainer, TextToSemantic, TextToSemanticTrainer

SIZES = dict(
    dim=32, source_depth=3, target_depth=1, heads=2, dim_head=16, num_text_token_ids=12, num_semantic_token_ids=10
)


def model(**changes) -> TextToSemantic:
    torch.manual_seed(3)
    return TextToSemantic(**{**SIZES, **changes})


def pairs(rows: int = 8) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    speech = torch.randint(0, 10, (rows, 7), generator=generator)
    text = torch.randint(1, 12, (rows, 5), generator=generator)
    return TensorDataset(speech, text)


def settings(folder, **changes):
    base = dict(
        num_train_steps=6, num_warmup_steps=2, batch_size=4, valid_frac=0, results_folder=str(folder), log_every=1000
    )
    return {**base, **changes}


def test_pretraining_takes_rows_of_different_lengths(tmp_path):
    rows = [torch.arange(length) % 10 for length in (5, 9, 12, 7)]
    trainer = SpeechSpeechPretrainer(model(), None, dataset=rows, **settings(tmp_path))
    losses = []
    trainer.train(lambda logs: losses.append(logs["loss"]))
    assert len(losses) == 6
    assert all(math.isfinite(loss) for loss in losses)
    assert int(trainer.steps) == 6


def test_a_tiny_set_is_learnt_with_its_ends_and_generate_works(tmp_path):
    data = pairs(4)
    trained = model()
    options = settings(tmp_path, num_train_steps=150, num_warmup_steps=5, lr=1e-2, save_results_every=1000)
    trainer = SemanticToTextTrainer(trained, dataset=data, **options)
    frozen = trained.source_transformer.layers[0][0].to_q[0].weight.clone()
    losses = []
    trainer.train(lambda logs: losses.append(logs["loss"]))
    assert losses[-1] < 0.02 * losses[0]
    speech, text = data.tensors
    generated = trainer.generate(
        speech, source_type="speech", target_type="text", beam_search_decode=True, max_length=20
    )
    # five tokens and the end: the model stops by itself
    assert torch.equal(generated[:, :5], text)
    assert (generated[:, 5] == trained.eos_id["text"]).all()
    assert torch.equal(frozen, trained.source_transformer.layers[0][0].to_q[0].weight)
    # what the reference's trainers call there
    assert not hasattr(load_reference().SemanticToTextWrapper, "generate")


def test_text_to_speech_trains_lower_layers_and_embeddings_and_freezes_the_upper(tmp_path):
    trained = model()
    TextToSemanticTrainer(trained, dataset=pairs(), **settings(tmp_path / "a"))
    layers = trained.source_transformer.layers
    assert [layer[0].to_q[0].weight.requires_grad for layer in layers] == [True, True, False]
    assert trained.token_emb["text"].weight.requires_grad
    assert not trained.token_emb["speech"].weight.requires_grad
    assert not any(parameter.requires_grad for parameter in trained.target_transformer.parameters())
    # the reference's default: the other way round
    TextToSemanticTrainer(trained, dataset=pairs(), freeze_encoder_layers_below=2, **settings(tmp_path / "b"))
    assert [layer[0].to_q[0].weight.requires_grad for layer in layers] == [False, False, True]


def test_two_trainers_live_in_one_process(tmp_path):
    for name in ("a", "b"):
        SpeechSpeechPretrainer(model(), dataset=pairs().tensors[0], **settings(tmp_path / name))
    trainer = load_reference().trainer
    trainer.check_one_trainer()
    with pytest.raises(AssertionError, match="only one Trainer"):
        trainer.check_one_trainer()


def test_a_folder_with_results_is_never_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    (tmp_path / "old.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty; pass resume=True"):
        SpeechSpeechPretrainer(model(), dataset=pairs().tensors[0], **settings(tmp_path))
    SpeechSpeechPretrainer(model(), dataset=pairs().tensors[0], **settings(tmp_path, force_clear_prev_results=False))
    assert (tmp_path / "old.txt").exists()
    SpeechSpeechPretrainer(model(), dataset=pairs().tensors[0], **settings(tmp_path, force_clear_prev_results=True))
    assert not (tmp_path / "old.txt").exists()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_that_goes_on_equals_one_that_never_stopped(tmp_path, accumulated):
    changes = dict(num_train_steps=10, batch_size=2, grad_accum_every=accumulated, save_results_every=3)
    options = dict(attn_dropout=0.1, ff_dropout=0.1)

    def run(folder, stop=None, **more):
        trained = model(**options)
        torch.manual_seed(11)
        trainer = SemanticToTextTrainer(trained, dataset=pairs(6), **settings(folder, **changes, **more))
        while int(trainer.steps) < (stop or 10):
            trainer.train_step()
        return trainer

    whole = run(tmp_path / "whole")
    first = run(tmp_path / "parts", stop=5)
    first.save(tmp_path / "parts" / "semantic.text.4.pt")
    torch.rand(7)
    second = run(tmp_path / "parts", resume=True)
    assert int(second.steps) == 10
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_a_checkpoint_of_the_reference_is_gone_on_with(tmp_path):
    reference = load_reference().TextToSemantic(**SIZES)
    optimizer = torch.optim.Adam([p for p in model().parameters() if p.requires_grad])
    package = dict(model=reference.state_dict(), optim=optimizer.state_dict(), scheduler={"last_epoch": 3})
    torch.save(package, tmp_path / "speech.speech.3.pt")
    trainer = SpeechSpeechPretrainer(model(), dataset=pairs().tensors[0], **settings(tmp_path, resume=True))
    assert int(trainer.steps) == 4
    assert torch.equal(trainer.model.start_token["text"], reference.start_token["text"])


def test_the_schedule_warms_up_and_falls_to_zero(tmp_path):
    options = settings(tmp_path, num_train_steps=10, num_warmup_steps=4, lr=1e-2, initial_lr=1e-3)
    trainer = SpeechSpeechPretrainer(model(), dataset=pairs().tensors[0], **options)
    rates = []
    for _ in range(10):
        rates.append(trainer.optim.param_groups[0]["lr"])
        trainer.train_step()
    wanted = [1e-3 + (1e-2 - 1e-3) * step / 4 for step in range(4)]
    wanted += [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx(wanted)
    assert trainer.optim.param_groups[0]["lr"] == pytest.approx(0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(dataset=None), "dataset must hold at least one row"),
        (dict(dataset=torch.zeros(4, 3, dtype=torch.long), valid_frac=0.5, batch_size=4), "must leave a batch of 4"),
    ],
)
def test_a_dataset_that_cannot_serve_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        SpeechSpeechPretrainer(model(), **settings(tmp_path, **changes))


def free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def regulariser_gradients(condition_drop: float, source, target):
    """Returns loss and gradients of one backward pass with the alignment regulariser over given rows."""
    trained = model(cond_drop_prob=condition_drop, align_reg_loss_weight=5.0).double()
    loss = trained(source, target, source_type="text", target_type="speech", return_loss=True)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1, 12, (4, 6), generator=generator), torch.randint(0, 10, (4, 5), generator=generator)


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    source, target = batch()
    # sources of another length on the other process
    rows = slice(0, 2) if rank == 0 else slice(2, 4)
    loss, gradients = regulariser_gradients(1 - 1e-9, source[rows], target[rows])
    for gradient in [loss, *gradients.values()]:
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    torch.save((loss, gradients), f"{folder}/{rank}.pt")


    from accelerate.utils import InitProcessGroupKwargs  # noqa: F401

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    options = settings(f"{folder}/run", num_train_steps=4, num_warmup_steps=0, batch_size=2, lr=1e-2)
    trainer = SpeechSpeechPretrainer(model(), dataset=pairs().tensors[0], accelerate_kwargs={"cpu": True}, **options)
    rates = []
    for _ in range(4):
        rates.append(trainer.optim.param_groups[0]["lr"])
        trainer.train_step()
    torch.save(rates, f"{folder}/rates{rank}.pt")
    torch.save(trainer.model.state_dict(), f"{folder}/weights{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one_does(tmp_path):
    multiprocessing.spawn(worker, args=(free_port(), str(tmp_path)), nprocs=2)
    source, target = batch()
    loss, gradients = regulariser_gradients(1 - 1e-9, source, target)
    for rank in range(2):
        got_loss, got = torch.load(tmp_path / f"{rank}.pt")
        assert got_loss == pytest.approx(loss.item(), rel=1e-9)
        assert got.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-7, atol=1e-12)
        # the schedule does not run faster with more processes
        wanted = [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
        assert torch.load(tmp_path / f"rates{rank}.pt") == pytest.approx(wanted)
    first, second = (torch.load(tmp_path / f"weights{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_reference_cannot_gather_across_processes():
    from importlib import import_module

    distributed = import_module(load_reference().__name__ + ".distributed")
    assert not hasattr(distributed, "exists")
    assert not hasattr(distributed, "pad_dim_to")
