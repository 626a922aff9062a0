// what the phases of fused_step.cu share
#pragma once

#include "device.h"
#include "fused_step.h"

namespace spear_fast {

inline constexpr int kFusedThreads = 256;
inline constexpr int kFusedWarps = kFusedThreads / kWarp;
// said to the compiler, which then leaves each thread 168 registers: more of them than are needed only hold addresses
inline constexpr int kFusedBound = 384;
// numbers of a head, at most
inline constexpr int kFusedSize = 128;

// brings the line of an address into the device's cache
#ifdef SPEAR_FAST_EMULATE
inline void prefetch(const void* at) { emulated_read(at); }
#else
__device__ inline void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
#endif

// a layer's weights, in the order of their addresses
enum FusedWeight {
  kSelfGamma,
  kQueryKeyValue,
  kSelfOutput,
  kCrossGamma,
  kCrossQuery,
  kCrossOutput,
  kNullKey,
  kNullValue,
  kNullOutput,
  kFeedGamma,
  kUpGate,
  kFeedBias,
  kDown,
  kFreqs,
  kFusedWeights
};

}  // namespace spear_fast
