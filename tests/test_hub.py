"""Model folders and checkpoint files: what is saved comes back; what is damaged or dangerous is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from reference import SMALL, build_pair, build_reference, fake_speech_tokenizer, random_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import spear_fast
from spear_fast.checkpoints.load import load_model

RARE = dict(
    dim=20,
    source_depth=1,
    target_depth=3,
    dim_head=6,
    heads=6,
    target_kv_heads=3,
    ff_mult=3,
    attn_dropout=0.1,
    ff_dropout=0.2,
    semantic_pad_id=-7,
    text_pad_id=2,
    autoset_semantic_eos_id=False,
    attn_flash=True,
    cond_drop_prob=0.25,
    target_early_exit_layer=2,
    detach_early_exit_embed=True,
    align_reg_loss_weight=0.3,
    align_reg_use_logsumexp_pool=False,
    align_reg_logsumexp_pool_temp=0.4,
)


def characters(count: int) -> Tokenizer:
    """A tokenizer with `count` ids, one per letter, of which 0 is the unknown one."""
    vocabulary = {"<unk>": 0, **{chr(96 + index): index for index in range(1, count)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return tokenizer


def ours(seed: int = 0, **kwargs):
    return build_pair(seed, **kwargs)[1]


def assert_equal_states(one, two) -> None:
    assert list(one.state_dict()) == list(two.state_dict())
    for name, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], value), name


def one_sentence(error: BaseException) -> str:
    """The message, which must be a single sentence that ends in a full stop."""
    text = str(error)
    assert "\n" not in text, text
    assert text.endswith("."), text
    assert len(text) < 500, text
    return text


@pytest.mark.parametrize("sizes", [{}, RARE, dict(target_kv_heads=1)], ids=["small", "rare", "one kv head"])
def test_round_trip(tmp_path: Path, sizes: dict) -> None:
    model = ours(**sizes)
    model.save_pretrained(tmp_path / "model")
    again = spear_fast.TextToSemantic.from_pretrained(tmp_path / "model")
    assert_equal_states(model, again)
    assert again.config == model.config
    assert not again.training
    for name in (
        "dim",
        "pad_id",
        "eos_id",
        "autoset_eos_id",
        "cond_drop_prob",
        "early_exit_layer",
        "align_reg_loss_weight",
    ):
        assert getattr(again, name) == getattr(model, name), name
    source, target = random_ids(2, 6, 17), random_ids(2, 5, 13)
    kwargs = dict(source_type="speech", target_type="text", cond_drop_prob=0.0)
    assert torch.equal(again(source, target, **kwargs), model(source, target, **kwargs))
    kwargs = dict(source_type="speech", target_type="text", beam_search_decode=True, max_length=6)
    assert again.generate(source, **kwargs).tolist() == model.generate(source, **kwargs).tolist()
    # a second save of what was read is the same bytes
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "model/config.json").read_text()


def test_what_is_in_the_folder(tmp_path: Path) -> None:
    model = ours(**RARE)
    model.attach_tokenizer(characters(13))
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} == {
        path.name for path in tmp_path.iterdir()
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in RARE} == RARE
    assert config["num_text_token_ids"] == 13
    assert config["num_semantic_token_ids"] == 17
    assert not any(key in config for key in ("wav2vec", "tokenizer_encode"))
    # any reader of the format finds plain tensors and their names
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert (file.metadata() or {}).get("format") == "pt"
    assert names < set(model.state_dict())


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    model = ours()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    shape = model.token_emb["text"].weight.shape
    assert sum(tensor.shape == shape for tensor in saved.values()) == 1
    unique = {
        id(tensor): tensor.numel() * tensor.element_size() for tensor in model.state_dict(keep_vars=True).values()
    }
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved.values()) == sum(unique.values())
    again = spear_fast.TextToSemantic.from_pretrained(tmp_path)
    assert again.to_logits["text"].weight is again.token_emb["text"].weight
    assert again.to_logits["speech"].weight is again.token_emb["speech"].weight is again.semantic_token_emb.weight
    assert again.source_transformer.layers[0][0].rotary_emb is again.source_transformer.layers[1][0].rotary_emb


def test_text_tokenizer_comes_along(tmp_path: Path) -> None:
    model = ours()
    model.attach_tokenizer(characters(13))
    model.save_pretrained(tmp_path)
    again = spear_fast.TextToSemantic.from_pretrained(tmp_path)
    assert again.tokenizer.to_str() == model.tokenizer.to_str()
    assert again.tokenizer_encode(["abc", "l"]).tolist() == [[1, 2, 3], [12, 0, 0]]
    _, mask, ids = again.encode(["abc", "l"], source_type="text")
    assert ids.tolist() == [[1, 2, 3, 13], [12, 13, 0, 0]]
    assert mask.sum().item() == 6
    with pytest.raises(ValueError, match=r"13.*13") as caught:
        model.attach_tokenizer(characters(14))
    one_sentence(caught.value)


def test_speech_tokenizer_comes_along(tmp_path: Path) -> None:
    pytest.importorskip("kaldi_native_fbank", reason="reading audio needs the extra 'label'")
    from spear_fast.speech import MelKMeansTokenizer

    centres = torch.randn(17, 32, generator=torch.Generator().manual_seed(0))
    model = spear_fast.TextToSemantic(**SMALL, wav2vec=MelKMeansTokenizer(centres, num_ceps=16))
    model.save_pretrained(tmp_path)
    assert {"speech_tokenizer.json", "speech_tokenizer.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    again = spear_fast.TextToSemantic.from_pretrained(tmp_path)
    assert again.wav2vec.fingerprint() == model.wav2vec.fingerprint()
    wave = torch.randn(1, 8000, generator=torch.Generator().manual_seed(1)) * 0.1
    kwargs = dict(source_type="speech", target_type="text", max_length=5, temperature=0.0, return_source=True)
    assert [value.tolist() for value in again.generate(wave, **kwargs)] == [
        value.tolist() for value in model.eval().generate(wave, **kwargs)
    ]
    other = fake_speech_tokenizer(17)
    assert spear_fast.TextToSemantic.from_pretrained(tmp_path, wav2vec=other).wav2vec is other


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_keep_their_values(tmp_path: Path, dtype: torch.dtype) -> None:
    model = ours().to(dtype)
    model.save_pretrained(tmp_path)
    again = spear_fast.TextToSemantic.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            again.state_dict()[name].double(),
            value.double(),
            rtol=1e-7,
            atol=0,
            msg=lambda text, n=name: f"{n}: {text}",
        )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_reference_checkpoint_file(tmp_path: Path, suffix: str) -> None:
    reference = build_reference(3, target_kv_heads=2)
    path = tmp_path / f"speech.to.text.7{suffix}"
    if suffix == ".pt":
        torch.save({"model": reference.state_dict(), "optim": {"lr": 1e-4}, "version": "0.4.8"}, path)
    else:
        save_file({name: value.clone() for name, value in reference.state_dict().items()}, path)
    for model in (load_model(path), load_model(str(path), cond_drop_prob=0.1)):
        assert_equal_states(reference, model)
        assert model.target_transformer.layers[0][0].kv_heads == 2
        assert not model.training
    assert model.cond_drop_prob == 0.1
    source = random_ids(2, 6, 17)
    kwargs = dict(source_type="speech", target_type="text", beam_search_decode=True, max_length=6)
    assert load_model(path).generate(source, **kwargs).tolist() == reference.generate(source, **kwargs).tolist()


def test_reference_checkpoint_with_its_configuration_beside_it(tmp_path: Path) -> None:
    sizes = {**SMALL, **RARE}
    reference = build_reference(3, **RARE)
    torch.save({"model": reference.state_dict()}, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    model = load_model(tmp_path / "model.pt")
    assert_equal_states(reference, model)
    assert model.pad_id == {"speech": -7, "text": 2}
    assert model.early_exit_layer == 2


@pytest.mark.parametrize(
    "sizes",
    [{}, dict(ff_mult=3), dict(ff_mult=2.7, dim=24), dict(heads=2, dim_head=12), dict(source_depth=3, target_depth=1)],
    ids=str,
)
def test_sizes_are_read_off_a_reference_checkpoint(tmp_path: Path, sizes: dict) -> None:
    if isinstance(sizes.get("ff_mult"), float):
        state = ours(3, **sizes).state_dict()
    else:
        state = build_reference(3, **sizes).state_dict()
    torch.save({"model": state}, tmp_path / "model.pt")
    assert list(load_model(tmp_path / "model.pt").state_dict()) == list(state)


def test_folder_loads_by_load_model_too(tmp_path: Path) -> None:
    model = ours(**RARE)
    model.save_pretrained(tmp_path)
    assert_equal_states(model, load_model(tmp_path))


class Bomb:
    """Runs code when it is unpickled carelessly: creates the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("way", ["torch", "legacy torch", "pickle"])
