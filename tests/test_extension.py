"""The compiled extension: which variant a machine loads, what is refused and how, and that each variant is right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spear_fast.ops import extension

ROOT = Path(__file__).parent.parent
REBUILD = "reinstall spear-fast (pip install --no-build-isolation -e .)"
needs_extension = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

V3 = {"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
VARIANTS = {"avx512": {"features": sorted(V4)}, "avx2": {"features": sorted(V3)}}


@pytest.mark.parametrize(
    ("features", "chosen"),
    [
        (V4 | {"sse2", "amx_tile"}, "avx512"),
        (V4 - {"avx512dq"}, "avx2"),
        (V3, "avx2"),
        (V3 - {"fma"}, None),
        ({"sse2"}, None),
        (None, "avx2"),
    ],
    ids=["newer", "part of AVX-512", "AVX2", "part of AVX2", "plain x86-64", "unknown"],
)
def test_the_fastest_variant_that_the_cpu_runs_is_chosen(features, chosen):
    assert extension._choose(VARIANTS, features, None) == chosen


def test_a_variant_can_be_forced():
    assert extension._choose(VARIANTS, V4, "avx2") == "avx2"
    assert extension._choose({}, V4, "avx2") is None
    with pytest.raises(ValueError, match=r"^SPEAR_FAST_CPU must be one of avx512, avx2, got 'sse'; leave it out"):
        extension._choose(VARIANTS, V4, "sse")
    with pytest.raises(ValueError, match=r"got 'avx512', which needs avx512bw, avx512cd, .*; leave it out"):
        extension._choose(VARIANTS, V3, "avx512")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Makes the extension be looked for in a folder of its own, which is returned."""
    package = tmp_path / "spear_fast"
    package.mkdir()
    caches = extension._built, extension.facts
    monkeypatch.setattr(extension, "_FOLDER", package)
    for cached in caches:
        cached.cache_clear()
    yield package
    for cached in caches:
        cached.cache_clear()


def reason_of(folder: Path, **changed: object) -> str:
    """Returns why the extension of this folder cannot be used, whose note is the true one's but for what is changed."""
    built = json.loads((ROOT / "spear_fast" / "_build.json").read_text())
    (folder / "_build.json").write_text(json.dumps({**built, **changed}))
    reason = extension.missing.__wrapped__()
    assert reason is not None
    return reason


@needs_extension
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"torch": "1.0"}, "was built for torch 1.0 and this is"),
        ({"machine": "pdp11"}, "was built for pdp11 and this is"),
        (
            {"variants": {"avx9000": {"features": ["avx9000"]}}},
            "was built for a CPU with avx9000, which this one lacks",
        ),
    ],
)
def test_an_extension_for_another_machine_is_refused_politely(folder, changed, said):
    reason = reason_of(folder, **changed)
    assert said in reason
    assert reason.endswith(REBUILD)


def test_an_extension_without_its_note_is_refused_politely(folder):
    assert "is not built" in extension.missing.__wrapped__()
    (folder / "_C_avx2.so").touch()
    reason = extension.missing.__wrapped__()
    assert "without a note of what it was built for" in reason
    assert reason.endswith(REBUILD)


@needs_extension
def test_an_extension_of_other_sources_must_be_rebuilt(folder):
    """Not loaded: what it defines need not be what Python calls."""
    csrc = folder.parent / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    assert "other sources" not in reason_of(folder)
    with (csrc / "ops.h").open("a") as header:
        header.write("// changed\n")
    assert "was built from other sources than lie in csrc now; reinstall" in reason_of(folder)


@needs_extension
def test_an_extension_that_does_not_load_is_refused_politely(folder):
    assert "is not built" in reason_of(folder)
    for name in json.loads((folder / "_build.json").read_text())["variants"]:
        (folder / f"_C_{name}.so").write_bytes(b"not a library")
    assert "does not load" in reason_of(folder)


VALUES = """
import sys
import torch
import torch.nn.functional as F
from ops_examples import EXAMPLES
from ops_matrix import assert_right
from tolerance import assert_within
from spear_fast.ops import extension, providers

torch.manual_seed(0)
assert extension.missing() is None, extension.missing()
ops = "attention attention_backward cross_entropy decode_cross_attention decode_self_attention geglu rms_norm rotary"
for op in ops.split():
    assert_right(op, "cpu", providers.get(op, "reference").function, EXAMPLES[op](), factor=3.0)
x, weight, bias = torch.randn(9, 67), torch.randn(35, 67), torch.randn(35)
exact, plain = F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias)
product = torch.classes.spear_fast.PackedLinear(weight, bias, "float32")
assert_within(product.forward(x), exact, plain)
unit, units = weight.abs().amax(1, keepdim=True) / 127, x.abs().amax(1, keepdim=True) / 127
# halves of a factor round up
rounded = F.linear((x / units + 0.5).floor() * units, (weight / unit).round() * unit)
found = torch.classes.spear_fast.PackedLinear(weight, bias, "int8").forward(x)
torch.testing.assert_close(found, rounded + bias, rtol=1e-3, atol=1e-3)
print(extension.facts()["variant"])
"""


def runnable() -> list[str]:
    """Returns the variants that were built and that this machine runs."""
    features = extension._cpu_features()
    built = extension.facts().get("variants", {})
    return [name for name, variant in built.items() if not extension._lacking(variant, features)]


@needs_extension
@pytest.mark.parametrize("variant", runnable())
def test_each_variant_is_right(variant):
    environment = {**os.environ, "SPEAR_FAST_CPU": variant, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", VALUES], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == variant


@needs_extension
def test_info_shows_the_variants():
    from spear_fast.environment import describe

    build = describe()["build"]
    facts = extension.facts()
    assert all(name in build["extension's variants"] for name in facts["variants"])
    assert f"{facts['variant']} runs here" in build["extension's variants"]
