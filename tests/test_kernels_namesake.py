"""In a checkout's root `import kernels` finds this project's folder, which gives way to the package of that name."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code, **environment):
    """Returns what a Python started in the checkout's root printed, and how it ended."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


# as transformers asks: integrations/hub_kernels.py of 4.57, utils/import_utils.py of 5.24
PROBE = """
from importlib import import_module
from importlib.util import find_spec
assert find_spec("kernels") is not None
print(getattr(import_module("kernels"), "__version__", "N/A"))
try:
    from kernels import Device, LayerRepository
except ImportError:
    print("not installed")
"""


def test_who_probes_for_the_package_finds_it_missing():
    done = run(PROBE)
    assert done.stdout.split("\n")[:2] == ["N/A", "not installed"], done.stderr


def test_an_installed_package_of_the_name_is_given(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from .layer import Device, LayerRepository\n__version__ = '0.9.0'\n")
    (package / "layer.py").write_text("Device, LayerRepository = 1, 2\n")
    done = run(PROBE + "import kernels.layer\nprint(kernels.layer.Device)", PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == ["0.9.0", "1"], done.stderr


def test_the_folder_gives_nothing_under_its_bare_name():
    done = run("import kernels\nprint(hasattr(kernels, 'attention'))\nkernels.attention")
    assert done.stdout.split() == ["False"]
    assert "this folder is spear_fast's package of kernels" in done.stderr
    assert "use `import spear_fast.kernels`" in done.stderr
    done = run("import kernels.attention")
    assert done.stderr.strip().endswith("ModuleNotFoundError: No module named 'kernels.attention'")


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_imports_a_model():
    done = run("from transformers import T5ForConditionalGeneration as model; print(model.__name__)")
    assert done.stdout.split() == ["T5ForConditionalGeneration"], done.stderr
