"""Two processes on one machine train as one does over the whole batch."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from reference import load_reference
from training_jobs import Rows, model, pairs, reference_model, reference_trainers, same_weights, settings, speech

from spear_fast import SemanticToTextDatasetGenerator, SemanticToTextTrainer, SpeechSpeechPretrainer
from spear_fast.distributed import all_gather, all_gather_rows

# every row loses its source, so that the regulariser compares all
ALL_DROPPED = dict(cond_drop_prob=1 - 1e-9, align_reg_loss_weight=5.0)
STEPS = dict(num_train_steps=4, num_warmup_steps=1, lr=1e-2, save_model_every=2)


def in_two_processes(function, folder) -> list:
    """Runs `function(rank, folder)` in two processes, and returns what each returned."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    multiprocessing.start_processes(_begin, args=(function, port, str(folder)), nprocs=2, start_method="fork")
    return [torch.load(f"{folder}/{function.__name__}{rank}.pt", weights_only=False) for rank in range(2)]


def _begin(rank: int, function, port: int, folder: str) -> None:
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    # what an earlier test in the parent found out about its only process
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(function(rank, folder), f"{folder}/{function.__name__}{rank}.pt")
    dist.destroy_process_group()


def gathered(rank: int, folder: str):
    rows = torch.arange(3.0 + rank)[:, None].expand(-1, 2).clone().requires_grad_()
    joined = all_gather_rows(rows * 2)
    weights = torch.arange(7.0)[:, None]
    # as a loss over all rows: every process has the whole of it
    (joined * weights).sum().backward()
    wide, sizes = all_gather(torch.full((2, 1 + rank), float(rank)), dim=1)
    empty = all_gather_rows(torch.ones(rank * 2, 3))
    return joined.detach(), rows.grad, wide, sizes, empty


def test_rows_are_gathered_with_their_gradients(tmp_path):
    results = in_two_processes(gathered, tmp_path)
    weights = torch.arange(7.0)[:, None].expand(-1, 2)
    for rank, (joined, gradient, wide, sizes, empty) in enumerate(results):
        assert joined[:, 0].tolist() == [0, 2, 4, 0, 2, 4, 6]
        # both processes' losses reach each row; the mean over processes, which comes later, makes one of the two
        assert torch.equal(gradient, 2 * 2 * weights[3 * rank : 3 + 4 * rank])
        assert wide.tolist() == [[0, 1, 1]] * 2
        assert sizes.tolist() == [1, 2]
        assert empty.tolist() == [[1.0] * 3] * 2
    alone = torch.ones(2, 2)
    assert all_gather_rows(alone) is alone
    assert all_gather(alone) == (alone, None)


def test_the_reference_cannot_gather_across_processes():
    load_reference()
    names = vars(sys.modules["spear_tts_pytorch.distributed"])
    assert "exists" not in names
    assert "pad_dim_to" not in names


def trained(rank: int, folder: str):
    """Trains with the regulariser, and goes on from the middle in a folder of its own."""
    import shutil

    torch.manual_seed(5)
    # the same rows a step as one process with batches of four
    options = settings(f"{folder}/run", batch_size=2, accelerate_kwargs={"cpu": True}, **STEPS)
    trainer = SemanticToTextTrainer(model(**ALL_DROPPED).double(), dataset=pairs(), **options)
    draw = torch.rand(1, generator=None).item()
    logs = []
    trainer.train(logs.append)
    split = settings(f"{folder}/split", batch_size=4, split_batches=True, accelerate_kwargs={"cpu": True}, **STEPS)
    halves = SemanticToTextTrainer(model(**ALL_DROPPED).double(), dataset=pairs(), **split)
    rows = next(halves.dl_iter)[0].shape[0]
    # deletes at random, so that each process has to go on with its own draws
    again = settings(f"{folder}/pre", batch_size=2, accelerate_kwargs={"cpu": True}, **STEPS)
    torch.manual_seed(6)
    whole = SpeechSpeechPretrainer(model(ff_dropout=0.1), dataset=speech(), **again)
    whole.train()
    whole.accelerator.wait_for_everyone()
    if rank == 0:
        shutil.copytree(f"{folder}/pre", f"{folder}/parts")
        os.remove(f"{folder}/parts/speech.speech.3.pt")
    whole.accelerator.wait_for_everyone()
    torch.manual_seed(7)
    resumed = SpeechSpeechPretrainer(
        model(ff_dropout=0.1), dataset=speech(), **{**again, "results_folder": f"{folder}/parts", "resume": True}
    )
    began = int(resumed.steps)
    resumed.train()
    return dict(
        logs=logs,
        state=trainer.model.state_dict(),
        draw=draw,
        rows=rows,
        began=began,
        resumed=same_weights(whole.model, resumed.model),
        files=sorted(os.listdir(f"{folder}/run")),
    )


def test_training_and_going_on(tmp_path):
    first, second = in_two_processes(trained, tmp_path)
    alone = SemanticToTextTrainer(
        model(**ALL_DROPPED).double(), dataset=pairs(), **settings(tmp_path / "alone", batch_size=4, **STEPS)
    )
    logs = []
    alone.train(logs.append)
    rates = [1e-5, *(1e-2 * 0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3))]
    for one, result in enumerate((first, second)):
        assert [log["lr"] for log in result["logs"]] == pytest.approx(rates), "no faster with more processes"
        assert result["rows"] == 2
        assert result["began"] == 3
        assert result["resumed"], f"process {one} went on elsewhere"
        assert result["files"] == [f"semantic.text.{step}.pt" for step in (0, 2, 3)]
        for name, tensor in alone.model.state_dict().items():
            torch.testing.assert_close(result["state"][name], tensor, rtol=1e-6, atol=1e-8)
    assert first["draw"] != second["draw"], "both would drop and delete the same"
    assert [log["valid_loss"] for log in logs[:1]] == pytest.approx([first["logs"][0]["valid_loss"]], rel=1e-5)


def stepped_schedule(rank: int, folder: str):
    options = settings(f"{folder}/theirs{rank}", accelerate_kwargs={"cpu": True})
    theirs = reference_trainers().SemanticToTextTrainer(reference_model(), dataset=pairs(), **options)
    for _ in range(3):
        theirs.scheduler.step()
    return theirs.scheduler.scheduler.last_epoch


def test_the_reference_s_schedule_runs_faster_with_more_processes(tmp_path):
    assert in_two_processes(stepped_schedule, tmp_path) == [6, 6]


def labelled(rank: int, folder: str):
    rows = Rows(torch.arange(3 + index) for index in range(5))
    generator = SemanticToTextDatasetGenerator(model().eval(), dataset=rows, folder=f"{folder}/rows", batch_size=2)
    mine = generator.remaining()
    generator(max_length=4, beam_size=2)
    return mine


def test_processes_share_the_rows_to_label(tmp_path):
    assert in_two_processes(labelled, tmp_path) == [[0, 2, 4], [1, 3]]
    assert {path.name for path in (tmp_path / "rows").glob("*.pt")} == {f"{index}.pt" for index in range(5)}
