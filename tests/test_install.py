"""The package as it is installed: what it imports, what it can do without, and what a wheel holds."""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from spear_fast.ops import extension
from spear_fast.ops.cuda import sources

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# everything that is not a core dependency, and the tools that are nobody's dependency
OPTIONAL = (
    "accelerate beartype ctranslate2 cupy datasets duckdb einops jiwer kaldi_native_fbank matplotlib pandas "
    "pyarrow rotary_embedding_torch scipy sklearn soundfile soxr spear_tts_pytorch transformers triton"
).split()
# what is None among the modules can neither be imported nor found
BLOCK = "import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"


def run(code: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )


def test_import_needs_no_optional_package(tmp_path):
    """The model computes a loss and generates where only the core dependencies are there, and no extension."""
    code = BLOCK.format(blocked=tuple(OPTIONAL)) + (
        "from pathlib import Path\n"
        "from spear_fast.ops import extension\n"
        "extension._FOLDER = Path('absent')\n"
        "import torch, spear_fast\n"
        "from spear_fast import ops\n"
        "assert any('is not built' in (row.missing or '') for row in ops.available())\n"
        "model = spear_fast.TextToSemantic(dim=16, source_depth=1, target_depth=1, heads=2, dim_head=8,\n"
        "    num_text_token_ids=11, num_semantic_token_ids=7, autoset_text_eos_id=True)\n"
        "out = model.generate(torch.randint(1, 7, (2, 5)), source_type='speech', target_type='text', max_length=4,\n"
        "    beam_search_decode=True)\n"
        "print(out.shape[0])\n"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"


def test_import_is_light():
    """`import spear_fast` alone loads not even torch: the command line's --help answers at once."""
    done = run("import sys, spear_fast; print('torch' in sys.modules, spear_fast.__version__)")
    assert done.stdout.split() == ["False", PROJECT["version"]], done.stderr


@pytest.mark.parametrize("inside", [True, False], ids=["in the repository", "elsewhere"])
def test_kernels_resolve(inside, tmp_path):
    code = "import spear_fast.kernels; print(spear_fast.kernels.__name__)"
    done = run(code, ROOT if inside else tmp_path)
    assert done.stdout.strip() == "spear_fast.kernels", done.stderr


def built_wheel(folder: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    """Returns a wheel built from a copy of the sources without the extension, and what the build said."""
    wanted = ("spear_fast", "kernels", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")
    source = folder / "source"
    source.mkdir()
    for name in wanted:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build.json"))
        elif path.is_file():
            shutil.copy(path, source / name)
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(folder)!r}))"
    done = run(code, source, **environment)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl"))), done.stderr