def test_pickle_that_would_run_code(tmp_path: Path, way: str) -> None:
    fuse, path = tmp_path / "exploded", tmp_path / "model.pt"
    package = {"model": build_reference().state_dict(), "extra": Bomb(fuse)}
    if way == "pickle":
        path.write_bytes(pickle.dumps(package))
    else:
        torch.save(package, path, _use_new_zipfile_serialization=way == "torch")
    for load in (load_model, ours().load):
        with pytest.raises(ValueError, match=r"model\.pt") as caught:
            load(path)
        one_sentence(caught.value)
        assert not fuse.exists(), "the file's code has run"
    # the bomb is live: read carelessly it goes off
    with open(path, "rb") as file:
        torch.load(file, weights_only=False) if way != "pickle" else pickle.load(file)
    assert fuse.exists()


def test_pickle_inside_a_model_folder_is_not_looked_at(tmp_path: Path) -> None:
    ours().save_pretrained(tmp_path)
    torch.save({"model": Bomb(tmp_path / "exploded")}, tmp_path / "pytorch_model.bin")
    load_model(tmp_path)
    assert not (tmp_path / "exploded").exists()


def state_of_ours() -> dict:
    return {name: value.clone() for name, value in ours().state_dict().items()}


def damaged(kind: str) -> dict:
    state = state_of_ours()
    if kind == "wrong size":
        state["target_transformer.layers.1.2.4.bias"] = torch.zeros(33)
    elif kind == "missing tensor":
        del state["source_transformer.final_norm.gamma"]
    elif kind == "surplus tensor":
        state["source_transformer.layers.2.0.norm.gamma"] = torch.zeros(32)
    elif kind == "NaN":
        state["target_transformer.layers.0.0.to_out.weight"][3, 4] = torch.nan
    elif kind == "infinity":
        state["start_token.text"][0] = -torch.inf
    return state


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("wrong size", r"layers\.1\.2\.4\.bias.*33.*32"),
        ("missing tensor", r"source_transformer\.final_norm\.gamma"),
        ("surplus tensor", r"source_transformer\.layers\.2\.0\.norm\.gamma"),
        ("NaN", r"NaN.*layers\.0\.0\.to_out\.weight"),
        ("infinity", r"start_token\.text"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", "folder"])
def test_weights_that_do_not_fit(tmp_path: Path, kind: str, said: str, suffix: str) -> None:
    state = damaged(kind)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    path = tmp_path / ("model.safetensors" if suffix != ".pt" else "model.pt")
    if suffix == ".pt":
        torch.save({"model": state}, path)
    else:
        save_file({name: value.clone() for name, value in state.items()}, path)
    with pytest.raises(ValueError, match=said) as caught:
        load_model(tmp_path if suffix == "folder" else path)
    assert path.name in one_sentence(caught.value)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.97])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_truncated_file(tmp_path: Path, kept: float, name: str) -> None:
    state = state_of_ours()
    path = tmp_path / name
    torch.save({"model": state}, path) if name.endswith(".pt") else save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=name) as caught:
        load_model(path)
    one_sentence(caught.value)


