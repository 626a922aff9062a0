"""What a trainer is given: refused where it would be ignored; and what a killed run leaves: nothing for long."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch.utils.data import TensorDataset
from training_jobs import Rows, model, pairs, same_weights, settings, speech

from spear_fast import (
    SemanticToTextDatasetGenerator,
    SemanticToTextTrainer,
    SpeechSpeechPretrainer,
    TextToSemanticTrainer,
)
from spear_fast.training.checkpoints import write_whole


def refused(call, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(grad_accum_every=0), "grad_accum_every must be a whole number of at least 1, got 0"),
        (dict(batch_size=0), "batch_size must be"),
        (dict(batch_size=2.5), "batch_size must be"),
        (dict(num_train_steps=0), "num_train_steps must be"),
        (dict(num_warmup_steps=-1), "num_warmup_steps must be a whole number of at least 0"),
        (dict(log_every=0), "log_every must be"),
        (dict(save_results_every=0), "save_results_every must be"),
        (dict(save_model_every=None), "save_model_every must be"),
        (dict(num_valid_batches=0), "num_valid_batches must be"),
        (dict(num_workers=-1), "num_workers must be"),
        (dict(input_sample_hz=0), "input_sample_hz must be"),
        (dict(max_grad_norm=0.0), "max_grad_norm must be above 0"),
        (dict(lr=float("inf")), "lr must be above 0"),
        (dict(initial_lr=-1e-5), "initial_lr must be at least 0"),
        (dict(wd=-0.1), "wd must be at least 0"),
        (dict(valid_frac=1.0), "valid_frac must be in"),
        (dict(valid_frac=-0.1), "valid_frac must be in"),
        # each would be overruled without a word
        (dict(max_batch_tokens=30, drop_last=True), "drop_last .* max_batch_tokens"),
        (dict(max_batch_tokens=30, split_batches=True), "split_batches .* max_batch_tokens"),
        (dict(accelerate_kwargs={"gradient_accumulation_steps": 4}), "gradient_accumulation_steps.*grad_accum_every"),
        (dict(accelerate_kwargs={"dataloader_config": object()}), "dataloader_config"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(tmp_path: Path, changes: dict, words: str) -> None:
    refused(lambda: SpeechSpeechPretrainer(model(), dataset=speech(), **settings(tmp_path, **changes)), words)
    assert not list(tmp_path.iterdir())


def test_ways_to_freeze_exclude_each_other(tmp_path: Path) -> None:
    options = settings(tmp_path, freeze_encoder_layers_below=1, train_encoder_layers=1)
    refused(lambda: TextToSemanticTrainer(model(), dataset=pairs(), **options), "exclude each other")
    options = settings(tmp_path, train_encoder_layers=-1)
    refused(lambda: TextToSemanticTrainer(model(), dataset=pairs(), **options), "at least 0")
    refused(lambda: model().freeze_encoder_below_layer(-2), "at least 0")


@pytest.mark.parametrize(
    "other", [torch.tensor([0.5, 0.5]), torch.tensor([True, False]), torch.tensor([1j, 2j])], ids=lambda t: str(t.dtype)
)
def test_rows_of_several_types_are_refused(tmp_path: Path, other: torch.Tensor) -> None:
    # they became ids by losing their fractions
    rows = Rows([torch.arange(3)] * 3 + [other])
    trainer = SpeechSpeechPretrainer(model(), dataset=rows, **settings(tmp_path))
    refused(trainer.train, "integer types .* float types")


class Tracker(GeneralTracker):
    """Counts what is logged, and how often the run has ended."""

    name = "counting"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logs: list[int] = []
        self.ends = 0

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict) -> None:
        pass

    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        assert not self.ends, "logged after the end"
        self.logs.append(step)

    def finish(self) -> None:
        self.ends += 1


def test_trackers_are_ended_once(tmp_path: Path) -> None:
    tracker = Tracker()
    options = settings(tmp_path, accelerate_kwargs={"log_with": tracker})
    trainer = SemanticToTextTrainer(model(), dataset=pairs(), **options)
    trainer.train_step()
    assert tracker.ends == 0
    trainer.train()
    assert set(tracker.logs) == set(range(6))
    assert tracker.ends == 1
    trainer.train()
    trainer.train_step()
    assert tracker.ends == 1


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_files_that_killed_trainers_left_are_removed(tmp_path: Path) -> None:
    dead, left = dead_process(), b"half a checkpoint"
    stale = tmp_path / f".semantic.text.3.pt.{dead}.tmp"
    of_another = tmp_path / f".speech.speech.3.pt.{dead}.tmp"
    alive = tmp_path / f".semantic.text.4.pt.{os.getppid()}.tmp"
    users = tmp_path / ".notes.tmp"
    for path in (stale, of_another, alive, users):
        path.write_bytes(left)
    SemanticToTextTrainer(model(), dataset=pairs(), **settings(tmp_path, resume=True))
    assert {path.name for path in tmp_path.glob(".*.tmp")} == {of_another.name, alive.name, users.name}
    # what is left has the name that a killed process gives
    names: list[str] = []
    write_whole(tmp_path / "semantic.text.3.pt", lambda file: names.append(Path(file.name).name))
    assert names == [stale.name.replace(str(dead), str(os.getpid()))]


def generator(folder: Path, **options) -> SemanticToTextDatasetGenerator:
    return SemanticToTextDatasetGenerator(model(), dataset=TensorDataset(pairs(4).tensors[0]), folder=folder, **options)


def test_files_that_killed_generators_left_are_removed(tmp_path: Path) -> None:
    dead = dead_process()
    old, new = tmp_path / f".2.pt.{dead}.tmp", tmp_path / f".3.pt.{dead}.tmp"
    note = tmp_path / f".generator.json.{dead}.tmp"
    for path in (old, new, note):
        path.write_bytes(b"half a row")
    for path in (old, note):
        os.utime(path, (time.time() - 7200,) * 2)
    generator(tmp_path)(max_length=4)
    # a new one may be another machine's that is at work
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [new.name]
    assert len(list(tmp_path.glob("*.pt"))) == 4


@pytest.mark.parametrize(
    "option", [dict(num_return_sequences=2), dict(return_source=True), dict(return_alignment=True)]
)
def test_a_generator_refuses_what_a_row_would_not_show(tmp_path: Path, option: dict) -> None:
    refused(lambda: generator(tmp_path)(max_length=4, beam_mode="standard", **option), next(iter(option)))
    generator(tmp_path)(max_length=4, num_return_sequences=1, return_source=False)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[1]", "\x00"])
def test_a_damaged_note_of_a_generator_is_one_sentence(tmp_path: Path, text: str) -> None:
    job = generator(tmp_path)
    (tmp_path / "generator.json").write_text(text)
    refused(lambda: job(max_length=4), r"generator\.json")


@pytest.mark.parametrize("batch_size", [0, -1, 1.5])
def test_a_generator_of_no_batches_is_refused(tmp_path: Path, batch_size: int) -> None:
    refused(lambda: generator(tmp_path, batch_size=batch_size), "batch_size must be")


def test_a_checkpoint_without_optimizer_is_taken_alone(tmp_path: Path) -> None:
    trainer = SemanticToTextTrainer(model(), dataset=pairs(), **settings(tmp_path / "run"))
    torch.save({"model": model(4).state_dict()}, tmp_path / "x.pt")
    refused(lambda: trainer.load(tmp_path / "x.pt"), "restore_optimizer=False")
    assert same_weights(trainer.model, model())
    trainer.load(tmp_path / "x.pt", restore_optimizer=False)
    assert same_weights(trainer.model, model(4))


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    other = SpeechSpeechPretrainer(model(4), dataset=speech(), **settings(tmp_path / "other"))
    other.save(tmp_path / "x.pt")
    trainer = SemanticToTextTrainer(model(), dataset=pairs(), **settings(tmp_path / "run"))
    refused(lambda: trainer.load(tmp_path / "x.pt"), "freeze the same layers")
    assert same_weights(trainer.model, model())


def test_validation_leaves_every_part_in_its_mode(tmp_path: Path) -> None:
    trainer = SemanticToTextTrainer(model(cond_drop_prob=0.2), dataset=pairs(), **settings(tmp_path))
    trainer.model.train()
    trainer.model.source_transformer.eval()
    before = [part.training for part in trainer.train_wrapper.modules()]
    trainer.validate()
    assert [part.training for part in trainer.train_wrapper.modules()] == before
    assert trainer.model.cond_drop_prob == 0.2
