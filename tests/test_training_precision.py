"""Training in bfloat16: by default where a GPU multiplies it, with float32 weights, and near what float32 learns."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from training_jobs import model, pairs, settings

from benchmarks import convergence, rows
from spear_fast import SemanticToTextTrainer, transformer
from spear_fast.speech import MelKMeansTokenizer
from spear_fast.training.accelerated import multiplies_bfloat16


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate takes one precision for the whole of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def test_a_gpu_multiplies_in_bfloat16_where_nothing_is_said(gpu, monkeypatch):
    whole = model()
    assert multiplies_bfloat16({}, whole)
    for arguments in ({"mixed_precision": "no"}, {"mixed_precision": "fp16"}, {"cpu": True}):
        assert not multiplies_bfloat16(arguments, whole)
    assert not multiplies_bfloat16({}, model().double())
    assert not multiplies_bfloat16({}, model().bfloat16())
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_MIXED_PRECISION", "no")
        assert not multiplies_bfloat16({}, whole)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not multiplies_bfloat16({}, whole)


def test_an_accelerator_that_is_there_has_chosen_already(gpu, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        Accelerator(cpu=True)
    assert not multiplies_bfloat16({}, model())


def test_a_cpu_does_not():
    assert not multiplies_bfloat16({}, model()) or torch.cuda.is_available()


@pytest.mark.parametrize(("precision", "residual"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_the_residual_stream_has_the_matmuls_type_and_weights_stay_float32(tmp_path, monkeypatch, precision, residual):
    seen, plain = set(), transformer._layer

    def layer(layer, weights, x, added, *rest):
        seen.update({x.dtype} | ({added.dtype} if added is not None else set()))
        return plain(layer, weights, x, added, *rest)

    monkeypatch.setattr(transformer, "_layer", layer)
    options = settings(tmp_path, accelerate_kwargs={"mixed_precision": precision, "cpu": True})
    trainer = SemanticToTextTrainer(model(target_depth=2), dataset=pairs(), **options)
    before = trainer.model.token_emb["text"].weight.clone()
    assert trainer.train_step()["loss"].dtype == torch.float32
    assert seen == {residual}
    assert all(each.dtype == torch.float32 for each in trainer.model.parameters())
    assert not torch.equal(trainer.model.token_emb["text"].weight, before)


def test_autocast_alone_keeps_the_residual_stream_whole():
    """As the reference has it."""
    ours = model().train()
    source, target = pairs(2).tensors
    with torch.autocast("cpu", torch.bfloat16):
        memory = ours.source_transformer(ours.token_emb["speech"](source))
    assert memory.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(source, target, source_type="speech", target_type="text", return_loss=True)
    loss.backward()
    assert loss.dtype == torch.float32


@pytest.fixture
def work(tmp_path):
    """What the recipe leaves, of a few rows."""
    (tmp_path / "tokenizer").mkdir()
    generator = torch.Generator().manual_seed(2)
    MelKMeansTokenizer(torch.randn(256, 26, generator=generator), sample_rate=22050).save(tmp_path / "tokenizer")
    with (tmp_path / "data.jsonl").open("w") as file:
        for number in range(80):
            tokens = torch.randint(256, (20 + number % 7,), generator=generator).tolist()
            spoken = {"id": f"{number}", "text": "a red lion", "voice": "en", "words_per_minute": 170, "pitch": 50}
            row = {"part": "training", **spoken, "stretch": 1.0, "seconds": 1.0, "tokens": tokens}
            file.write(json.dumps(row) + "\n")
    return tmp_path


def test_convergence_is_measured_beside_float32(work, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    status = convergence.main(["--work", str(work), "--steps", "3", "--device", "cpu", "--out", str(out)])
    whole, half, wide = rows.read(out)
    assert [whole["variant"], half["variant"], wide["variant"]] == list(convergence.VARIANTS)
    assert half["loss"] != wide["loss"] != whole["loss"]
    assert "percent_from" not in whole
    for row in (half, wide):
        assert row["reached"] == all(abs(each) <= convergence.WITHIN for each in row["percent_from"].values())
        assert row["percent_from"]["train"] == pytest.approx(
            100 * (row["loss"]["train"] / whole["loss"]["train"] - 1), abs=0.01
        )
    assert status == (0 if half["reached"] and wide["reached"] else 1)
    assert "from float32" in capsys.readouterr().out


def test_convergence_says_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"examples/espeak/recipe.py makes it first"):
        convergence.recipe(tmp_path)
