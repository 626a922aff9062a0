// plays the device for tests: the threads of a block are fibers of one host thread, each running to its next barrier
//
// The order in which they run is drawn anew at each barrier, so that a result that hangs on an order, because a barrier is
// missing, differs between seeds; so is the order of the blocks. A barrier that not all threads reach ends the run.
// Blocks run one after the other, or, where the launch is cooperative, in turns that are drawn as well, so that they can
// wait for what another one writes; each block then has its own copy of what is __shared__.
#pragma once

#include <math.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __forceinline__ inline

struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x, y, z;
};

// cuda_emulation.cpp
extern __thread Index threadIdx, blockIdx, blockDim, gridDim;
void emulated_barrier(bool whole_block);
void emulated_look_again();
unsigned emulated_exchange(unsigned bits, int source);
[[noreturn]] void emulated_failure(const char* what);
void emulate(
    long long blocks, int threads, unsigned seed, bool together, void (*body)(const void*), const void* arguments);
void emulated_copy(void* to, const void* from);
void emulated_arrival();

template <typename to_t, typename from_t>
inline to_t emulated_bits(from_t x) {
  static_assert(sizeof(to_t) == sizeof(from_t));
  to_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline void __syncthreads() { emulated_barrier(true); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulated_barrier(false); }
// one thread runs at a time, and what it writes is there for all others
inline void __threadfence() {}
template <typename value_t, typename more_t>
inline value_t atomicAdd(value_t* at, more_t more) {
  const value_t before = *at;
  *at += static_cast<value_t>(more);
  return before;
}

template <typename value_t>
inline value_t __shfl_sync(unsigned, value_t x, int source) {
  if constexpr (sizeof(value_t) == 8) {
    const auto bits = emulated_bits<unsigned long long>(x);
    const unsigned long long low = emulated_exchange(static_cast<unsigned>(bits), source & 31);
    const unsigned long long high = emulated_exchange(static_cast<unsigned>(bits >> 32), source & 31);
    return emulated_bits<value_t>(high << 32 | low);
  } else {
    static_assert(sizeof(value_t) == 4, "the emulation hands words of 32 and 64 bits around");
    return emulated_bits<value_t>(emulated_exchange(emulated_bits<unsigned>(x), source & 31));
  }
}

template <typename value_t>
inline value_t __shfl_xor_sync(unsigned mask, value_t x, int lanes) {
  return __shfl_sync(mask, x, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    votes |= static_cast<unsigned>(__shfl_sync(mask, predicate ? 1u : 0u, lane)) << lane;
  }
  return votes;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }

template <typename value_t>
inline value_t __ldg(const value_t* pointer) {
  if (reinterpret_cast<size_t>(pointer) % sizeof(value_t)) {
    emulated_failure("a vector load is not aligned");
  }
  return *pointer;
}

// what is asked for must be there
inline void emulated_read(const void* at) { (void)*static_cast<const volatile char*>(at); }

inline float __uint_as_float(unsigned bits) { return emulated_bits<float>(bits); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }

inline unsigned short emulated_to_half(float x) { return emulated_bits<unsigned short>(static_cast<_Float16>(x)); }
inline float emulated_from_half(unsigned short bits) { return static_cast<float>(emulated_bits<_Float16>(bits)); }

inline unsigned short emulated_to_bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (isnan(x)) {
    return static_cast<unsigned short>(bits >> 16 | 0x40);
  }
  // to the nearest, ties to even
  return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
