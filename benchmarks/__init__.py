"""Benchmarks: each number comes after a green check of its case, in a JSONL row with what it was measured on."""

import sys
from pathlib import Path

# the rule that says what is right, and the loader of the reference package, are the tests' own
_TESTS = str(Path(__file__).parent.parent / "tests")
if _TESTS not in sys.path:
    sys.path.append(_TESTS)
