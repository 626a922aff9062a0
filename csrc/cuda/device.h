// what device code may use, whoever compiles it: nvcc, NVRTC at run time, or a C++ compiler that plays the device in
// tests
//
// No header of the host's or of CUDA's is included: NVRTC has none at hand.
#pragma once

#ifdef SPEAR_FAST_EMULATE
#include "cuda_emulation.h"
#endif

namespace spear_fast {

inline constexpr int kWarp = 32;

// the two 16-bit types, as the bits in memory; arithmetic is in float
struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

#ifdef SPEAR_FAST_EMULATE
inline float widen(Half x) { return emulated_from_half(x.bits); }
inline unsigned short half_bits(float x) { return emulated_to_half(x); }
inline unsigned short bfloat16_bits(float x) { return emulated_to_bfloat16(x); }
#else
__device__ inline float widen(Half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

__device__ inline unsigned short half_bits(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ inline unsigned short bfloat16_bits(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

__device__ inline float widen(float x) { return x; }

__device__ inline float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ inline void narrow(float x, float* out) { *out = x; }

__device__ inline void narrow(float x, Half* out) { out->bits = half_bits(x); }

__device__ inline void narrow(float x, BFloat16* out) { out->bits = bfloat16_bits(x); }

__device__ inline unsigned word_of(float x) { return __float_as_uint(x); }

template <typename scalar_t>
__device__ inline unsigned word_of(scalar_t x) {
  return x.bits;
}

// numbers that one 16-byte access moves
template <typename scalar_t>
inline constexpr int kPack = 16 / sizeof(scalar_t);

// returns numbers first..first + kPack of a row of `size`, zeros past its end; ALIGNED: whole packs on 16-byte
// addresses
template <bool ALIGNED, typename scalar_t>
__device__ inline uint4 load_pack(const scalar_t* row, int first, int size) {
  uint4 pack = {0, 0, 0, 0};
  if constexpr (ALIGNED) {
    if (first < size) {
      pack = __ldg(reinterpret_cast<const uint4*>(row + first));
    }
  } else {
    constexpr int kPerWord = 4 / sizeof(scalar_t);
    unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kPack<scalar_t>; ++i) {
      if (first + i < size) {
        words[i / kPerWord] |= word_of(row[first + i]) << (i % kPerWord * 16);
      }
    }
    pack = {words[0], words[1], words[2], words[3]};
  }
  return pack;
}

__device__ inline void unpack(float, uint4 pack, float* out) {
  out[0] = __uint_as_float(pack.x);
  out[1] = __uint_as_float(pack.y);
  out[2] = __uint_as_float(pack.z);
  out[3] = __uint_as_float(pack.w);
}

template <typename scalar_t>
__device__ inline void unpack(scalar_t, uint4 pack, float* out) {
  const unsigned words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = widen(scalar_t{static_cast<unsigned short>(words[i] & 0xffff)});
    out[2 * i + 1] = widen(scalar_t{static_cast<unsigned short>(words[i] >> 16)});
  }
}

// begins a copy of four bytes, both addresses multiples of four; the thread may read them after wait_for_copies, others
// after a barrier too
__device__ inline void copy_word(void* shared, const void* global) {
#ifdef SPEAR_FAST_EMULATE
  emulated_copy(shared, global);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<unsigned*>(shared) = *static_cast<const unsigned*>(global);
#endif
}

__device__ inline void wait_for_copies() {
#ifdef SPEAR_FAST_EMULATE
  emulated_arrival();
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }

// sums over groups of LANES neighbouring lanes; every lane of the warp calls it, and every lane of a group gets the sum
template <int LANES, typename number_t>
__device__ inline number_t sum_lanes(number_t x) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

}  // namespace spear_fast
