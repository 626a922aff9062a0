"""All benchmarks: `python -m benchmarks.run` (`make bench`); arguments go to `benchmarks.generate`."""

from __future__ import annotations

from benchmarks.generate import main

if __name__ == "__main__":
    main()
