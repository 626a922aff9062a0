"""GPU kernels of spear_fast, imported as `spear_fast.kernels`; a leaf that needs torch and triton only.

With a checkout's root on sys.path a bare `import kernels` finds this folder first. It then gives the package of that
name which is installed, if one is (Hugging Face's, which transformers asks for), and else an empty package.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


def _give_way() -> None:
    """Puts the installed package called `kernels` instead of this one, where there is one."""
    root = Path(__file__).resolve().parents[1]
    spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() != root])
    if spec is None or spec.loader is None:
        return
    sys.modules["kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["kernels"])


if __name__ != "spear_fast.kernels":
    # what is in this folder has one name alone
    __path__ = []
    _give_way()

    def __getattr__(name: str) -> Any:
        raise AttributeError(
            f"{__name__} has no attribute {name!r}: this folder is spear_fast's package of kernels and is not imported "
            "by its own name; install the project (pip install -e .) and use `import spear_fast.kernels`"
        )
