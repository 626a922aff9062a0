"""The loop under the three trainers: data, schedule, steps, validation, checkpoints, on accelerate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, random_split

from spear_fast.evaluation import evaluation_mode
from spear_fast.model import TextToSemantic
from spear_fast.training.accelerated import leave_out_of_reduction, make_accelerator, use_half_residual
from spear_fast.training.batches import EndlessBatches, batch_sampler
from spear_fast.training.data import Collate, speech_ids
from spear_fast.training.optimizer import make_optimizer, skip_unless_finite, warmup_then_cosine
from spear_fast.training.randomness import same_randomness
from spear_fast.training.resumable import Resumable
from spear_fast.training.trainer_arguments import check_trainer_arguments


class Trainer(Resumable):
    """What the three trainers share: data, schedule, steps, validation, checkpoints.

    The learning rate warms up from `initial_lr` to `lr` in `num_warmup_steps` and then falls along a cosine to zero at
    `num_train_steps`, in optimizer steps, whatever the number of processes. Checkpoints are the reference's packages
    with the step, the position in the data and the random states added: a resumed run ends bit for bit like one that
    never stopped. A file's number is the step after which it was saved, counted from 0.

    num_train_steps, num_warmup_steps: optimizer steps. grad_accum_every: batches a step. lr, initial_lr: highest and
        first learning rate. wd: weight decay, of matrices alone. max_grad_norm: None for no clipping.
    batch_size: rows of one process; with `split_batches` of all together. drop_last: leaves out a smaller last batch.
    max_batch_tokens: batches of rows of about one length, as many as fit in so many tokens, instead of `batch_size`;
        padding is not counted, nor computed.
    valid_frac: fraction of the rows for validation, drawn by random_split_seed; 0 validates on the training rows.
    num_valid_batches: how many batches a validation takes, the same each time and with the same random draws.
    log_every, save_results_every, save_model_every: steps between lines of log, validations and checkpoints.
    results_folder: where checkpoints go. accelerate_kwargs: of `accelerate.Accelerator`. Without a mixed_precision a
        float32 model is multiplied in bfloat16 on a GPU that has it.
    force_clear_prev_results: True deletes a results folder that is not empty, False keeps what is there.
    resume: continues from the newest checkpoint in the results folder, if there is one.
        With neither, a folder that is not empty is an error: nothing is ever asked.
    input_sample_hz: sample rate of raw audio in Hz, passed on to `wav2vec`. num_workers: processes that read the
        dataset, batches ahead of the training.
    checkpoint_activations: keeps each layer's input alone and computes the rest again for the gradients: less memory,
        more time.
    unused: begin the names of the model's parameters that this kind of trainer never gives a gradient.

    Raises ValueError, one sentence, for arguments that are of no use or would not be obeyed, for a dataset of another
    form, and for a results folder that is not empty; ImportError without accelerate.
    """

    name: str
    wav2vec: nn.Module | None

    def __init__(
        self,
        model: TextToSemantic,
        train_wrapper: nn.Module,
        dataset: Dataset[Any] | None,
        pad_ids: list[int],
        *,
        wav2vec: nn.Module | None,
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
        max_batch_tokens: int | None,
        num_valid_batches: int,
        num_workers: int,
        input_sample_hz: int | None,
        checkpoint_activations: bool,
        unused: Sequence[str] = (),
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_trainer_arguments(arguments)
        if dataset is None or not len(dataset):  # type: ignore[arg-type]
            raise ValueError("dataset must hold at least one row, got none.")
        collate = Collate(pad_ids)
        # a dataset of another form is better found now than in the first step
        collate([dataset[0]])
        self.accelerator = make_accelerator(split_batches, accelerate_kwargs, model)
        self.model = model
        self.wav2vec = wav2vec
        if wav2vec is not None:
            wav2vec.requires_grad_(False)
        self.input_sample_hz = input_sample_hz
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))
        self.num_train_steps, self.num_warmup_steps = int(num_train_steps), int(num_warmup_steps)
        self.batch_size, self.grad_accum_every = batch_size, grad_accum_every
        self.lr, self.initial_lr, self.max_grad_norm = lr, initial_lr, max_grad_norm
        self.log_every, self.save_results_every, self.save_model_every = log_every, save_results_every, save_model_every

        optim = make_optimizer(self.optimized_parameters(), lr, wd)
        # not prepared by accelerate, which would step it once for each process
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optim, self._rate)

        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        if split_batches and batch_size % processes:
            raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {batch_size}.")
        rows = batch_size // processes if split_batches else batch_size
        self.ds, self.valid_ds = self._split(dataset, valid_frac, random_split_seed)
        pinned = self.device.type == "cuda"
        loading: dict[str, Any] = {"collate_fn": collate, "num_workers": num_workers, "pin_memory": pinned}
        sampler = batch_sampler(self.ds, rows, max_batch_tokens, seed=random_split_seed, drop_last=drop_last)
        self._order = EndlessBatches(sampler, stride=processes)
        # a generator of its own: otherwise each new iterator would draw from the one that training draws from
        self.dl = DataLoader(self.ds, batch_sampler=self._order, generator=torch.Generator(), **loading)
        valid = batch_sampler(self.valid_ds, rows, max_batch_tokens, seed=random_split_seed, drop_last=False).batches(0)
        mine = [valid[number] for number in range(rank, min(num_valid_batches, len(valid)), processes)]
        self.valid_dl = DataLoader(self.valid_ds, batch_sampler=mine, generator=torch.Generator(), **loading)
        for transformer in (model.source_transformer, model.target_transformer):
            transformer.checkpoint_activations = checkpoint_activations
        use_half_residual(model, self.accelerator.mixed_precision)
        leave_out_of_reduction(train_wrapper, unused)
        self.train_wrapper, self.optim = self.accelerator.prepare(train_wrapper, optim)
        # losses of the latest steps, which nobody has read yet: step, loss, learning rate
        self._unread: list[tuple[int, Tensor, float]] = []
        if rank:
            # torch starts all processes alike, and they would drop and delete the same
            torch.manual_seed(torch.initial_seed() + rank)
        self.dl_iter = self._batches_from(0)
        self.valid_dl_iter = (batch for _ in itertools.count() for batch in self.valid_dl)

        self.results_folder = Path(results_folder)
        self._open_results(force_clear_prev_results, resume)
        settings = {"num_train_steps": num_train_steps, "num_warmup_steps": num_warmup_steps}
        self.accelerator.init_trackers(
            self.name, config={**settings, "learning_rate": lr, "initial_learning_rate": initial_lr}
        )

    def optimized_parameters(self) -> list[nn.Parameter]:
        """Returns what the optimizer knows, in the reference's order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def warmup(self, step: int) -> float:
        """Returns the learning rate at a step of the warm-up, and `lr` after it."""
        return self.lr * self._rate(step) if step < self.num_warmup_steps else self.lr

    def _rate(self, step: int) -> float:
        return warmup_then_cosine(
            step,
            num_warmup_steps=self.num_warmup_steps,
            num_train_steps=self.num_train_steps,
            initial=self.initial_lr / self.lr,
        )

    def _split(self, dataset: Dataset[Any], valid_frac: float, seed: int) -> tuple[Dataset[Any], Dataset[Any]]:
        size: int = len(dataset)  # type: ignore[arg-type]
        train_size = int((1 - valid_frac) * size) if valid_frac > 0 else size
        if train_size < self.batch_size or (valid_frac > 0 and train_size == size):
            raise ValueError(
                f"dataset must leave a batch of {self.batch_size} for training and a row for validation, got {size} "
                f"rows at valid_frac {valid_frac}; pass valid_frac=0 to validate on the training rows."
            )
        if valid_frac <= 0:
            self.print(f"training with shared training and valid dataset of {size} samples")
            return dataset, dataset
        parts = random_split(dataset, [train_size, size - train_size], torch.Generator().manual_seed(seed))
        self.print(f"training with dataset of {train_size} samples and validating with {size - train_size} samples")
        return parts[0], parts[1]

    def _batches_from(self, number: int) -> Iterator[Any]:
        """Returns this process's batches, where `number` counts those of all processes since the start."""
        self._next_batch = number
        self._order.start = number + self.accelerator.process_index
        return iter(self.dl)

    def loss_of(self, wrapper: nn.Module, batch: Any) -> Tensor:
        """Returns the loss of one batch of the dataset."""
        raise NotImplementedError

    def train_step(self) -> dict[str, Any]:
        """Takes one optimizer step; returns `loss` (mean, in nats per token), `lr` and, where due, `valid_loss`.

        The loss, [], stays on the device: reading it waits for the step. One that is no number changes no weights; it
        raises FloatingPointError by the next line of log or checkpoint.
        """
        step = int(self.steps)
        self.train_wrapper.train()
        total = torch.zeros((), device=self.device)
        for number in range(1, self.grad_accum_every + 1):
            batch = next(self.dl_iter)
            self._next_batch += self.accelerator.num_processes
            # gradients are averaged over processes once a step
            last = number == self.grad_accum_every
            with nullcontext() if last else self.accelerator.no_sync(self.train_wrapper):
                loss = self.loss_of(self.train_wrapper, batch) / self.grad_accum_every
                self.accelerator.backward(loss)
            total += loss.detach()
        logs: dict[str, Any] = {"loss": total, "lr": self.optim.param_groups[0]["lr"]}
        self._unread.append((step, total, logs["lr"]))
        if self.max_grad_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        skip_unless_finite(self.optim, norm)
        self.optim.step()
        self.optim.zero_grad()
        self.scheduler.step()
        self.steps += 1

        if step % self.log_every == 0:
            self.print(f"{step}: loss: {self._read_losses():0.3f}")
        if step % self.save_results_every == 0:
            self._read_losses()
            logs["valid_loss"] = self.validate()
            self.print(f"{step}: valid loss {logs['valid_loss']:0.3f}")
            self.accelerator.log({"valid_loss": logs["valid_loss"]}, step=step)
        if step % self.save_model_every == 0 or step + 1 == self.num_train_steps:
            self._read_losses()
            self._save_step(step)
        return logs

    def _read_losses(self) -> float:
        """Reads the losses of the latest steps, passes them on to the trackers and returns the last one.

        Raises FloatingPointError where one is no number.
        """
        unread, self._unread = self._unread, []
        losses = torch.stack([loss for _, loss, _ in unread]).tolist() if unread else []
        for (step, _, rate), loss in zip(unread, losses, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of step {step} is {loss}; lower lr or look at the data.")
            self.accelerator.log({"train_loss": loss, "lr": rate}, step=step)
        return losses[-1] if losses else math.nan

    @torch.no_grad()
    def validate(self) -> float:
        """Returns the mean loss of the validation batches of all processes; leaves training as it was."""
        # not the distributed wrapper: processes may have different numbers of batches
        wrapper = self.accelerator.unwrap_model(self.train_wrapper)
        total = torch.zeros(2, dtype=torch.float64)
        with same_randomness(self.device), _evaluated(self.model, wrapper):
            for batch in self.valid_dl:
                total += torch.tensor([float(self.loss_of(wrapper, batch)), 1.0], dtype=torch.float64)
        loss, count = self.accelerator.reduce(total.float().to(self.device)).tolist()
        return loss / count

    def speech_ids(self, speech: Any) -> Any:
        """Returns ids `[batch, length]`, padded with the model's pad, of a batch of ids or of a list of waves."""
        return speech_ids(
            speech, self.wav2vec, self.device, pad_id=self.model.semantic_pad_id, input_sample_hz=self.input_sample_hz
        )

    def train(self, log_fn: Callable[[dict[str, Any]], Any] | bool | None = None) -> Any:  # type: ignore[override]
        """Trains to the last step, then ends the trackers; with a bool it is `nn.Module.train`.

        log_fn: called with what `train_step` returns, after each step.
        """
        if isinstance(log_fn, bool):
            return super().train(log_fn)
        while int(self.steps) < self.num_train_steps:
            logs = self.train_step()
            if log_fn is not None:
                log_fn(logs)
        self._read_losses()
        self.end_trackers()
        self.print("training complete")
        return None


@contextmanager
def _evaluated(model: TextToSemantic, wrapper: nn.Module) -> Iterator[None]:
    """Inside, no dropout, and every row has its source."""
    drop_prob = model.cond_drop_prob
    model.cond_drop_prob = 0.0
    try:
        with evaluation_mode(wrapper):
            yield
    finally:
        model.cond_drop_prob = drop_prob