def test_wheel_without_extension(tmp_path):
    """Built with no compiler, a wheel says so, and holds every module, the kernels and the typing marker."""
    wheel, said = built_wheel(tmp_path, SPEAR_FAST_BUILD="off")
    names = set(wheel.namelist())
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("spear_fast/**/*.py")}
    assert modules <= names
    assert {"spear_fast/kernels/__init__.py", "spear_fast/py.typed"} <= names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "csrc/")) or name.endswith(".so")]
    assert "leaving out the C++ extension" in said
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "spear-fast = spear_fast.cli:main" in wheel.read(entry).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_holds_the_device_sources(tmp_path):
    """All that CuPy's run-time build reads, found in an installed wheel without a checkout beside it."""
    wheel, _ = built_wheel(tmp_path, SPEAR_FAST_BUILD="off")
    shipped = {name for name in wheel.namelist() if name.startswith("spear_fast/csrc/")}
    assert not [name for name in shipped if name.endswith((".cpp", ".py")) or "launch" in name]
    wheel.extractall(tmp_path / "installed")
    code = (
        "import json, sys\n"
        f"sys.path.insert(0, {str(tmp_path / 'installed')!r})\n"
        "from spear_fast.ops.cuda import sources\n"
        "names = sorted(path.name for path in (sources.folder() / 'cuda').glob('*.cu'))\n"
        "print(json.dumps([str(sources.folder()), {name: sources.text(name) for name in names}]))\n"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    folder, texts = json.loads(done.stdout)
    assert Path(folder) == tmp_path / "installed" / "spear_fast" / "csrc"
    kernels = [path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu") if not path.name.startswith("launch")]
    assert texts == {name: sources.text(name) for name in kernels}
    # nothing that only the checkout has is still to be included
    assert {name for text in texts.values() for name in re.findall(r'#include "(.+)"', text)} == {"cuda_emulation.h"}


# compiles and links nothing, so that a build takes seconds; answers as the true one does
COMPILER = """#!/bin/sh
case " $* " in *" -c "* | *" -shared "*)
  while [ $# -gt 1 ]; do [ "$1" = -o ] && made=$2; shift; done
  exec touch "$made";;
esac
exec {compiler} "$@"
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other machines build for themselves")
@pytest.mark.parametrize(("march", "variants"), [(None, ["avx512", "avx2"]), ("x86-64-v2", ["x86-64-v2"])])
def test_wheel_holds_all_variants(march, variants, tmp_path):
    """One wheel for all x86-64 machines, and, asked for, one for some alone; the note says what is there."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(compiler=shutil.which("c++")))
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "SPEAR_FAST_BUILD": "require", "PATH": os.environ["PATH"]}
    wheel, _ = built_wheel(tmp_path, **environment, **({} if march is None else {"SPEAR_FAST_MARCH": march}))
    libraries = {name for name in wheel.namelist() if name.endswith(".so")}
    assert libraries == {f"spear_fast/_C_{name}.so" for name in variants}
    built = json.loads(wheel.read("spear_fast/_build.json"))
    assert list(built["variants"]) == variants
    assert built["sources"] == extension.fingerprint(ROOT / "csrc")
    assert "avx512vnni" not in built["variants"][variants[0]]["features"]


def test_what_was_compiled_is_known_by_what_it_is_made_of(tmp_path, monkeypatch):
    """No time decides: an object is used again where source, headers and command are the same."""
    monkeypatch.setattr("setuptools.setup", lambda **settings: None)
    monkeypatch.setenv("SPEAR_FAST_BUILD", "off")
    build = runpy.run_path(str(ROOT / "setup.py"))
    source, command = tmp_path / "one.cpp", [shutil.which("c++") or "c++", "-O0"]
    source.write_text("int one() { return 1; }\n")

    def compiled(*flags: str) -> Path:
        return build["compiled"]([build["Job"](source, [*command, *flags])], tmp_path / "objects")[0]

    first = compiled()
    made = first.stat().st_mtime_ns
    os.utime(source)
    assert compiled() == first
    assert first.stat().st_mtime_ns == made
    assert compiled("-O1") != first
    source.write_text("int one() { return 2; }\n")
    os.utime(source, (0, 0))
    assert compiled() != first


def test_build_without_a_compiler_goes_on_and_says_so(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    _, said = built_wheel(tmp_path, PATH=str(tools), CXX="no-such-compiler")
    assert "installing without the C++ extension (no C++ compiler found" in said


def test_build_stops_where_the_extension_is_required(tmp_path):
    done = run(
        "import runpy, sys; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')",
        PATH=str(tmp_path),
        CXX="no-such-compiler",
        SPEAR_FAST_BUILD="require",
    )
    assert done.returncode == 1
    assert "the C++ extension cannot be built: no C++ compiler found" in done.stderr


def test_make_help_lists_the_commands():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    listed = [line.split()[1] for line in done.stdout.splitlines()]
    assert {"demo", "test", "lint", "recipe", "bench", "clean"} <= set(listed)


def test_make_asks_for_a_newer_python(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\n[ \"$1\" = -V ] && echo 'Python 3.9.1' && exit 0\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "--no-print-directory", "tests", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert f"spear_fast needs Python 3.11 or newer and {old} is Python 3.9.1" in done.stderr
