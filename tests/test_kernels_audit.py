"""The audit sees what is wrong with a kernel, and is quiet about one that is as it should be."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from spear_fast.kernels.audit.rows import AuditRow, Job, remembered

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from spear_fast.kernels import tiles  # noqa: E402
from spear_fast.kernels.audit import __main__ as audit  # noqa: E402
from spear_fast.kernels.audit import occupancy, triton_kernels  # noqa: E402
from spear_fast.kernels.declaration import Declaration  # noqa: E402
from spear_fast.kernels.tiles import Entry  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

GOOD = AuditRow("copy", "", 90, "bf16", "64: 16", wanted=("wgmma",), registers=40, shared=1024, matrix=("wgmma", "mma"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 227 * 1024 + 1}, "takes 232449 bytes of shared memory and sm_90 has 232448"),
        ({"shared": 99 * 1024 + 1, "architecture": 80}, "bytes of shared memory and sm_80 has 101376"),
        ({"matrix": ("mma",)}, "has no wgmma"),
        ({"matrix": (), "wanted": ("tcgen05", "mma")}, "has no tcgen05 or mma"),
        ({"error": "out of luck"}, "does not compile: out of luck"),
    ],
)
def test_faults(change, said):
    assert audit.faults(GOOD) == []
    (fault,) = audit.faults(replace(GOOD, **change))
    assert said in fault


@triton.jit
def product_kernel(a, b, out, SIZE: tl.constexpr, ROWS: tl.constexpr):
    o_row, o_size = tl.arange(0, ROWS), tl.arange(0, SIZE)
    block = tl.load(a + o_row[:, None] * SIZE + o_size[None, :])
    other = tl.load(b + o_size[:, None] * SIZE + o_size[None, :])
    tl.store(out + o_row[:, None] * SIZE + o_size[None, :], tl.dot(block, other))


@triton.jit
def hoarding_kernel(a, b, out, SIZE: tl.constexpr, ROWS: tl.constexpr):
    o_all = tl.arange(0, SIZE * ROWS)
    block = tl.load(a + o_all).to(tl.float32)
    # all of the block waits in registers for its own sum
    tl.store(out + o_all, block - tl.sum(block, 0))


def audited(monkeypatch, kernel, rows, warps, architecture):
    """Returns the rows of the audit of one kernel at one tile."""
    entry = Entry("tested", 80, 64, 16, warps, 1, {"ROWS": rows})
    monkeypatch.setattr(tiles, "TABLE", (entry,))
    tiles.lookup.cache_clear()
    declaration = Declaration(
        kernel=kernel,
        tile="tested",
        signature={"a": "*T:16", "b": "*T:16", "out": "*fp32:16"},
        constants=lambda size: {"SIZE": size},
        matrix=kernel is product_kernel,
    )
    jobs = [job for job in triton_kernels.jobs([declaration]) if job.row.architecture == architecture]
    tiles.lookup.cache_clear()
    return jobs


@pytest.mark.parametrize(
    ("architecture", "rows", "found", "faults"),
    [(80, 64, "mma", 0), (90, 64, "wgmma", 0), (90, 16, "mma", 1)],
)
def test_matrix_instructions_are_found_or_missed(monkeypatch, tmp_path, architecture, rows, found, faults):
    (job,) = audited(monkeypatch, product_kernel, rows, 4, architecture)
    row = remembered(job, tmp_path)
    assert row.error == ""
    assert found in row.matrix
    assert len(audit.faults(row)) == faults
    assert 0 < row.registers <= 255
    assert row.shared > 0


def test_spilled_registers_are_seen(monkeypatch, tmp_path):
    # 512 numbers a thread; of half as many some compilers keep two in a register
    (job,) = audited(monkeypatch, hoarding_kernel, 256, 1, 80)
    row = remembered(job, tmp_path)
    assert row.spilled > 0
    assert [fault for fault in audit.faults(row) if "spills" in fault]


def test_an_argument_that_is_not_declared_is_named(monkeypatch):
    monkeypatch.setattr(tiles, "TABLE", (Entry("tested", 80, 64, 16, 4, 1, {"ROWS": 16}),))
    tiles.lookup.cache_clear()
    declaration = Declaration(product_kernel, "tested", {"a": "*T", "b": "*T"}, lambda size: {"SIZE": size})
    with pytest.raises(ValueError, match="product_kernel must declare out"):
        list(triton_kernels.jobs([declaration]))
    tiles.lookup.cache_clear()


def test_variants_are_all_compiled_for_the_main_target_only(monkeypatch):
    rows = [Entry("tested", 80, 64, bits, 4, 1, {"ROWS": 16}) for bits in (16, 32)]
    monkeypatch.setattr(tiles, "TABLE", tuple(rows))
    tiles.lookup.cache_clear()
    signature = {"a": "*T", "b": "*T", "out": "*T"}
    declaration = Declaration(
        product_kernel, "tested", signature, lambda size: {"SIZE": size}, {"light": {}, "heavy": {}}
    )
    found = [(job.row.architecture, job.row.dtype, job.row.variant) for job in triton_kernels.jobs([declaration])]
    tiles.lookup.cache_clear()
    heavy = [(sm, dtype, "heavy") for sm in (80, 90, 100) for dtype in ("bf16", "fp32")]
    assert sorted(found) == sorted([*heavy, (90, "bf16", "light")])


def test_results_are_kept_and_failures_are_not(tmp_path):
    calls = []

    def compile(fails):
        calls.append(fails)
        if fails:
            raise RuntimeError("first line\nlast line")
        return {"registers": 3, "spilled": 0, "shared": 5, "matrix": ("wgmma",)}

    job = Job("copy", "key", AuditRow("copy", "", 90, "bf16", ""), compile, (True,))
    assert remembered(job, tmp_path).error == "last line"
    good = replace(job, arguments=(False,))
    rows = [remembered(good, tmp_path) for _ in range(3)]
    assert rows[0] == rows[1] == rows[2]
    assert rows[0].shared == 5
    assert calls == [True, False]


def run(*arguments, **environment):
    command = [sys.executable, "-m", "spear_fast.kernels.audit", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=250)


def test_the_exit_status_is_that_of_the_worst_kernel(monkeypatch, capsys, tmp_path):
    jobs = [Job("copy", str(i), replace(GOOD, spilled=8 * i), lambda: {}, ()) for i in range(2)]
    monkeypatch.setattr(audit, "SECTIONS", [lambda: jobs])
    monkeypatch.setattr(occupancy, "ONE_BLOCK", ())
    assert audit.main(["--jobs", "1", "--cache", str(tmp_path)]) == 1
    assert "copy sm_90 bf16 64: 16: spills 8 bytes" in capsys.readouterr().err
    jobs.pop()
    assert audit.main(["--jobs", "1", "--cache", str(tmp_path)]) == 0
    assert "1 compiled kernels, 0 faults" in capsys.readouterr().out
    # one block of a kernel that must have two, and an exception that nothing needs
    jobs[0] = replace(jobs[0], key="alone", row=replace(GOOD, kernel="decode_copy", registers=200, threads=256))
    assert audit.main(["--jobs", "1", "--cache", str(tmp_path)]) == 1
    assert "decode_copy sm_90 bf16 64: 16: 1 block of 256 threads a multiprocessor" in capsys.readouterr().err
    monkeypatch.setattr(occupancy, "ONE_BLOCK", (occupancy.OneBlock("copy", "because"),))
    jobs[0] = replace(jobs[0], key="0", row=GOOD, name="copy")
    assert audit.main(["--jobs", "1", "--cache", str(tmp_path)]) == 1
    assert "no kernel that an exception for copy covers" in capsys.readouterr().err


def test_wrong_calls_are_answered_in_a_sentence():
    wrong = run("--only", "nothing of the kind")
    assert wrong.returncode == 2
    assert "--only must be part of a kernel's name, got 'nothing of the kind'" in wrong.stderr
    assert "unset it" in run(TRITON_INTERPRET="1").stderr


def test_a_kernel_of_the_table_is_audited(tmp_path):
    """Where processes share the work too."""
    done = run("--only", "rotation", "--jobs", "2", "--cache", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attention_rotation_kernel" in done.stdout
    assert "0 faults" in done.stdout
