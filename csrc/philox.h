// Philox-4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
//
// Free of torch headers; compiles for host and device. The same numbers: spear_fast/ops/reference/philox.py
#pragma once

#include "select/portable.h"

namespace spear_fast {

struct Philox {
  uint32_t words[4];
};

SPEAR_FAST_HOST_DEVICE inline Philox philox(
    uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t odd = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(odd >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(odd);
    c2 = static_cast<uint32_t>(even >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(even);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// whether dropout keeps the attention weight (query, key) of a row of the batch times heads; threshold:
// dropout_threshold
SPEAR_FAST_HOST_DEVICE inline bool keeps(
    uint32_t key, uint32_t query, uint32_t row, uint64_t seed, uint32_t threshold) {
  const Philox drawn = philox(key, query, row, 0, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return (drawn.words[0] >> 8) >= threshold;
}

// the least of the 2^24 draws that is kept
SPEAR_FAST_HOST_DEVICE inline uint32_t dropout_threshold(double dropout) {
  const double exact = dropout * 16777216.0;
  const uint32_t below = static_cast<uint32_t>(exact);
  return below + (exact > below ? 1 : 0);
}

}  // namespace spear_fast
