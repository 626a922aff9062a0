"""The emulator of CUDA devices itself: blocks of a cooperative launch wait for each other and share no memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulator import compiler, library

BLOCKS, THREADS = 3, 64
# each block adds up what all blocks wrote in the round before, between two barriers of the grid
PROGRAM = """
#define SPEAR_FAST_EMULATE
#include "cuda_emulation.h"
struct Rounds {{ unsigned* counter; int* written; int* sums; }};
void wait_for_all(const Rounds& a, unsigned& reached) {{
  __syncthreads();
  if (threadIdx.x == 0) {{
    reached += gridDim.x;
    atomicAdd(a.counter, {missed} && blockIdx.x == 1 ? 0 : 1);
    while (*a.counter < reached) emulated_look_again();
  }}
  __syncthreads();
}}
void rounds(Rounds a) {{
  __shared__ int s_sum;
  unsigned reached = 0;
  for (int round = 0; round < 4; ++round) {{
    if (threadIdx.x == 5) a.written[blockIdx.x] = 10 * round + blockIdx.x + (round ? s_sum : 0);
    {barrier}
    if (threadIdx.x == 40) {{
      s_sum = 0;
      for (unsigned i = 0; i < gridDim.x; ++i) s_sum += a.written[i] * (blockIdx.x + 1);
    }}
    {barrier}
  }}
  if (threadIdx.x == 63) a.sums[blockIdx.x] = s_sum;
}}
extern "C" void run(Rounds a, unsigned seed) {{
  emulate({blocks}, {threads}, seed, true, [](const void* with) {{ rounds(*static_cast<const Rounds*>(with)); }}, &a);
}}
"""


def program(barrier: str = "wait_for_all(a, reached);", missed: str = "false") -> str:
    return PROGRAM.format(barrier=barrier, missed=missed, blocks=BLOCKS, threads=THREADS)


class Rounds(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("counter", "written", "sums")]


def run(source: str, seed: int) -> list[int]:
    counter, written, sums = ctypes.c_uint(0), (ctypes.c_int * BLOCKS)(), (ctypes.c_int * BLOCKS)()
    pointers = [ctypes.cast(ctypes.byref(each), ctypes.c_void_p) for each in (counter, written, sums)]
    library(source).run(Rounds(*pointers), ctypes.c_uint(seed))
    return list(sums)


def wanted() -> list[int]:
    sums = [0] * BLOCKS
    for step in range(4):
        written = [10 * step + block + sums[block] for block in range(BLOCKS)]
        sums = [sum(written) * (block + 1) for block in range(BLOCKS)]
    return sums


@pytest.fixture(autouse=True)
def there_is_a_compiler():
    compiler()


def test_blocks_wait_for_each_other():
    assert all(run(program(), seed) == wanted() for seed in range(20))


def test_a_missing_barrier_shows():
    """With a barrier of the block alone, what comes out hangs on the order of the blocks."""
    assert len({tuple(run(program(barrier="__syncthreads();"), seed)) for seed in range(20)}) > 1


def test_a_barrier_that_a_block_does_not_reach_ends_the_run():
    code = "import test_cuda_emulator as t; t.run(t.program(missed='true'), 0)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "a barrier of the grid is not reached by all of its blocks" in done.stderr
