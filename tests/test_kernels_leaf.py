"""kernels/ is a leaf: besides itself and the standard library it imports torch and triton."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent / "kernels"
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}


def imported(path: Path) -> set[str]:
    """Returns the top-level packages that a file imports by their absolute names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: str(path.relative_to(KERNELS)))
def test_imports(path):
    """Modules of the folder name each other relatively: its name is not that of the package."""
    assert imported(path) <= ALLOWED
