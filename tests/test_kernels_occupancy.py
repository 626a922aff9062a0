"""The blocks that a multiprocessor holds, by NVIDIA's arithmetic; a kernel with one is found, and so is an excuse."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from spear_fast.kernels.audit import nvcc, occupancy
from spear_fast.kernels.audit.nvcc import CudaKernel
from spear_fast.kernels.audit.occupancy import OneBlock, blocks_at_once, stale, too_few
from spear_fast.kernels.audit.rows import AuditRow

GOOD = AuditRow("decode_it", "", 90, "bf16", "64: 16", registers=96, shared=20 << 10, threads=256)
ALONE = replace(GOOD, registers=141)
LISTED = [OneBlock("decode_it", "because", architectures=(90,), dtypes=("bf16",), tiles=("64:",))]


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "threads", "blocks"),
    [
        # registers: 65536 / (256 threads * 64)
        (80, 64, 0, 256, 4),
        (90, 65, 0, 256, 3),
        (90, 128, 0, 256, 2),
        # rounded up to 136 a thread: three warps in each quarter
        (90, 129, 0, 256, 1),
        (90, 255, 0, 128, 2),
        (90, 255, 0, 512, 0),
        # shared memory, of which a block takes a kilobyte more
        (80, 32, 81 << 10, 128, 2),
        (80, 32, (81 << 10) + 1, 128, 1),
        (90, 32, 113 << 10, 128, 2),
        (90, 32, (113 << 10) + 1, 128, 1),
        (100, 32, 227 << 10, 128, 1),
        # threads, and the number of blocks itself
        (90, 16, 0, 1024, 2),
        (100, 16, 0, 32, 32),
    ],
)
def test_known_cases(architecture, registers, shared, threads, blocks):
    assert blocks_at_once(architecture, registers, shared, threads) == blocks


PROGRAM = """
#include <cuda_occupancy.h>
extern "C" int blocks_at_once(int architecture, int registers, int shared, int threads) {
  cudaOccDeviceProp device;
  device.computeMajor = architecture / 10;
  device.computeMinor = architecture % 10;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = 2048;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 << 10;
  device.sharedMemPerMultiprocessor = (architecture == 80 ? 164 : 228) << 10;
  device.sharedMemPerBlockOptin = device.sharedMemPerMultiprocessor - 1024;
  device.reservedSharedMemPerBlock = 1024;
  device.numSms = 132;
  cudaOccFuncAttributes function;
  function.maxThreadsPerBlock = 1024;
  function.numRegs = registers;
  function.sharedSizeBytes = 0;
  function.partitionedGCConfig = PARTITIONED_GC_OFF;
  function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  function.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
  function.numBlockBarriers = 1;
  cudaOccDeviceState state;
  cudaOccResult found;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&found, &device, &function, &state, threads, shared)) return -1;
  return found.activeBlocksPerMultiprocessor;
}
"""


def test_the_arithmetic_is_that_of_nvidias_header(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    folders = [Path(each) for each in (find_spec("triton").submodule_search_locations if find_spec("triton") else [])]
    folders = [folder / "backends" / "nvidia" / "include" for folder in folders]
    folders = [folder for folder in folders if (folder / "cuda_occupancy.h").is_file()]
    if compiler is None or not folders:
        pytest.skip("there is no C++ compiler, or no Triton with NVIDIA's header")
    source, library = tmp_path / "occupancy.cpp", tmp_path / "occupancy.so"
    source.write_text(PROGRAM)
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{folders[0]}", "-o", library, source], check=True)
    theirs = ctypes.CDLL(str(library)).blocks_at_once
    for architecture in (80, 90, 100):
        for registers in (16, 31, 40, 41, 64, 84, 96, 128, 129, 168, 255):
            for shared in (0, 1, 7000, 8 << 10, 40961, 72704, 99 << 10, 113 << 10, 150_000):
                for threads in (32, 64, 96, 128, 256, 512, 1024):
                    case = (architecture, registers, shared, threads)
                    assert blocks_at_once(*case) == theirs(*case), case


def test_one_block_is_a_fault_unless_it_is_listed():
    assert too_few(GOOD, []) is None
    assert "1 block of 256 threads a multiprocessor, wanted 2" in too_few(ALONE, [])
    assert too_few(ALONE, LISTED) is None
    assert too_few(replace(ALONE, kernel="rms_norm_kernel"), []) is None
    for change in ({"architecture": 80}, {"dtype": "fp32"}, {"tile": "128: 16"}, {"kernel": "decode_them"}):
        assert "1 block" in too_few(replace(ALONE, **change), LISTED), change
    # one that does not fit at all runs nowhere, whatever is listed
    assert "0 blocks" in too_few(replace(ALONE, threads=1024), LISTED)


def test_an_exception_that_is_not_needed_is_a_fault():
    names = ["decode_it", "another"]
    assert stale([ALONE], names, LISTED) == []
    assert stale([ALONE, GOOD], names, LISTED) == []
    assert len(stale([GOOD], names, LISTED)) == 1
    # nothing is known of what was not compiled
    assert stale([replace(GOOD, kernel="another")], names, LISTED) == []
    assert "no kernel decode_it" in stale([], ["another"], LISTED)[0]


def test_every_exception_says_why():
    assert all(len(each.reason) > 20 for each in occupancy.ONE_BLOCK)


def test_threads_of_cuda_kernels_are_read_off_their_sources(monkeypatch, tmp_path):
    found = {kernel.name: nvcc.threads_of(kernel) for kernel in nvcc.KERNELS}
    assert found["beam_step"] == found["sample_step"] == 256
    cuda = tmp_path / "csrc" / "cuda"
    cuda.mkdir(parents=True)
    monkeypatch.setattr(nvcc, "FOLDER", cuda)
    (cuda / "shared.h").write_text("inline constexpr int kMany = 96;\n")
    (cuda / "made.cu").write_text(
        "__global__ void __launch_bounds__(kMany, A > 2 ? 3 : 4) named(A a) {}\n"
        "__global__ void __launch_bounds__(64) counted(A a) {}\n__global__ void open(A a) {}\n"
    )
    threads = {name: CudaKernel("made.cu", name, "", "A") for name in ("named", "counted", "open")}
    assert nvcc.threads_of(threads["named"]) == 96
    assert nvcc.threads_of(threads["counted"]) == 64
    with pytest.raises(ValueError, match=r"made.cu must give open __launch_bounds__"):
        nvcc.threads_of(threads["open"])
