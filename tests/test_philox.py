"""The counter-based generator gives its published numbers, from Python, from C++ and through nvcc's eyes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from spear_fast.ops.reference.philox import dropout_mask, philox

CSRC = Path(__file__).parent.parent / "csrc"
# counter, key, words: the test vectors published with the generator
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "philox.h"
int main(int argc, char** argv) {
  uint32_t in[6];
  for (int i = 0; i < 6; ++i) in[i] = std::strtoul(argv[1 + i], nullptr, 16);
  const auto drawn = spear_fast::philox(in[0], in[1], in[2], in[3], in[4], in[5]);
  for (const uint32_t word : drawn.words) std::printf("%08x ", word);
  for (uint32_t row = 0; row < 2; ++row)
    for (uint32_t query = 0; query < 3; ++query)
      for (uint32_t key = 0; key < 5; ++key)
        std::printf("%d", spear_fast::keeps(key, query, row, -123456789012345ll, spear_fast::dropout_threshold(0.3)));
}
"""


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_published_vectors(counter, key, words):
    tensors = lambda text: tuple(torch.tensor(int(word, 16)) for word in text.split())  # noqa: E731
    assert philox(tensors(counter), tensors(key)) == tensors(words)


def test_a_tensor_of_counters_is_each_counter_alone():
    zero = torch.tensor(0)
    counters = torch.tensor([0, 1, 2**31, 2**32 - 1])
    key = torch.tensor(5), torch.tensor(2**32 - 1)
    together = philox((counters, zero, counters[:, None], zero), key)[0]
    for i in range(4):
        for j in range(4):
            assert together[i, j] == philox((counters[j], zero, counters[i], zero), key)[0]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_header_gives_the_same_numbers(tmp_path):
    (tmp_path / "philox.cpp").write_text(PROGRAM)
    command = ["c++", "-std=c++17", "-Wall", "-Werror", f"-I{CSRC}", tmp_path / "philox.cpp", "-o", tmp_path / "philox"]
    subprocess.run(command, check=True)
    wanted = "".join(
        str(int(each)) for each in dropout_mask(torch.tensor(-123456789012345), (1, 2, 3, 5), 0.3).flatten()
    )
    for counter, key, words in VECTORS:
        arguments = [tmp_path / "philox", *counter.split(), *key.split()]
        printed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
        assert printed == f"{words} {wanted}"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_header_compiles_for_a_device(tmp_path):
    kernel = (
        '#include "philox.h"\n__global__ void draw(uint32_t* out) { '
        "*out = spear_fast::philox(threadIdx.x, 0, 0, 0, 1, 2).words[0]; }"
    )
    (tmp_path / "draw.cu").write_text(kernel)
    subprocess.run(["nvcc", "-ptx", f"-I{CSRC}", "draw.cu"], cwd=tmp_path, check=True)
    assert "draw" in (tmp_path / "draw.ptx").read_text()
