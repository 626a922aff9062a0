"""A trainer's results folder: checkpoints are written to it, and a run that ended early resumes from the newest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spear_fast.checkpoints.weights import fitted, load_into, read_package
from spear_fast.training import checkpoints
from spear_fast.training.accelerated import Accelerated
from spear_fast.training.optimizer import load_optimizer
from spear_fast.training.randomness import random_state, restore_random_state


class Resumable(Accelerated):
    """The part of `Trainer` that saves all that a run consists of, and loads it again."""

    # begins the names of checkpoints
    prefix: str
    results_folder: Path
    optim: Any
    scheduler: Any
    steps: Tensor
    grad_accum_every: int
    dl_iter: Iterator[Any]
    # number of the next batch, over all processes
    _next_batch: int

    def _rate(self, step: int) -> float:
        raise NotImplementedError

    def _batches_from(self, number: int) -> Iterator[Any]:
        raise NotImplementedError

    def _open_results(self, clear: bool | None, resume: bool) -> None:
        checkpoints.check_results_folder(self.results_folder, clear, resume)
        # all have looked before one deletes
        self.accelerator.wait_for_everyone()
        if self.is_main and clear:
            checkpoints.clear_folder(self.results_folder)
        self.accelerator.wait_for_everyone()
        self.results_folder.mkdir(parents=True, exist_ok=True)
        if self.is_main:
            checkpoints.remove_unfinished(self.results_folder, f"{self.prefix}.*.pt")
        found = checkpoints.checkpoints_in(self.results_folder, self.prefix) if resume else []
        if found:
            self.load(found[-1])

    def save(self, path: str | Path, random_states: list[dict[str, Any]] | None = None) -> None:
        """Writes a checkpoint: model, optimizer, scheduler, steps, position in the data, random states.

        random_states: those of all processes; by default that of this one alone.
        """
        scaler = self.accelerator.scaler
        package = {
            "model": self.accelerator.get_state_dict(self.model),
            "optim": self.optim.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "steps": int(self.steps),
            "next_batch": self._next_batch,
            "random": random_states or [random_state(self.device)],
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        checkpoints.write_whole(Path(path), lambda file: torch.save(package, file))

    def load(self, path: str | Path, restore_optimizer: bool = True) -> None:
        """Continues from a checkpoint, ours or the reference's; the next step is one more than the file's number.

        restore_optimizer: False takes the model alone. Raises FileNotFoundError, or ValueError when it does not fit;
        the trainer is then as it was.
        """
        package, model = read_package(path), self.accelerator.unwrap_model(self.model)
        if restore_optimizer:
            if "optim" not in package:
                raise ValueError(
                    f"{path} has no optimizer state; pass restore_optimizer=False to take the model alone."
                )
            fitted(model, package["model"], path)
            load_optimizer(self.optim, package["optim"], path)
        load_into(model, package["model"], path)
        if not restore_optimizer:
            return
        steps = package.get("steps", checkpoints.number_of(path) + 1)
        self.steps.fill_(steps)
        # the rate follows from the step alone; the reference's scheduler is of another kind
        self.scheduler.last_epoch = steps
        for group, base in zip(self.optim.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * self._rate(steps)
        processes = self.accelerator.num_processes
        self.dl_iter = self._batches_from(package.get("next_batch", steps * self.grad_accum_every * processes))
        if package.get("scaler") is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(package["scaler"])
        states = package.get("random", [])
        if len(states) == processes:
            restore_random_state(states[self.accelerator.process_index], self.device)

    def _save_step(self, step: int) -> None:
        from accelerate.utils import gather_object

        states = gather_object([random_state(self.device)])
        if self.is_main:
            self.save(self.results_folder / f"{self.prefix}.{step}.pt", states)
            self.print(f"{step}: saving model to {self.results_folder}")
        self.accelerator.wait_for_everyone()
