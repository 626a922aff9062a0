"""Checkpoints: a resumed run ends, bit for bit, like one that never stopped; files go both ways."""

from __future__ import annotations

import os
import pickle
import random

import numpy as np
import pytest
import torch
from training_jobs import (
    Rows,
    model,
    pairs,
    reference_model,
    reference_trainers,
    same_weights,
    settings,
    speech,
    uneven,
)

from spear_fast import SemanticToTextTrainer, SpeechSpeechPretrainer, TextToSemanticTrainer
from spear_fast.training import checkpoints


class Noisy(Rows):
    """Pairs whose speech is shifted by draws from all three random generators."""

    def __getitem__(self, index: int):
        source, text = self.rows[index]
        shift = random.randrange(10) + np.random.randint(10) + int(torch.randint(10, ()))
        return (source + shift) % 10, text


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(grad_accum_every=2, drop_last=True), dict(max_batch_tokens=20), dict(wd=0.1, lr=1e-2)],
    ids=str,
)
def test_a_run_that_goes_on_equals_one_that_never_stopped(tmp_path, changes):
    # seven rows in batches of two: every checkpoint but one is in the middle of an epoch
    options = dict(num_train_steps=11, batch_size=2, save_results_every=3, save_model_every=4) | changes

    def run(folder, stop=None, **more):
        trained = model(attn_dropout=0.1, ff_dropout=0.1, cond_drop_prob=0.3)
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(11)
        trainer = SemanticToTextTrainer(trained, dataset=Noisy(uneven(7)), **settings(folder, **options, **more))
        logs = []
        while int(trainer.steps) < (stop or 11):
            logs.append(trainer.train_step())
        return trainer, logs

    whole, losses = run(tmp_path / "whole")
    # dies at step 7: the newest checkpoint is that of step 4
    run(tmp_path / "parts", stop=7)
    assert [path.name for path in checkpoints.checkpoints_in(tmp_path / "parts", "semantic.text")] == [
        "semantic.text.0.pt", "semantic.text.4.pt",
    ]  # fmt: skip
    again, rest = run(tmp_path / "parts", resume=True)
    assert rest == losses[5:]
    assert same_weights(whole.model, again.model)
    states = [torch.load(tmp_path / name / "semantic.text.10.pt") for name in ("whole", "parts")]
    assert states[0]["steps"] == states[1]["steps"] == 11
    for key, moments in states[0]["optim"]["state"].items():
        assert all(torch.equal(value, states[1]["optim"]["state"][key][name]) for name, value in moments.items())
    assert states[0]["random"][0]["python"] == states[1]["random"][0]["python"]
    assert torch.equal(states[0]["random"][0]["cpu"], states[1]["random"][0]["cpu"])


def test_the_newest_checkpoint_is_the_highest_number_of_its_own_trainer(tmp_path):
    for name in ("semantic.text.9.pt", "semantic.text.10.pt", "text.semantic.30.pt", "semantic.text.40.pt.bak"):
        (tmp_path / name).touch()
    found = checkpoints.checkpoints_in(tmp_path, "semantic.text")
    assert [path.name for path in found] == ["semantic.text.9.pt", "semantic.text.10.pt"]


def trained_for_a_step(trainers, trained, kind, folder):
    options = settings(folder, num_train_steps=1, num_warmup_steps=0)
    if kind == "SpeechSpeechPretrainer":
        trainer = trainers.SpeechSpeechPretrainer(trained, None, dataset=speech(), **options)
    else:
        more = {"freeze_encoder_layers_below": 1} if kind == "TextToSemanticTrainer" else {}
        trainer = getattr(trainers, kind)(trained, dataset=pairs(), **options, **more)
    trainer.train()
    return trainer


KINDS = ("SpeechSpeechPretrainer", "SemanticToTextTrainer", "TextToSemanticTrainer")


# the reference moves its schedule before its optimizer
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_go_from_the_reference_to_us_and_back(tmp_path, kind):
    import spear_fast

    theirs = trained_for_a_step(reference_trainers(), reference_model(), kind, tmp_path / "theirs")
    (path,) = (tmp_path / "theirs").glob("*.0.pt")
    ours = trained_for_a_step(spear_fast, model(seed=4), kind, tmp_path / "ours")
    ours.load(path)
    assert same_weights(theirs.model, ours.model)
    # of which the next is step 1
    assert int(ours.steps) == 1
    assert same_moments(theirs.optim, ours.optim)
    ours.num_train_steps = 3
    ours.train()
    (back,) = (tmp_path / "ours").glob("*.2.pt")
    theirs.load(str(back))
    assert same_weights(ours.model, theirs.model)
    assert same_moments(ours.optim, theirs.optim)
    assert int(theirs.steps) == int(ours.steps) == 3


def same_moments(one, other) -> bool:
    states = [optimizer.state_dict()["state"] for optimizer in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(moments[name], states[1][key][name]) for key, moments in states[0].items() for name in moments
    )


def test_a_checkpoint_of_other_layers_is_refused_unless_the_model_alone_is_wanted(tmp_path):
    options = settings(tmp_path / "a", num_train_steps=1)
    first = TextToSemanticTrainer(model(), dataset=pairs(), **options)
    first.train()
    other = TextToSemanticTrainer(
        model(seed=4), dataset=pairs(), train_encoder_layers=1, **settings(tmp_path / "b", num_train_steps=1)
    )
    path = tmp_path / "a" / "text.semantic.0.pt"
    with pytest.raises(ValueError, match="freeze the same layers and set the same wd, or pass restore_optimizer=False"):
        other.load(path)
    other.load(path, restore_optimizer=False)
    assert same_weights(first.model, other.model)
    assert int(other.steps) == 0


def test_a_checkpoint_is_read_without_running_what_is_in_it(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    path = tmp_path / "speech.speech.5.pt"
    path.write_bytes(pickle.dumps({"model": Bomb()}, protocol=2))
    torch.save({"model": Bomb()}, tmp_path / "speech.speech.6.pt")
    trainer = SpeechSpeechPretrainer(model(), dataset=speech(), **settings(tmp_path / "new"))
    for number in (5, 6):
        with pytest.raises(ValueError, match="checkpoint"):
            trainer.load(tmp_path / f"speech.speech.{number}.pt")
    with pytest.raises(FileNotFoundError, match=r"no file .*speech\.speech\.7\.pt"):
        trainer.load(tmp_path / "speech.speech.7.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    trainer = SpeechSpeechPretrainer(model(), dataset=speech(), **settings(tmp_path))
    path = tmp_path / "speech.speech.3.pt"
    trainer.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*No space left on device.*free or mend the disk"):
        trainer.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_numbers_drawn_go_on_where_they_were():
    from spear_fast.training.randomness import random_state, restore_random_state, same_randomness

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(())), random.gauss(0, 1), np.random.randn()

    draw()
    state = random_state(torch.device("cpu"))
    first = draw()
    inside = []
    for _ in range(2):
        with same_randomness(torch.device("cpu")):
            inside.append(draw())
    second = draw()
    restore_random_state(state, torch.device("cpu"))
    assert (draw(), draw()) == (first, second)
    assert inside[0] == inside[1]
