"""Checkpoints as others write them: wrapped, nested, averaged, with a configuration or numbers that do not fit."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import SMALL, build_pair, build_reference, fake_speech_tokenizer, load_reference, random_ids
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import spear_fast
from spear_fast import load_model

TO_TEXT = dict(source_type="speech", target_type="text")


def state_of(seed: int = 3, **kwargs) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in build_pair(seed, **kwargs)[1].state_dict().items()}


def assert_loads(path: Path, state: dict[str, Tensor], **overrides) -> None:
    loaded = load_model(path, **overrides).state_dict()
    assert {name for name in loaded if not name.startswith("wav2vec.")} == set(state)
    for name, value in state.items():
        assert torch.equal(loaded[name], value), name


def refused(load: Callable[[], object], said: str) -> None:
    """`load` must raise one sentence that says so."""
    with pytest.raises(ValueError, match=said) as caught:
        load()
    text = str(caught.value)
    assert "\n" not in text, text
    assert text.endswith("."), text
    assert len(text) < 500, text


class Wrapped(nn.Module):
    """What Lightning and the like save: the model under a name, something of its own beside it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, build_pair(3)[1])
        self.loss_weights = nn.Parameter(torch.ones(3))


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "model.", "ema_model.", "lightning.net.", "a.b.c."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_prefixes_of_wrappers_come_off(tmp_path: Path, prefix: str, suffix: str) -> None:
    state, path = state_of(), tmp_path / f"c{suffix}"
    renamed = {prefix + name: value for name, value in state.items()}
    torch.save({"model": renamed}, path) if suffix == ".pt" else save_file(renamed, path)
    assert_loads(path, state)
    model = build_pair(9)[1]
    if suffix == ".pt":
        model.load(path)
        assert torch.equal(model.start_token["text"], state["start_token.text"])


