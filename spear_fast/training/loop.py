"""The loop under the three trainers: data, schedule, steps, validation, checkpoints, on accelerate."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, random_split

from spear_fast.model import TextToSemantic
from spear_fast.training.data import Collate, EpochShuffle
from spear_fast.weights import read_package


def _accelerator(split_batches: bool, accelerate_kwargs: dict[str, Any]) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
    except ImportError as error:
        raise ValueError(
            f"training needs the package accelerate ({error}); pip install 'spear_fast[train]'."
        ) from error
    arguments = dict(accelerate_kwargs)
    handlers = list(arguments.pop("kwargs_handlers", None) or [])
    if not any(isinstance(handler, DistributedDataParallelKwargs) for handler in handlers):
        # each task leaves parameters out: pretraining has no text
        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    arguments.setdefault("dataloader_config", DataLoaderConfiguration(split_batches=split_batches))
    return Accelerator(kwargs_handlers=handlers, **arguments)


class Trainer(nn.Module):
    """What the three trainers share: data, schedule, steps, validation, checkpoints.

    The learning rate warms up from `initial_lr` to `lr` in `num_warmup_steps` and then falls along a cosine to zero at
    `num_train_steps`, in optimizer steps, whatever the number of processes. Checkpoints are the reference's packages
    with the step, the random state and the place in the data added.

    force_clear_prev_results: True deletes a results folder that is not empty, False keeps what is there. resume: goes
    on from the newest checkpoint in it. With neither, a folder that is not empty is an error: nothing is ever asked.
    """

    name = "training"
    prefix = "model"
    wav2vec: nn.Module | None
    steps: Tensor

    def __init__(
        self,
        model: TextToSemantic,
        train_wrapper: nn.Module,
        dataset: Dataset[Any] | None,
        pad_ids: list[int],
        *,
        num_train_steps: int,
        num_warmup_steps: int,
        batch_size: int,
        lr: float,
        initial_lr: float,
        grad_accum_every: int,
        wd: float,
        max_grad_norm: float | None,
        valid_frac: float,
        random_split_seed: int,
        log_every: int,
        save_results_every: int,
        save_model_every: int,
        results_folder: str | Path,
        accelerate_kwargs: dict[str, Any],
        split_batches: bool,
        drop_last: bool,
        force_clear_prev_results: bool | None,
        resume: bool,
    ) -> None:
        super().__init__()
        if dataset is None or not len(dataset):  # type: ignore[arg-type]
            raise ValueError("dataset must hold at least one row, got none.")
        self.accelerator = _accelerator(split_batches, accelerate_kwargs)
        self.model = model
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))
        self.num_train_steps, self.num_warmup_steps = num_train_steps, num_warmup_steps
        self.batch_size, self.grad_accum_every = batch_size, grad_accum_every
        self.lr, self.initial_lr, self.max_grad_norm = lr, initial_lr, max_grad_norm
        self.log_every, self.save_results_every, self.save_model_every = log_every, save_results_every, save_model_every

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW if wd > 0 else torch.optim.Adam
        optim = optimizer(trained, lr=lr, weight_decay=wd, betas=(0.9, 0.99))
        # not prepared by accelerate, which would step it once for each process
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optim, self._rate)

        self.ds, self.valid_ds = self._split(dataset, valid_frac, random_split_seed)
        self.order = EpochShuffle(len(self.ds), random_split_seed)  # type: ignore[arg-type]
        # with a generator of its own, beginning an epoch draws nothing from the random state that dropout uses
        loading: dict[str, Any] = {
            "batch_size": batch_size,
            "collate_fn": Collate(pad_ids),
            "drop_last": drop_last,
            "generator": torch.Generator(),
        }
        self.train_wrapper, self.optim, self.dl, self.valid_dl = self.accelerator.prepare(
            train_wrapper,
            optim,
            DataLoader(self.ds, sampler=self.order, **loading),
            DataLoader(self.valid_ds, **loading),
        )
        self.dl_iter, self.valid_dl_iter = self._batches(0), _cycle(self.valid_dl)

        self.results_folder = Path(results_folder)
        self._open_results(force_clear_prev_results, resume)
        settings = {"num_train_steps": num_train_steps, "num_warmup_steps": num_warmup_steps}
        self.accelerator.init_trackers(
            self.name, config={**settings, "learning_rate": lr, "initial_learning_rate": initial_lr}
        )

    def _rate(self, step: int) -> float:
        if step < self.num_warmup_steps:
            return (self.initial_lr + (self.lr - self.initial_lr) * step / self.num_warmup_steps) / self.lr
        left = max(self.num_train_steps - self.num_warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(step - self.num_warmup_steps, left) / left))

    def _split(self, dataset: Dataset[Any], valid_frac: float, seed: int) -> tuple[Dataset[Any], Dataset[Any]]:
        size: int = len(dataset)  # type: ignore[arg-type]
        if valid_frac <= 0:
            self.print(f"training with shared training and valid dataset of {size} samples")
            return dataset, dataset
        train_size = int((1 - valid_frac) * size)
        if train_size < self.batch_size or size == train_size:
            raise ValueError(
                f"dataset must leave a batch of {self.batch_size} for training and a row for validation, got {size} "
                f"rows at valid_frac {valid_frac}; pass valid_frac=0 to validate on the training rows."
            )
        parts = random_split(dataset, [train_size, size - train_size], torch.Generator().manual_seed(seed))
        self.print(f"training with dataset of {train_size} samples and validating with {size - train_size} samples")
        return parts[0], parts[1]

    def _open_results(self, clear: bool | None, resume: bool) -> None:
        old = (
            sorted(self.results_folder.glob(f"{self.prefix}.*.pt"), key=_number) if self.results_folder.is_dir() else []
        )
        filled = self.results_folder.is_dir() and any(self.results_folder.iterdir())
        if filled and clear is None and not resume:
            raise ValueError(
                f"{self.results_folder} is not empty; pass resume=True to go on from its newest checkpoint, "
                "force_clear_prev_results=True to delete it, or another results_folder."
            )
        if self.is_main and filled and clear:
            shutil.rmtree(self.results_folder)
        self.accelerator.wait_for_everyone()
        self.results_folder.mkdir(parents=True, exist_ok=True)
        if resume and old and not clear:
            self.load(old[-1])

    def save(self, path: str | Path) -> None:
        """Writes a checkpoint: model, optimizer, scheduler, step, random state."""
        package = {
            "model": self.accelerator.get_state_dict(self.model),
            "optim": self.optim.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "steps": int(self.steps),
            "rng": torch.get_rng_state(),
        }
        unfinished = Path(f"{path}.tmp")
        torch.save(package, unfinished)
        unfinished.replace(path)

    def load(self, path: str | Path, restore_optimizer: bool = True) -> None:
        """Goes on from a checkpoint, ours or the reference's; of the latter the step is in the file's name."""
        package = read_package(path)
        self.accelerator.unwrap_model(self.model).load_state_dict(package["model"])
        if not restore_optimizer:
            return
        self.optim.load_state_dict(package["optim"])
        if "steps" in package:
            self.scheduler.load_state_dict(package["scheduler"])
            self.steps.fill_(package["steps"])
            torch.set_rng_state(package["rng"])
        else:
            # the reference's schedule is of another kind; the next step is one behind that in the name
            self.steps.fill_(_number(Path(path)) + 1)
            self.scheduler.last_epoch = int(self.steps)
        self.dl_iter = self._batches(int(self.steps) * self.grad_accum_every)

    def _batches(self, done: int) -> Iterator[Any]:
        from accelerate import skip_first_batches

        epoch, skipped = divmod(done, len(self.dl))
        while True:
            self.order.epoch = epoch
            yield from skip_first_batches(self.dl, skipped) if skipped else self.dl
            epoch, skipped = epoch + 1, 0

    def print(self, msg: str) -> None:
        self.accelerator.print(msg)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the model generates; see `TextToSemantic.generate`."""
        return self.accelerator.unwrap_model(self.model).generate(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_distributed(self) -> bool:
        return self.accelerator.num_processes > 1

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def is_local_main(self) -> bool:
        return self.accelerator.is_local_main_process

    def speech_ids(self, speech: Tensor | list[Tensor]) -> Tensor:
        """Returns ids `[batch, length]` of a batch of ids or of a list of waves."""
        if isinstance(speech, Tensor):
            return speech
        if self.wav2vec is None:
            raise ValueError("the dataset gives raw audio, but there is no wav2vec module; give it ids or a wav2vec.")
        with torch.no_grad():
            rows = [self.wav2vec.eval()(wave[None].to(self.device)).flatten() for wave in speech]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.model.semantic_pad_id)

    def batch_loss(self, batch: Any) -> Tensor:
        """Returns the loss of one batch of the dataset."""
        raise NotImplementedError

    def train_step(self) -> dict[str, float]:
        """Takes one optimizer step and returns its logs."""
        step = int(self.steps)
        self.train_wrapper.train()
        total = torch.zeros((), device=self.device)
        for _ in range(self.grad_accum_every):
            loss = self.batch_loss(next(self.dl_iter)) / self.grad_accum_every
            self.accelerator.backward(loss)
            total += loss.detach()
        if self.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optim.step()
        self.optim.zero_grad()
        self.scheduler.step()
        self.steps += 1

        logs = {"loss": float(total)}
        if step % self.log_every == 0:
            self.print(f"{step}: loss: {logs['loss']:0.3f}")
        self.accelerator.log({"train_loss": logs["loss"]}, step=step)
        if step % self.save_results_every == 0:
            self._validate(step)
        if step % self.save_model_every == 0 or step + 1 == self.num_train_steps:
            self.accelerator.wait_for_everyone()
            if self.is_main:
                self.save(self.results_folder / f"{self.prefix}.{step}.pt")
                self.print(f"{step}: saving model to {self.results_folder}")
        return logs

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        # by every process, since losses may compare rows across them; its draws leave training's as they are
        with torch.random.fork_rng(devices=[]):
            self.train_wrapper.eval()
            loss = self.accelerator.reduce(self.batch_loss(next(self.valid_dl_iter)), reduction="mean")
        self.print(f"{step}: valid loss {float(loss):0.3f}")
        self.accelerator.log({"valid_loss": float(loss)}, step=step)

    def train(self, log_fn: Any = None) -> Any:  # type: ignore[override]
        """Trains to the last step; calls `log_fn` with the logs of each. With a bool it is `nn.Module.train`."""
        if isinstance(log_fn, bool):
            return super().train(log_fn)
        while int(self.steps) < self.num_train_steps:
            logs = self.train_step()
            if log_fn is not None:
                log_fn(logs)
        self.print("training complete")
        return None


def _cycle(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _number(path: Path) -> int:
    found: list[str] = re.findall(r"\d+", path.name)
    return int(found[-1]) if found else 0


_SHARED = (
    "num_train_steps", "num_warmup_steps", "batch_size", "lr", "initial_lr", "grad_accum_every", "wd", "max_grad_norm",
    "valid_frac", "random_split_seed", "log_every", "save_results_every", "save_model_every", "results_folder",
    "accelerate_kwargs", "split_batches", "drop_last", "force_clear_prev_results", "resume",
)  # fmt: skip


def shared_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns those of a trainer's arguments that `Trainer` takes."""
    return {name: arguments[name] for name in _SHARED}
