// what the logic of selection needs from whoever compiles it: a C++ compiler, nvcc, or NVRTC, which has no headers at
// hand
#pragma once

#if defined(__CUDACC_RTC__)
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uint8_t = unsigned char;
#else
#include <cmath>
#include <cstdint>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define SPEAR_FAST_HOST_DEVICE __host__ __device__
#else
#define SPEAR_FAST_HOST_DEVICE
#endif

namespace spear_fast {

template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline acc_t minus_infinite() {
  return static_cast<acc_t>(-1e308 * 10);
}

template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline bool is_nan(acc_t x) {
  return x != x;
}

SPEAR_FAST_HOST_DEVICE inline float power(float base, float exponent) { return powf(base, exponent); }
SPEAR_FAST_HOST_DEVICE inline double power(double base, double exponent) { return pow(base, exponent); }

// the threads that select for one utterance: on the host there is one; a CUDA block has the same members
struct OneThread {
  SPEAR_FAST_HOST_DEVICE int thread() const { return 0; }
  SPEAR_FAST_HOST_DEVICE int threads() const { return 1; }
  SPEAR_FAST_HOST_DEVICE void sync() const {}
};

}  // namespace spear_fast