@pytest.mark.parametrize("path", ["{}", "state_dict", "model_state_dict", "net", "checkpoint.model"])
def test_paths_in_a_package(tmp_path: Path, path: str) -> None:
    state = state_of()
    package: dict = state
    for name in reversed(path.split(".") if path != "{}" else []):
        package = {name: package, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    torch.save(package, tmp_path / "c.pt")
    assert_loads(tmp_path / "c.pt", state)


def test_lightning_and_a_compiled_part(tmp_path: Path) -> None:
    state = state_of()
    module = Wrapped("net")
    module.net.source_transformer = torch.compile(module.net.source_transformer)
    assert any("source_transformer._orig_mod.layers" in name for name in module.state_dict())
    torch.save({"state_dict": module.state_dict(), "epoch": 3, "pytorch-lightning_version": "2.5"}, tmp_path / "c.pt")
    assert_loads(tmp_path / "c.pt", state)


def test_the_average_of_weights_counts(tmp_path: Path) -> None:
    online, average = state_of(3), state_of(4)
    package = {f"online_model.{name}": value for name, value in online.items()}
    package |= {f"ema_model.{name}": value for name, value in average.items()}
    torch.save(package | {"initted": torch.tensor(True), "step": torch.tensor(7)}, tmp_path / "ema.pt")
    assert_loads(tmp_path / "ema.pt", average)


def test_several_models_are_told_apart_or_refused(tmp_path: Path) -> None:
    one, other = state_of(3), state_of(4)
    twice = {f"model.{name}": value for name, value in one.items()}
    twice |= {f"train_wrapper.model.{name}": value for name, value in one.items()}
    torch.save(twice | {"steps": torch.tensor([3])}, tmp_path / "trainer.pt")
    assert_loads(tmp_path / "trainer.pt", one)
    teacher = {f"teacher.{name}": value for name, value in one.items()}
    student = {f"student.{name}": value for name, value in other.items()}
    torch.save({"model": teacher | student}, tmp_path / "two.pt")
    refused(lambda: load_model(tmp_path / "two.pt"), r"two\.pt.*student\..*teacher\.")
    torch.save({"teacher": one, "student": other}, tmp_path / "entries.pt")
    refused(lambda: load_model(tmp_path / "entries.pt"), r"entries\.pt.*student.*teacher")


def test_checkpoint_with_a_speech_tokenizer(tmp_path: Path) -> None:
    sizes = {**SMALL, "num_semantic_token_ids": None, "wav2vec": fake_speech_tokenizer(17)}
    torch.manual_seed(0)
    reference = load_reference().TextToSemantic(**sizes)
    assert any(name.startswith("wav2vec.") for name in reference.state_dict())
    path = tmp_path / "speech.text.0.pt"
    torch.save({"model": reference.state_dict()}, path)
    own = {name: value for name, value in reference.state_dict().items() if not name.startswith("wav2vec.")}
    # ids need no speech tokenizer
    model = load_model(path)
    assert_loads(path, own)
    source = random_ids(2, 6, 17)
    tokens = model.generate(source, **TO_TEXT, beam_search_decode=True, max_length=6)
    assert (
        tokens.tolist() == reference.eval().generate(source, **TO_TEXT, beam_search_decode=True, max_length=6).tolist()
    )
    refused(lambda: model.encode(torch.randn(1, 2000), source_type="speech"), "wav2vec=")
    build_pair(1)[1].load(path)
    # and with one it is loaded
    other = fake_speech_tokenizer(17)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    loaded = load_model(path, wav2vec=other)
    for name, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_own_weights_without_their_configuration(tmp_path: Path) -> None:
    model = build_pair(3)[1]
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "x.safetensors"
    path.write_bytes((tmp_path / "model/model.safetensors").read_bytes())
    assert_loads(path, model.state_dict())


@pytest.mark.parametrize("kept", ["semantic_token_emb", "token_emb.speech", "to_logits.speech"])
def test_one_of_tied_tensors_is_enough(tmp_path: Path, kept: str) -> None:
    state = state_of()
    tied = ("semantic_token_emb", "token_emb.speech", "to_logits.speech")
    dropped = {f"{name}.weight" for name in tied if name != kept}
    save_file({name: value for name, value in state.items() if name not in dropped}, tmp_path / "x.safetensors")
    assert_loads(tmp_path / "x.safetensors", state)


def test_tied_tensors_that_differ(tmp_path: Path) -> None:
    state = state_of()
    state["to_logits.text.weight"] = state["to_logits.text.weight"] + 1
    torch.save({"model": state}, tmp_path / "x.pt")
    refused(lambda: load_model(tmp_path / "x.pt"), r"to_logits\.text\.weight.*token_emb\.text\.weight")


HOSTILE = {
    "wide": dict(dim=8192, source_depth=48, target_depth=48),
    "wide alone": dict(dim=8192),
    "too wide for any memory": dict(dim=10**9),
    "beyond 64 bits": dict(dim=2**62),
    "beyond 64 bits by far": dict(num_semantic_token_ids=10**400),
    "heads beyond 64 bits": dict(heads=2**64),
    "beyond what a float holds": dict(ff_dropout=10**400),
    "feed-forward beyond 64 bits": dict(ff_mult=1e300),
    "pad beyond 64 bits": dict(text_pad_id=2**63),
    "deep": dict(source_depth=10**6),
    "deep decoder": dict(target_depth=10**9),
    "many heads": dict(heads=10**9),
    "large heads": dict(dim_head=10**10),
    "many words": dict(num_text_token_ids=10**11),
    "wide feed-forward": dict(ff_mult=1e9),
    "infinite feed-forward": dict(ff_mult=float("inf")),
    "a list": dict(heads=[8] * 1000),
    "no pad": dict(text_pad_id=None),
    "pad of text": dict(semantic_pad_id="-1"),
    "speech tokenizer": dict(wav2vec="facebook/hubert"),
    "tokenizer": dict(tokenizer_encode="bytes"),
    "half an exit": dict(target_early_exit_layer=1.5),
    "switch": dict(autoset_text_eos_id="yes"),
    "dropout of text": dict(attn_dropout="0.1"),
    "no temperature": dict(align_reg_logsumexp_pool_temp=0),
    "weight of NaN": dict(align_reg_loss_weight=float("nan")),
    "truth for a number": dict(source_depth=True),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_configuration_that_the_weights_do_not_bear_out(tmp_path: Path, kind: str) -> None:
    sizes = {**SMALL, "dim": 32}
    build_pair(3)[1].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **HOSTILE[kind]}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: load_model(tmp_path), r"config\.json|model\.safetensors")
    refused(lambda: load_model(tmp_path / "model.safetensors"), r"config\.json|model\.safetensors")
    refused(lambda: spear_fast.TextToSemantic.from_pretrained(tmp_path), r"config\.json|model\.safetensors")
    # in KiB: nothing of the claimed size has been made
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"dim": ' + "[" * 5000 + "]" * 5000 + "}", "\x00", "nul", '{"dim": 3']
)
def test_configuration_that_is_no_json(tmp_path: Path, text: str) -> None:
    build_pair(3)[1].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    for load in (load_model, spear_fast.TextToSemantic.from_pretrained):
        refused(lambda load=load: load(tmp_path), r"config\.json")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool, torch.complex64])
def test_weights_of_other_types(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in state_of().items()}
    torch.save({"model": state}, tmp_path / "x.pt")
    refused(lambda: load_model(tmp_path / "x.pt"), str(dtype).replace(".", r"\."))


