"""`python -m spear_fast`: the same as `spear-fast`."""

from __future__ import annotations

import sys

from spear_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
