"""What two processes do at the same time, and how they are started: in a module that they can import by its name."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from training_jobs import Rows, model, pairs, reference_model, reference_trainers, same_weights, settings, speech

from spear_fast import SemanticToTextDatasetGenerator, SemanticToTextTrainer, SpeechSpeechPretrainer
from spear_fast.losses.gather import all_gather, all_gather_rows

# every row loses its source, so that the regulariser compares all
ALL_DROPPED = dict(cond_drop_prob=1 - 1e-9, align_reg_loss_weight=5.0)
STEPS = dict(num_train_steps=4, num_warmup_steps=1, lr=1e-2, save_model_every=2)


def in_two_processes(function, folder) -> list:
    """Runs `function(rank, folder)`, one of this module's, in two processes, and returns what each returned."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # not forks of the tests' own process: where torch was built for CUDA, what has run a backward pass cannot be forked
    multiprocessing.set_forkserver_preload(["torch", "accelerate", "spear_fast"])
    multiprocessing.start_processes(_begin, args=(function, port, str(folder)), nprocs=2, start_method="forkserver")
    return [torch.load(f"{folder}/{function.__name__}{rank}.pt", weights_only=False) for rank in range(2)]


def _begin(rank: int, function, port: int, folder: str) -> None:
    torch.set_num_threads(1)
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


def trained(rank: int, folder: str):
    """Trains with the regulariser, and resumes from the middle in a folder of its own."""
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
    # deletes at random, so that each process has to continue with its own draws
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


def spoiled(rank: int, folder: str):
    """Makes three steps without clipping, in the second of which one process' loss is no number."""
    torch.manual_seed(5)
    options = settings(f"{folder}/spoiled", batch_size=2, accelerate_kwargs={"cpu": True}, max_grad_norm=None)
    trainer = SemanticToTextTrainer(model(), dataset=pairs(), **options)
    whole, changed = trainer.loss_of, []
    for number in range(3):
        trainer.loss_of = lambda *given, number=number: whole(*given) * (math.nan if (rank, number) == (1, 1) else 1)
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train_step()
        changed.append(any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items()))
    return changed, trainer.model.state_dict()


def stepped_schedule(rank: int, folder: str):
    options = settings(f"{folder}/theirs{rank}", accelerate_kwargs={"cpu": True})
    theirs = reference_trainers().SemanticToTextTrainer(reference_model(), dataset=pairs(), **options)
    for _ in range(3):
        theirs.scheduler.step()
    return theirs.scheduler.scheduler.last_epoch


def labelled(rank: int, folder: str):
    rows = Rows(torch.arange(3 + index) for index in range(5))
    generator = SemanticToTextDatasetGenerator(model().eval(), dataset=rows, folder=f"{folder}/rows", batch_size=2)
    mine = generator.remaining()
    generator(max_length=4, beam_size=2)
    return mine