def test_weights_that_only_a_larger_type_holds(tmp_path: Path) -> None:
    state = {name: value.double() for name, value in state_of().items()}
    state["start_token.text"][3] = 1e300
    torch.save({"model": state}, tmp_path / "x.pt")
    refused(lambda: load_model(tmp_path / "x.pt"), r"infinite.*start_token\.text")


@pytest.mark.parametrize("kind", ["stride 0", "meta", "sparse"])
def test_tensors_without_a_value_for_each_index(tmp_path: Path, kind: str) -> None:
    state = state_of()
    made = {
        "stride 0": lambda: torch.zeros(1).expand(2**40, 32),
        "meta": lambda: torch.empty(14, 32, device="meta"),
        "sparse": lambda: torch.eye(32)[:14].to_sparse(),
    }
    state["token_emb.text.weight"] = made[kind]()
    torch.save({"model": state}, tmp_path / "x.pt")
    refused(lambda: load_model(tmp_path / "x.pt"), r"token_emb\.text\.weight")


@pytest.mark.parametrize(
    "number",
    [np.int64(7), np.float32(0.5), np.float64(0.5), np.bool_(True), np.uint8(3), np.float16(2)],
    ids=lambda number: type(number).__name__,
)
def test_numbers_of_numpy_beside_the_weights(tmp_path: Path, number: object) -> None:
    state, path = state_of(), tmp_path / "x.pt"
    torch.save({"model": state, "steps": number}, path)
    assert_loads(path, state)
    assert build_pair(3)[1].load(path)["steps"] == number
    # and nothing stays allowed afterwards
    with pytest.raises(Exception, match="numpy"):
        torch.load(path, weights_only=True)


def test_arrays_of_numpy_are_still_refused(tmp_path: Path) -> None:
    torch.save({"model": state_of(), "noise": np.array([{}], dtype=object)}, tmp_path / "x.pt")
    refused(lambda: load_model(tmp_path / "x.pt"), "could run code")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_saved_weights_are_readable_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        build_pair(3)[1].save_pretrained(tmp_path)
    finally:
        os.umask(before)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode, name
    assert load_file(tmp_path / "model.safetensors")


def words(count: int, **ids: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)} | ids, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize("direction", ["left", "right"])
def test_padding_of_the_tokenizer_is_not_encoded(direction: str) -> None:
    tokenizer, model = words(13), build_pair(3)[1]
    tokenizer.enable_padding(pad_id=5, pad_token="w5", direction=direction, length=9)
    model.attach_tokenizer(tokenizer)
    assert model.to_ids(["w1 w2", "w3 w4 w5 w6"], "text", "x").tolist() == [[1, 2, 0, 0], [3, 4, 5, 6]]
    alone = model.encode(["w1 w2"], source_type="text")[0]
    beside = model.encode(["w1 w2", "w3 w4 w5 w6"], source_type="text")[0]
    torch.testing.assert_close(alone[0], beside[0, :3])
    # the caller's tokenizer is as it was
    assert tokenizer.padding["length"] == 9


def test_truncation_of_the_tokenizer_is_not_silent(tmp_path: Path) -> None:
    tokenizer, model = words(13), build_pair(3)[1]
    tokenizer.enable_truncation(3)
    model.attach_tokenizer(tokenizer)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.to_ids(["w1 w2 w3"], "text", "x").tolist() == [[1, 2, 3]]
    refused(lambda: again.to_ids(["w1", "w1 w2 w3 w4"], "text", "x"), "text 1 .* 3 .*truncation")
    again.tokenizer.no_truncation()
    assert again.to_ids(["w1 w2 w3 w4"], "text", "x").tolist() == [[1, 2, 3, 4]]


def test_vocabularies_of_other_sizes(tmp_path: Path) -> None:
    model = build_pair(3)[1]
    # the model's is often padded beyond the tokenizer's
    model.attach_tokenizer(words(9))
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).to_ids(["w8"], "text", "x").tolist() == [[8]]
    # few ids, but one beyond the model's
    refused(lambda: model.attach_tokenizer(words(5, far=13)), "below 13.*got 13")
    model.attach_tokenizer(words(5, far=12))


def test_reference_layout_is_what_it_was(tmp_path: Path) -> None:
    reference = build_reference(3)
    torch.save({"model": reference.state_dict(), "optim": {"lr": 1e-4}, "version": "0.4.8"}, tmp_path / "x.pt")
    package = build_pair(5)[1].load(tmp_path / "x.pt")
    assert list(package) == ["model", "optim", "version"]
    assert list(package["model"]) == list(reference.state_dict())


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff\xfe"))
    model = build_pair(3)[1]
    model.attach_tokenizer(words(13))
    model.save_pretrained(folder)
    assert load_model(folder).tokenizer.to_str() == model.tokenizer.to_str()
    for path in (folder, folder / "model.safetensors"):
        assert_loads(path, model.state_dict())
