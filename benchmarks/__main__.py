"""`python -m benchmarks COMMAND`, where `COMMANDS` has them."""

from __future__ import annotations

import importlib
import sys

COMMANDS = (
    *("op", "generate", "step", "latency", "label", "train", "convergence"),
    *("compare", "plan", "scale", "plots", "pages", "gpu"),
)


def main(arguments: list[str]) -> int:
    """Runs a benchmark and returns the exit status."""
    if not arguments or arguments[0] not in COMMANDS:
        print(f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    return importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
