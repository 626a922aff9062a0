"""A model that cannot be used, and a disk that cannot be written: one sentence each, and nothing half on the disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess

import pytest
import torch
from labelling_jobs import random_rows, read_rows, shard_bytes, tiny_model, write_lines
from safetensors.torch import load_file, save_file

from spear_fast import cli

SHORT = ["--max-length", "6", "--rows-per-shard", "40"]


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokens(tmp_path):
    return write_lines(tmp_path / "tokens.jsonl", random_rows(120))


@pytest.fixture
def fails(tmp_path, tokens, capsys):
    """Labels with a model that cannot be used; returns the sentence."""

    def run(model, out="out", status=2):
        command = ["label", str(tokens), "--model", str(model), "--out", str(tmp_path / out), "--quiet", *SHORT]
        assert cli.main(command) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("spear-fast: error: ")
        assert not list((tmp_path / out).rglob("*.parquet"))
        return line

    return run


def test_a_model_that_is_not_there(tmp_path, fails):
    assert f"{tmp_path}/nowhere" in fails(tmp_path / "nowhere")


def test_a_folder_without_a_model(tmp_path, folder, fails):
    (folder / "config.json").unlink()
    assert "config.json" in fails(folder)


def test_a_configuration_that_is_no_json(folder, fails):
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in fails(folder)


def test_weights_of_other_sizes(folder, fails):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_text_token_ids": 21}))
    line = fails(folder)
    assert "[21, 32]" in line
    assert "[22, 32]" in line


def test_a_truncated_safetensors_file(folder, fails):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors is not a readable safetensors file" in fails(folder)


def test_a_truncated_checkpoint(tmp_path, fails):
    torch.save({"model": tiny_model().state_dict()}, tmp_path / "semantic.pt")
    content = (tmp_path / "semantic.pt").read_bytes()
    for size in (0, 50, len(content) // 2):
        (tmp_path / "semantic.pt").write_bytes(content[:size])
        assert "semantic.pt is not a" in fails(tmp_path / "semantic.pt")


class Code:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def test_a_pickle_that_would_run_code(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": tiny_model().state_dict(), "more": Code()}, tmp_path / "semantic.pt")
    assert "could run code" in fails(tmp_path / "semantic.pt")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, fails, value):
    state = load_file(folder / "model.safetensors")
    state["start_token.text"][3] = value
    save_file(state, folder / "model.safetensors")
    line = fails(folder)
    assert "NaN" in line
    assert "start_token.text" in line


def test_another_model_on_the_same_folder(tmp_path, folder, tokens, capsys):
    command = ["label", str(tokens), "--out", str(tmp_path / "out"), "--quiet", *SHORT]
    assert cli.main([*command, "--model", str(folder)]) == 0
    before = shard_bytes(tmp_path / "out")
    tiny_model(seed=5).save_pretrained(tmp_path / "other")
    assert cli.main([*command, "--model", str(tmp_path / "other")]) == 2
    assert "holds the labels of another job: model.weights was " in capsys.readouterr().err
    assert shard_bytes(tmp_path / "out") == before


@pytest.mark.parametrize("place", ["tokens.jsonl", "tokens.jsonl/out", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written(tmp_path, folder, fails, place):
    assert "cannot write to the output folder" in fails(folder, out=place)


def test_a_file_that_grows_past_its_limit_and_a_second_try(tmp_path, folder, tokens, fails):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        assert "File too large" in fails(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    command = ["label", str(tokens), "--model", str(folder), "--out", str(tmp_path / "out"), "--quiet", *SHORT]
    assert cli.main(command) == 0
    assert [row["id"] for row in read_rows(tmp_path / "out")] == [f"u{index}" for index in range(120)]


@pytest.mark.parametrize("call", [1, 2, 3, 4, 6, 9])
def test_a_disk_that_fills_up_at_any_write_loses_nothing(tmp_path, folder, tokens, capsys, monkeypatch, call):
    command = ["label", str(tokens), "--model", str(folder), "--out", str(tmp_path / "out"), "--quiet", *SHORT]
    sync, count = os.fsync, 0

    def full(descriptor):
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device; free or mend the disk and run the same command again" in line
    assert cli.main(command) == 0
    assert [row["id"] for row in read_rows(tmp_path / "out")] == [f"u{index}" for index in range(120)]


def test_a_full_file_system(tmp_path, folder, tokens, capsys):
    mount = shutil.which("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=16k", "none", disk]).returncode != 0:
        pytest.skip("only root may mount a small file system to fill")
    try:
        out = disk / "out"
        command = ["label", str(tokens), "--model", str(folder), "--out", str(out), "--quiet", *SHORT]
        assert cli.main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "No space left on device" in line
        subprocess.run([mount, "-o", "remount,size=4m", disk], check=True)
        assert cli.main(command) == 0
        assert [row["id"] for row in read_rows(out)] == [f"u{index}" for index in range(120)]
    finally:
        subprocess.run(["umount", disk], check=True)