@pytest.mark.parametrize(
    "package",
    [
        torch.zeros(3),
        [1, 2],
        {"weights": 1},
        {"model": torch.zeros(3)},
        {"model": {}},
        {"model": {"a": 1}},
        {},
        {"model": {"start_token.text": "no"}},
    ],
    ids=str,
)
def test_checkpoint_that_is_something_else(tmp_path: Path, package) -> None:
    torch.save(package, tmp_path / "model.pt")
    for load in (load_model, ours().load):
        with pytest.raises(ValueError, match=r"model\.pt") as caught:
            load(tmp_path / "model.pt")
        one_sentence(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "config.json"),
        ("{}", "dim"),
        (json.dumps({**SMALL, "dim": "many"}), "dim"),
        (json.dumps({**SMALL, "dim": -4}), "dim"),
        (json.dumps({**SMALL, "heads": 3, "target_kv_heads": 2}), "heads"),
        (json.dumps({**SMALL, "dim": 64}), "size"),
        (json.dumps({key: value for key, value in SMALL.items() if key != "num_text_token_ids"}), "num_text_token_ids"),
        (json.dumps({key: value for key, value in SMALL.items() if key != "source_depth"}), "source_depth"),
    ],
)
def test_bad_configuration(tmp_path: Path, text: str, said: str) -> None:
    ours().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        load_model(tmp_path)
    one_sentence(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere") as caught:
        load_model(tmp_path / "nowhere")
    one_sentence(caught.value)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path)
    ours().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        ours().load(tmp_path / "none.pt")


def test_damaged_tokenizer(tmp_path: Path) -> None:
    model = ours()
    model.attach_tokenizer(characters(13))
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json") as caught:
        load_model(tmp_path)
    one_sentence(caught.value)
    characters(17).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="16") as caught:
        load_model(tmp_path)
    one_sentence(caught.value)


def test_load_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = ours()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    state["target_transformer.final_norm.gamma"] = torch.zeros(99)
    torch.save({"model": state}, tmp_path / "model.pt")
    with pytest.raises((ValueError, RuntimeError)):
        model.load(tmp_path / "model.pt")
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
