"""Settings for all tests: one thread each, seeded, and memory that is never accidentally zero."""

from __future__ import annotations

import contextlib
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import triton_interpreter

from spear_fast.ops import available, backends, extension

torch.set_num_threads(1)


def pytest_configure() -> None:
    """Stops where `make asan` would test an extension that no sanitizer watches; mends the interpreter."""
    # a shell starts what runs in its background with Ctrl-C ignored, and tests interrupt what they start
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("SPEAR_FAST_TEST_SANITIZED") and (extension.missing() or not extension.facts().get("sanitize")):
        raise pytest.UsageError(f"the C++ extension in {extension.__file__} is not built with sanitizers")
    if backends.interpreted():
        triton_interpreter.mend()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says whose ops were tested, and whose could not be, and why."""
    reasons = {row.provider: row.missing for row in available()}
    tested = ", ".join(name for name, missing in reasons.items() if missing is None)
    where = " (Triton in its interpreter)" if backends.interpreted() else ""
    sanitizers = extension.facts().get("sanitize")
    terminalreporter.write_line(f"ops by {tested}{where}{f', C++ under {sanitizers}' if sanitizers else ''}")
    for name, missing in reasons.items():
        if missing is not None:
            terminalreporter.write_line(f"ops by {name} are not tested in this process: {missing}")


@pytest.fixture(autouse=True)
def _seeded():
    """The same random numbers whichever tests run."""
    torch.manual_seed(0)


@pytest.fixture
def nan_filled_empty():
    """Fills new memory, in Python and in C++, with NaN (integers: the largest): nothing unwritten passes for right."""
    deterministic, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(deterministic, warn_only=warns)
