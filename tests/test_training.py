"""The trainers learn, train what they should, and do not have the reference's defects."""

from __future__ import annotations

import copy
import math
import random
import sys

import pytest
import torch
from reference import fake_speech_tokenizer
from training_jobs import (
    SIZES,
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

import spear_fast
from spear_fast import SemanticToTextTrainer, SpeechSpeechPretrainer, TextToSemanticTrainer


def test_a_tiny_set_is_learnt_with_its_ends_and_generate_works(tmp_path):
    trained = model()
    data = [(torch.arange(3 + row), torch.arange(1, 3 + row) + row) for row in range(4)]
    options = settings(tmp_path, num_train_steps=120, num_warmup_steps=5, lr=1e-2, save_results_every=1000)
    trainer = SemanticToTextTrainer(trained, dataset=data, **options)
    frozen = trained.source_transformer.layers[0][0].to_q[0].weight.clone()
    losses = []
    trainer.train(lambda logs: losses.append(logs["loss"]))
    assert len(losses) == 120
    assert losses[-1] < 0.02 * losses[0]
    for source, text in data:
        # the text and its end: the model stops by itself
        for options in (dict(beam_search_decode=True), dict(temperature=0.0)):
            generated = trainer.generate(source[None], max_length=20, **options)
            wanted = [*text.tolist(), trained.eos_id["text"]]
            assert generated[0].tolist()[: len(wanted)] == wanted
            assert not generated[0, len(wanted) :].any(), "pads after the end"
    assert torch.equal(frozen, trained.source_transformer.layers[0][0].to_q[0].weight)


def test_text_to_speech_changes_lower_layers_and_embeddings_alone(tmp_path):
    trained = model(target_early_exit_layer=1)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    options = settings(tmp_path, num_train_steps=40, num_warmup_steps=5, lr=1e-2, save_results_every=1000)
    losses = []
    trainer = TextToSemanticTrainer(trained, dataset=uneven(), **options)
    trainer.train(lambda logs: losses.append(logs["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    frozen = ("target_transformer.", "token_emb.speech", "start_token.speech", "source_transformer.layers.2.")
    assert not any(name.startswith(frozen) for name in changed)
    layers = {name.split(".")[2] for name in changed if name.startswith("source_transformer.layers.")}
    assert layers == {"0", "1"}
    assert {"token_emb.text.weight", "to_early_exit_semantic_logits.2.weight"} <= changed
    assert trainer.generate(torch.tensor([[1, 2]]), max_length=3).shape[0] == 1


def test_the_reference_s_trainers_cannot_generate(tmp_path):
    trainer = reference_trainers().SemanticToTextTrainer(reference_model(), dataset=pairs(), **settings(tmp_path))
    with pytest.raises(AttributeError):
        trainer.generate(torch.arange(5)[None], source_type="speech", target_type="text")


def trained_layers(trained) -> list[bool]:
    return [layer[0].to_q[0].weight.requires_grad for layer in trained.source_transformer.layers]


def test_lower_layers_and_embeddings_are_trained_and_upper_ones_frozen(tmp_path):
    theirs, ours = reference_model(), model()
    reference_trainers().TextToSemanticTrainer(theirs, dataset=pairs(), **settings(tmp_path / "theirs"))
    assert trained_layers(theirs) == [False, False, True], "the wrong way round"
    trainer = TextToSemanticTrainer(ours, dataset=pairs(), **settings(tmp_path / "ours"))
    assert trained_layers(ours) == [True, True, False]
    assert ours.token_emb["text"].weight.requires_grad
    assert not ours.token_emb["speech"].weight.requires_grad
    assert not any(parameter.requires_grad for parameter in ours.target_transformer.parameters())
    known = {id(p) for group in trainer.optim.param_groups for p in group["params"]}
    assert known == {id(p) for p in ours.parameters() if p.requires_grad}
    TextToSemanticTrainer(ours, dataset=pairs(), train_encoder_layers=1, **settings(tmp_path / "one"))
    assert trained_layers(ours) == [True, False, False]
    # asked for by its name, the reference's way
    TextToSemanticTrainer(ours, dataset=pairs(), freeze_encoder_layers_below=2, **settings(tmp_path / "below"))
    assert trained_layers(ours) == [False, False, True]


def test_several_trainers_live_in_one_process(tmp_path):
    trainers = reference_trainers()
    trainers.SpeechSpeechPretrainer(reference_model(), None, dataset=speech(), **settings(tmp_path / "1"))
    with pytest.raises(AssertionError, match="only one Trainer"):
        trainers.SpeechSpeechPretrainer(reference_model(), None, dataset=speech(), **settings(tmp_path / "2"))
    for name in ("a", "b"):
        SpeechSpeechPretrainer(model(), dataset=speech(), **settings(tmp_path / name))


def test_setting_the_mode_does_not_train(tmp_path):
    theirs = reference_trainers().SemanticToTextTrainer(reference_model(), dataset=pairs(), **settings(tmp_path / "1"))
    with pytest.raises(TypeError, match="not callable"):
        theirs.eval()
    assert int(theirs.steps) > 0, "eval() took a step"
    ours = SemanticToTextTrainer(model(), dataset=pairs(), **settings(tmp_path / "2"))
    assert ours.eval() is ours
    assert not ours.model.training
    assert int(ours.steps) == 0


def test_nothing_is_asked_about_a_folder_with_results(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    (tmp_path / "old.txt").write_text("x")
    data = speech()
    trainers = reference_trainers()
    monkeypatch.setattr(trainers.SpeechSpeechPretrainer, "is_main", property(lambda _: False))
    trainers.SpeechSpeechPretrainer(reference_model(), None, dataset=data, **settings(tmp_path))
    assert asked, "even a process that is not the main one asks"
    asked.clear()
    with pytest.raises(ValueError, match="is not empty; pass resume=True"):
        SpeechSpeechPretrainer(model(), dataset=data, **settings(tmp_path))
    SpeechSpeechPretrainer(model(), dataset=data, **settings(tmp_path, force_clear_prev_results=False))
    assert (tmp_path / "old.txt").exists()
    SpeechSpeechPretrainer(model(), dataset=data, **settings(tmp_path, resume=True))
    assert (tmp_path / "old.txt").exists()
    SpeechSpeechPretrainer(model(), dataset=data, **settings(tmp_path, force_clear_prev_results=True))
    assert list(tmp_path.iterdir()) == []
    assert not asked


@pytest.mark.parametrize("where", [".", "..", "~"])
def test_a_folder_that_holds_more_than_results_is_not_deleted(tmp_path, monkeypatch, where):
    (tmp_path / "home" / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home" / "work")
    (tmp_path / "home" / "work" / "thesis.txt").write_text("x")
    place = str(tmp_path / "home") if where == "~" else where
    with pytest.raises(ValueError, match="is not deleted; give another"):
        SpeechSpeechPretrainer(model(), dataset=speech(), **settings(place, force_clear_prev_results=True))
    assert (tmp_path / "home" / "work" / "thesis.txt").exists()


def test_the_rate_warms_up_and_falls_to_zero(tmp_path):
    options = settings(tmp_path, num_train_steps=10, num_warmup_steps=4, lr=1e-2, initial_lr=1e-3)
    trainer = SpeechSpeechPretrainer(model(), dataset=speech(), **options)
    assert [trainer.warmup(step) for step in (0, 2, 4, 9)] == pytest.approx([1e-3, 5.5e-3, 1e-2, 1e-2])
    rates = []
    trainer.train(lambda logs: rates.append(logs["lr"]))
    wanted = [1e-3 + (1e-2 - 1e-3) * step / 4 for step in range(4)]
    wanted += [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx(wanted)
    assert trainer.optim.param_groups[0]["lr"] == pytest.approx(0)


def test_speech_is_padded_with_a_pad_not_with_a_token(tmp_path):
    rows = Rows(torch.arange(1, length) for length in (5, 9, 4, 7))
    theirs = reference_trainers().SpeechSpeechPretrainer(
        reference_model(), None, dataset=rows, **settings(tmp_path / "1")
    )
    (batch,) = next(theirs.dl_iter)
    assert (batch == 0).any(), "0 is a token, and none of these rows has it"
    ours = SpeechSpeechPretrainer(model(), dataset=rows, **settings(tmp_path / "2"))
    (batch,) = next(ours.dl_iter)
    assert sorted(row[row != -1].tolist() for row in batch) == sorted(row.tolist() for row in rows)
    ours.train()
    assert int(ours.steps) == 6


def test_validation_leaves_training_as_it_is(tmp_path):
    class Drawing(Rows):
        """Rows that are shifted at random, as augmentation does."""

        def __getitem__(self, index):
            return (self.rows[index] + random.randrange(10)) % 10

    rows = Drawing(speech())

    def run(trainer_class, trained, folder, every):
        random.seed(0)
        torch.manual_seed(5)
        options = settings(folder, num_train_steps=4, save_results_every=every, valid_frac=0.5)
        trainer = trainer_class(trained, None, dataset=rows, **options)
        trainer.train()
        return trainer

    theirs = [
        run(reference_trainers().SpeechSpeechPretrainer, reference_model(), tmp_path / f"their{every}", every).model
        for every in (1, 100)
    ]
    assert not same_weights(*theirs), "how often one validates must not show in the weights"
    losses = []
    for every in (1, 100):
        trainer = run(
            SpeechSpeechPretrainer, model(ff_dropout=0.1, cond_drop_prob=0.5), tmp_path / f"our{every}", every
        )
        losses.append(trainer.model)
        # the same draws each time, no dropout, and every row with its source
        assert trainer.validate() == trainer.validate()
        assert trainer.model.cond_drop_prob == 0.5
        assert trainer.train_wrapper.training
    assert same_weights(*losses)


def test_validation_is_the_mean_over_its_batches(tmp_path):
    trainer = SemanticToTextTrainer(
        model(), dataset=pairs(10), **settings(tmp_path, valid_frac=0.6, num_valid_batches=8)
    )
    assert len(trainer.valid_ds) == 6
    trainer.model.eval()
    rows = torch.utils.data.default_collate([trainer.valid_ds[i] for i in range(6)])
    with torch.no_grad():
        alone = [trainer.train_wrapper(rows[0][i : i + 1], rows[1][i : i + 1])[0] for i in range(6)]
    batches = trainer.valid_dl.batch_sampler
    assert sorted(len(batch) for batch in batches) == [2, 4]
    wanted = sum(sum(alone[i] for i in batch) / len(batch) for batch in batches) / 2
    assert trainer.validate() == pytest.approx(float(wanted), rel=1e-5)
    assert "valid_loss" in trainer.train_step()


def test_raw_audio_of_different_lengths_gives_the_tokens_of_each_wave(tmp_path):
    audio = fake_speech_tokenizer(10)
    trained = model(wav2vec=audio)
    waves = [torch.randn(80 * tokens) for tokens in (3, 6, 3, 4)]
    trainer = SpeechSpeechPretrainer(trained, None, dataset=waves, **settings(tmp_path / "a", num_train_steps=1))
    ids = trainer.speech_ids(waves)
    assert ids.shape == (4, 6)
    for row, wave in zip(ids, waves, strict=True):
        assert row[row != -1].tolist() == audio(wave[None])[0].tolist()
    trainer.train()
    assert not any(parameter.requires_grad for parameter in audio.parameters())
    halved = SpeechSpeechPretrainer(model(), audio, dataset=waves, input_sample_hz=8000, **settings(tmp_path / "b"))
    assert halved.speech_ids(waves[:1]).shape == (1, 6), "at 8 kHz the same samples are twice the time"
    labelled = [(wave, torch.tensor([1, 2])) for wave in waves]
    TextToSemanticTrainer(trained, dataset=labelled, **settings(tmp_path / "c", num_train_steps=1)).train()
    with pytest.raises(ValueError, match="no wav2vec module"):
        SemanticToTextTrainer(model(), dataset=labelled, **settings(tmp_path / "d")).train()


def test_texts_may_be_strings(tmp_path):
    trained = model(tokenizer_encode=lambda texts: torch.tensor([[len(text), 1] for text in texts]))
    data = [(torch.arange(4), "one"), (torch.arange(6), "three")]
    for trainer_class in (SemanticToTextTrainer, TextToSemanticTrainer):
        options = settings(tmp_path / trainer_class.__name__, batch_size=2, num_train_steps=2)
        trainer_class(trained, dataset=data, **options).train()


def test_batches_by_token_budget(tmp_path):
    options = settings(tmp_path, batch_size=1, max_batch_tokens=30, num_train_steps=8)
    trainer = SemanticToTextTrainer(model(), dataset=uneven(40), **options)
    seen = [next(trainer.dl_iter) for _ in range(12)]
    assert max(len(source) for source, _ in seen) > 2
    for source, text in seen:
        assert len(source) == 1 or int((source != -1).sum() + (text != 0).sum()) <= 30
    trainer.train()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(dataset=None), "dataset must hold at least one row"),
        (dict(dataset=[]), "dataset must hold at least one row"),
        (dict(dataset=torch.zeros(4, 3).long(), valid_frac=0.5, batch_size=4), "must leave a batch of 4"),
        (dict(dataset=torch.zeros(4, 3).long(), valid_frac=0.1, batch_size=9), "must leave a batch of 9"),
        (dict(dataset=pairs()), "must give 1 tensors a row, got 2"),
        (dict(dataset=torch.zeros(4, 3, 2).long()), r"shape \[length\], got \[3, 2\]"),
        (dict(dataset=[[1, 2]] * 4), "must give 1 tensors a row, got 2"),
        (dict(dataset=[3] * 4), r"shape \[length\], got int"),
        (dict(dataset=speech(), lr=0.0), "lr must be above 0"),
        (dict(dataset=speech(), resume=True, force_clear_prev_results=True), "exclude each other"),
        (dict(dataset=speech(), max_batch_tokens=0), "max_tokens must be at least 1"),
    ],
)
def test_what_cannot_serve_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        SpeechSpeechPretrainer(model(), **settings(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_model_of_the_reference_is_refused_and_taken_once_accelerated(tmp_path):
    theirs = reference_model()
    with pytest.raises(TypeError, match=r"spear_fast.accelerate makes one"):
        SemanticToTextTrainer(theirs, dataset=pairs(), **settings(tmp_path))
    before = theirs.start_token["text"].clone()
    SemanticToTextTrainer(spear_fast.accelerate(theirs), dataset=pairs(), **settings(tmp_path)).train()
    assert not torch.equal(theirs.start_token["text"], before)


def test_a_loss_that_is_no_number_stops_training_before_the_weights_are_lost(tmp_path):
    trainer = SemanticToTextTrainer(model(), dataset=pairs(), **settings(tmp_path))
    with torch.no_grad():
        trainer.model.start_token["text"][0] = math.nan
    before = trainer.model.token_emb["text"].weight.clone()
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan; lower lr"):
        trainer.train()
    assert torch.equal(trainer.model.token_emb["text"].weight, before)


@pytest.mark.parametrize("clipped", [None, 0.5])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_between_two_lines_of_log_changes_no_weights(tmp_path, what, clipped):
    """The host has not read the loss yet; the step sees for itself."""
    trainer = SemanticToTextTrainer(model(), dataset=pairs(), max_grad_norm=clipped, **settings(tmp_path))
    bad = False
    trainer.model.start_token["text"].register_hook(lambda g: g * math.nan if bad and what == "gradient" else g)

    def loss_of(wrapper, batch, plain=trainer.loss_of):
        return plain(wrapper, batch) * (math.nan if bad and what == "loss" else 1)

    trainer.loss_of = loss_of
    changed = []
    for number in range(4):
        bad = number == 2
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train_step()
        changed.append(any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items()))
    assert changed == [True, True, False, True]
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    if what == "loss":
        with pytest.raises(FloatingPointError, match="the loss of step 2 is nan"):
            trainer.train()


TRAINERS = {
    "pretrain": (SpeechSpeechPretrainer, speech),
    "text to speech": (TextToSemanticTrainer, pairs),
    "speech to text": (SemanticToTextTrainer, pairs),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_what_is_left_out_of_the_reduction_is_what_gets_no_gradient(tmp_path, kind):
    """DistributedDataParallel would wait for the others, and keep what it leaves out from being alike."""
    trainer, dataset = TRAINERS[kind]
    trainer = trainer(model(), dataset=dataset(), **settings(tmp_path))
    wrapper, left_out = trainer.train_wrapper, set(trainer.train_wrapper._ddp_params_and_buffers_to_ignore)
    trainer.loss_of(wrapper, next(trainer.dl_iter)).backward()
    names = dict(wrapper.named_parameters(remove_duplicate=False))
    without = {name for name, each in names.items() if each.grad is None}
    # what is frozen is waited for by nobody, left out or not
    assert {name for name in without if names[name].requires_grad} <= left_out <= without
    assert left_out


def test_without_accelerate_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'spear_fast\[train\]'"):
        SpeechSpeechPretrainer(model(), dataset=speech(), **settings(tmp_path))


def test_importing_training_needs_neither_accelerate_nor_pyarrow():
    import subprocess

    code = (
        "import sys; sys.modules['accelerate'] = sys.modules['pyarrow'] = None; import spear_fast.training; "
        "spear_fast.MockDataset(2)[0]; print('fine')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "fine", ran.stderr


def test_signatures_begin_with_the_reference_s():
    import inspect

    theirs = reference_trainers()
    for name in ("SpeechSpeechPretrainer", "SemanticToTextTrainer", "TextToSemanticTrainer"):
        wanted = inspect.signature(getattr(theirs, name).__init__).parameters
        found = inspect.signature(getattr(spear_fast, name).__init__).parameters
        for key, parameter in wanted.items():
            assert found[key].kind == parameter.kind, key
            # two differ on purpose: no wav2vec is needed for tokens, and the paper's layers are frozen
            if key not in ("freeze_encoder_layers_below", "wav2vec"):
                assert found[key].default == parameter.default, key
        assert all(found[key].default is not inspect.Parameter.empty for key in found if key not in wanted)
    attributes = vars(theirs.SemanticToTextTrainer).keys() - {"__init__", "__module__", "__doc__"}
    assert all(hasattr(SemanticToTextTrainer, name) for name in attributes)


def test_attributes_of_the_reference_are_there(tmp_path):
    theirs = reference_trainers().SemanticToTextTrainer(reference_model(), dataset=pairs(), **settings(tmp_path / "1"))
    ours = SemanticToTextTrainer(model(**SIZES), dataset=pairs(), **settings(tmp_path / "2"))
    names = {name for name in vars(theirs) if not name.startswith("_")} | {name for name, _ in theirs.named_children()}
    assert not [name for name in names if not hasattr(ours, name)]
    for name in ("lr", "initial_lr", "batch_size", "grad_accum_every", "max_grad_norm", "log_every", "num_train_steps"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert int(ours.steps) == int(theirs.steps) == 0
