"""docs/adding-an-op.md, followed: its files are written beside the package, and the tests it names run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = dict(
    re.findall(
        r"```(?:python|cpp)\n(?:#|//) ([^\n]+)\n(.*?)```", (ROOT / "docs/adding-an-op.md").read_text(), re.DOTALL
    )
)
TESTS = "test_ops_table.py", "test_ops_hostile.py"
# what the page says to write into files that are there
FOLLOW = """
import importlib, sys
import pytest, torch
import spear_fast.kernels, spear_fast.ops, spear_fast.ops.reference

folder, root = sys.argv[1:3]
sys.path.insert(0, root + "/tests")
for package, place in ((spear_fast.ops, "spear_fast/ops"), (spear_fast.ops.reference, "spear_fast/ops/reference"),
                       (spear_fast.kernels, "kernels")):
    package.__path__.append(folder + "/" + place)
from spear_fast.kernels import tiles
exec(TILES, vars(tiles))
exec(EXPORT, vars(spear_fast.ops))
spear_fast.ops.__all__.append("softcap")
import ops_examples
exec(EXAMPLES, vars(ops_examples))
raise SystemExit(pytest.main(sys.argv[3:]))
"""


@pytest.fixture
def followed(tmp_path):
    """Returns a function that runs pytest where the page has been followed, and the folder of it all."""
    for name, block in BLOCKS.items():
        if not name.startswith("in "):
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)
    (tmp_path / "tree/tests/conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    named = {
        "TILES": BLOCKS["in kernels/tiles.py, as rows of TABLE"],
        "EXPORT": BLOCKS['in spear_fast/ops/__init__.py, and "softcap" in __all__'],
        "EXAMPLES": BLOCKS["in tests/ops_examples.py, as entries of EXAMPLES"],
    }
    text = "".join(f"{name} = {block!r}\n" for name, block in named.items()) + FOLLOW
    (tmp_path / "follow.py").write_text(text)

    def run(*arguments, **environment):
        command = [
            sys.executable,
            tmp_path / "follow.py",
            tmp_path / "tree",
            ROOT,
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
        ]
        done = subprocess.run(
            [*map(str, command), *map(str, arguments)],
            cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        return done.stdout

    return run, tmp_path


def test_the_page_has_all_files():
    assert [name for name in BLOCKS if not name.startswith("in ")] == [
        "spear_fast/ops/reference/softcap.py",
        "spear_fast/ops/softcap.py",
        "kernels/softcap.py",
        "csrc/cpu/softcap.cpp",
        "tests/test_ops_softcap.py",
    ]


def test_the_tests_of_all_ops_take_it(followed):
    run, folder = followed
    said = run(*(ROOT / "tests" / name for name in TESTS), folder / "tree/tests/test_ops_softcap.py", "-k", "softcap")
    passed = int(re.search(r"(\d+) passed", said)[1])
    assert passed >= 60, said
    assert "failed" not in said


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernel(followed):
    """Interpreted, against the definition; and compiled by the audit without a fault."""
    run, folder = followed
    said = run(folder / "tree/tests/test_ops_softcap.py", "-k", "triton", TRITON_INTERPRET="1")
    assert int(re.search(r"(\d+) passed", said)[1]) >= 18, said
    code = (folder / "follow.py").read_text().replace(
        "raise SystemExit(pytest.main(sys.argv[3:]))",
        "from spear_fast.kernels.audit.__main__ import main\n"
        "raise SystemExit(main(['--only', 'softcap', '--jobs', '1', '--cache', folder + '/cache']))",
    )  # fmt: skip
    (folder / "audit.py").write_text(code)
    environment = {**os.environ, "TRITON_INTERPRET": ""}
    command = [sys.executable, str(folder / "audit.py"), str(folder / "tree"), str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 compiled kernels, 0 faults" in done.stdout


@pytest.mark.slow
def test_cpp(tmp_path):
    import torch
    from torch.utils.cpp_extension import load_inline

    wrapper = "at::Tensor softcap(at::Tensor x, double cap) { return spear_fast::softcap_cpu(x, cap); }"
    source = "#include <torch/extension.h>\n" + BLOCKS["csrc/cpu/softcap.cpp"] + wrapper
    built = load_inline("softcap_of_the_page", source, functions=["softcap"], build_directory=str(tmp_path))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = (torch.randn(7, 301) * 4).to(dtype)
        torch.testing.assert_close(built.softcap(x, 3.0), (3 * torch.tanh(x.double() / 3)).to(dtype))
    with pytest.raises(RuntimeError, match="softcap: cap must be above 0, got 0"):
        built.softcap(torch.ones(2), 0.0)
