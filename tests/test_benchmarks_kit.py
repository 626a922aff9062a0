"""What is made for a GPU machine beforehand: Triton finds its kernels again there, and what does not fit is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import kit, proof
from benchmarks.machine import REPOSITORY
from spear_fast.ops.extension import fingerprint

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def compiled(cache: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks.triton_cache", "--set", "tiny", "--ops", "append_kv", "geglu"]
    return subprocess.run(
        [*command, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


@needs_triton
def test_kernels_compiled_without_a_gpu_are_found_again_where_they_are_carried_to(tmp_path):
    first = compiled(tmp_path / "here")
    assert first.returncode == 0, first.stderr
    kernels = len(list((tmp_path / "here").glob("*/*.cubin")))
    # forward and backward, in two dtypes
    assert kernels >= 6
    kit.slim(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert kit.relocate(tmp_path / "there") == kernels
    again = compiled(tmp_path / "there", "--nothing-new")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"0 compiled, {kernels} were there" in again.stdout
    # and what is not there is noticed
    shutil.rmtree(next((tmp_path / "there").glob("*/geglu_kernel.cubin")).parent)
    assert compiled(tmp_path / "there", "--nothing-new").returncode == 1


@pytest.fixture
def made(tmp_path):
    """A kit of an extension that is none, for this Python."""
    folder = tmp_path / "kit"
    (folder / "lib" / "spear_fast").mkdir(parents=True)
    (folder / "triton" / "KEY").mkdir(parents=True)
    (folder / "reference").mkdir()
    (folder / "lib" / "spear_fast" / "_C_avx2.so").write_bytes(b"nothing")
    (folder / "lib" / "spear_fast" / "_build.json").write_text("{}")
    group = {"child_paths": {"a.cubin": "/elsewhere/KEY/a.cubin"}}
    (folder / "triton" / "KEY" / "__grp__a.json").write_text(json.dumps(group))
    (folder / "kit.json").write_text(json.dumps({**kit.facts(sys.executable), "sources": "0"}))
    (tmp_path / "checkout" / "spear_fast").mkdir(parents=True)
    (tmp_path / "checkout" / "kernels").mkdir()
    return folder


@needs_triton
def test_a_kit_is_put_where_it_is_found(made, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setattr(kit, "_stale", lambda checkout: [])
    variables, wrong = kit.use(made, tmp_path / "checkout")
    assert wrong == []
    assert variables == {"TRITON_CACHE_DIR": str(made / "triton"), "PYTHONPATH": f"{made / 'reference'}:before"}
    assert (tmp_path / "checkout" / "spear_fast" / "_C_avx2.so").read_bytes() == b"nothing"
    assert (tmp_path / "checkout" / "spear_fast" / "kernels").is_dir()
    group = json.loads((made / "triton" / "KEY" / "__grp__a.json").read_text())
    assert group == {"child_paths": {"a.cubin": str(made / "triton" / "KEY" / "a.cubin")}}
    assert "export TRITON_CACHE_DIR=" in kit.exports(variables)


@needs_triton
def test_what_was_made_for_other_versions_is_not_taken(made, tmp_path):
    about = json.loads((made / "kit.json").read_text())
    (made / "kit.json").write_text(json.dumps({**about, "torch": "1.0", "python": "3.1"}))
    variables, (wrong,) = kit.use(made, tmp_path / "checkout")
    assert "torch 1.0, here" in wrong
    assert "python 3.1, here" in wrong
    # the reference is plain Python
    assert list(variables) == ["PYTHONPATH"]
    assert not (tmp_path / "checkout" / "spear_fast" / "_C_avx2.so").exists()


@needs_triton
def test_an_extension_of_other_sources_is_named(made, tmp_path):
    """Judged by the checkout itself: one whose package cannot even be imported says so too."""
    (tmp_path / "checkout" / "spear_fast" / "__init__.py").write_text("raise ImportError('no package')")
    _, (wrong,) = kit.use(made, tmp_path / "checkout")
    assert "no package" in wrong


def test_a_kit_of_other_sources_is_said_to_be_old(tmp_path):
    checkout, folder = tmp_path / "checkout", tmp_path / "kit"
    (checkout / "csrc").mkdir(parents=True)
    (checkout / "csrc" / "op.cpp").write_text("int one;\n")
    assert kit.outdated(folder, checkout) is None
    folder.mkdir()
    (folder / "kit.json").write_text(json.dumps({"sources": fingerprint(checkout / "csrc")}))
    assert kit.outdated(folder, checkout) is None
    (checkout / "csrc" / "op.cpp").write_text("int two;\n")
    said = kit.outdated(folder, checkout)
    assert "is of other sources than lie in csrc now; make gpu-kit again" in said
    record = {"item": "versions", "ok": True, "seconds": 0.1, "kit": said}
    assert said in proof.line(record)
    assert proof.line({**record, "kit": None}) == "versions: ok (0.1 s)"
