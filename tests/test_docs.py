"""The documentation is whole: pages and links exist, every public name and environment variable is described."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import spear_fast

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = [found[1] for found in LINK.finditer(page.read_text()) if "://" not in found[1]]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


def test_every_page_is_in_the_contents():
    toctrees = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    listed = {line for tree in toctrees for line in tree.splitlines() if line and not line.startswith(":")}
    assert listed == {page.stem for page in PAGES} - {"index"}


@pytest.mark.parametrize("name", spear_fast.__all__)
def test_every_public_name_is_described(name):
    described = getattr(spear_fast, name)
    # a docstring of its own, not an inherited one
    assert (vars(described) if isinstance(described, type) else {"__doc__": described.__doc__})["__doc__"]
    assert re.search(rf"^\.\. auto(class|function):: {name}$", (DOCS / "api.md").read_text(), re.MULTILINE)


def sources():
    """Returns path → text of what may read the environment."""
    found = [ROOT / "Makefile", ROOT / "setup.py"]
    for folder in ("spear_fast", "kernels", "csrc", "benchmarks", "tests"):
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    return {path: path.read_text() for path in found}


def test_every_environment_variable_is_described():
    texts = sources()
    macros = set()
    for text in texts.values():
        macros.update(re.findall(r"(?:#\s*define|#\s*ifn?def|defined\(|\W-D)\s*(SPEAR_FAST_\w+)", text))
    names = {name for text in texts.values() for name in re.findall(r"\bSPEAR_FAST_[A-Z][A-Z0-9_]*\b", text)} - macros
    described = set(re.findall(r"`(SPEAR_FAST_\w+)`", (DOCS / "environment.md").read_text()))
    assert names == described


def test_the_readme_is_short_and_says_at_once_that_no_kernel_has_run_on_a_gpu():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150
    first = next(line for line in lines if "GPU" in line)
    assert "none of them has run on a GPU yet" in first


def conf():
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_become_lists_with_links_to_the_reference():
    text = """Returns what (reference line 620) says.

ids: `[n]` int64, *any*,
    padded. top_k: more.

    some.code()

Raises ValueError."""
    assert conf().as_rest(text.splitlines()) == [
        "",
        "Returns what (`reference line 620 <https://github.com/lucidrains/spear-tts-pytorch/blob/0.4.8/"
        "spear_tts_pytorch/spear_tts_pytorch.py#L620>`__) says.",
        "",
        "",
        r"* **ids**: `[n]` int64, \*any\*, padded. top_k: more.",
        "",
        "",
        "::",
        "",
        "    some.code()",
        "",
        "Raises ValueError.",
        "",
    ]


@pytest.mark.parametrize("name", ["README.md", "docs/engine.md"])
def test_the_code_on_a_page_runs(name, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    # a page is read from its beginning
    names: dict = {}
    for block in blocks:
        exec(compile(block, name, "exec"), names)


def targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_commands_of_make_exist(page):
    named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert named <= targets()


def test_every_command_of_make_is_in_its_help():
    helped = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(helped) == targets()


def test_public_hosts_run_what_a_person_types():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {"make test", "make docs"} <= set(commands)
    assert {command.split()[1] for command in commands} <= targets()
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"] for repo in repos for hook in repo["hooks"]}
    assert {"ruff-check", "ruff-format", "clang-format", "check-added-large-files", "check-yaml"} <= hooks
