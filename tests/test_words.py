"""The project's words are the field's, as docs/glossary.md has them: what was said before is in no tracked file."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {".py", ".md", ".cpp", ".h", ".cu", ".cuh", ".toml", ".yml", ".yaml", ".in", ".txt", ".ipynb", ""}

# what is not said, as a regular expression → what is said instead
OLD = {
    r"\bseats?\b": "slot",
    r"\bplaces\b|\b(?:free|vacant) place\b": "slots (of an engine), positions (in a sequence), folders (on a disk)",
    r"\bpool_slots\b": "pool_beams",
    r"\b(?:whole|real)_settings\b": "int_params, float_params",
    r"\bcompany\b": "batch-invariant",
    r"\b(?:sighted|blind)\b": "conditional, unconditional",
    r"\block[- ]?step": "static batch",
    r"\bwalk(?:s|ed|ing)?[ _]back\b": "backtrace",
    r"\byardsticks?\b": "same-dtype baseline",
    r"\bharvest": "collect_finished",
    r"\bwithdraw": "cancel",
    r"\bproceed|(?<!in )\b_?advance|\b_drives\b": "step, run_until",
    r"\b_?(?:un)?settle[sd]?\b": "complete, completed",
    r"\btickets?\b": "request",
    r"(?-i:\bPlan\b)": "EngineConfig",
    r"\b(?:go|goes|gone|going|went) on with\b": "resume, continue with",
    r"of the limit\b|\bpercent_of_limit\b": "of the roofline",
    r"\bproducts\b": "matmuls",
    r"\bin front\b": "before, first",
    r"\bbehind\b": "after",
    r"\bplayed\b": "replayed",
}

# path, what of OLD it may hold, why
ALLOWED = {
    ("tests/test_words.py", None): "this list",
    ("examples/espeak/corpus.py", None): "words of sentences",
    ("benchmarks/rows.py", None): "reads rows of earlier versions",
    ("tests/test_benchmarks_pages.py", r"\bproducts\b"): "tests that rows of earlier versions are read",
    ("tests/test_benchmarks_pages.py", r"of the limit\b|\bpercent_of_limit\b"): "the same",
    ("spear_fast/decoding/__init__.py", r"(?-i:\bPlan\b)"): "the last release's name, deprecated",
    ("spear_fast/decoding/__init__.py", r"\btickets?\b"): "the last release's name, deprecated",
    ("spear_fast/decoding/config.py", r"(?-i:\bPlan\b)"): "warns of the last release's name",
    ("tests/test_decoding_options.py", r"(?-i:\bPlan\b)"): "tests the last release's name",
    ("tests/test_decoding_options.py", r"\btickets?\b"): "tests the last release's name",
    ("CHANGELOG.md", r"(?-i:\bPlan\b)"): "names what was renamed",
    ("CHANGELOG.md", r"\btickets?\b"): "names what was renamed",
    ("CHANGELOG.md", r"\bpool_slots\b"): "names what was renamed",
    ("CHANGELOG.md", r"\b(?:whole|real)_settings\b"): "names what was renamed",
}

# where the words are not mended yet
PENDING: tuple[str, ...] = ()


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a checkout")
    names = [name for name in done.stdout.splitlines() if Path(name).suffix in TEXTS]
    return [name for name in names if (ROOT / name).is_file() and name != "LICENSE"]


def found(old: str) -> list[str]:
    """Returns file:line: text of all tracked lines with an old word, but for what may hold it."""
    word = re.compile(old, re.IGNORECASE)
    lines = []
    for name in tracked():
        if (name, None) in ALLOWED or (name, old) in ALLOWED or name.startswith(PENDING):
            continue
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
            if word.search(line):
                lines.append(f"{name}:{number}: {line.strip()[:120]}")
    return lines


@pytest.mark.parametrize("old", OLD)
def test_an_old_word_is_in_no_tracked_file(old):
    lines = found(old)
    assert not lines, f"say {OLD[old]} instead:\n" + "\n".join(lines)


def test_every_exception_is_needed():
    """A list of exceptions that nobody needs any more would let the words in again."""
    for (name, old), _ in ALLOWED.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        words = OLD if old is None else [old]
        assert any(re.search(word, text, re.IGNORECASE) for word in words), f"{name} no longer holds {old}"


def test_the_search_finds_what_it_should():
    for old, examples in {
        r"\bproducts\b": ["the products are", "Products"],
        r"\b_?(?:un)?settle[sd]?\b": ["_settle(", "is settled", "unsettled"],
        r"(?-i:\bPlan\b)": ["Plan.of("],
        r"\bwalk(?:s|ed|ing)?[ _]back\b": ["walked_back(", "walks back"],
    }.items():
        assert all(re.search(old, example, re.IGNORECASE) for example in examples)
    assert not re.search(r"(?-i:\bPlan\b)", "plan_shards and the plan", re.IGNORECASE)
