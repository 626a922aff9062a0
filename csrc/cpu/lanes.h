// vectors of the accumulation type, whatever type is in memory
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

namespace spear_fast {

template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename acc_t>
using Lanes = at::vec::Vectorized<acc_t>;

// loops over a head run in steps of two vectors: 16-bit types are widened two vectors at a time
template <typename acc_t>
inline constexpr int64_t kStep = 2 * Lanes<acc_t>::size();

template <typename acc_t>
inline int64_t round_up(int64_t size) {
  return (size + kStep<acc_t> - 1) / kStep<acc_t> * kStep<acc_t>;
}

template <typename acc_t, typename scalar_t>
inline std::tuple<Lanes<acc_t>, Lanes<acc_t>> load_step(const scalar_t* source) {
  if constexpr (std::is_same_v<acc_t, scalar_t>) {
    return {Lanes<acc_t>::loadu(source), Lanes<acc_t>::loadu(source + Lanes<acc_t>::size())};
  } else {
    return at::vec::convert_to_float<scalar_t>(at::vec::Vectorized<scalar_t>::loadu(source));
  }
}

// the last step of a head whose size is no multiple of kStep: zeros past the end, which is not read
template <typename acc_t, typename scalar_t>
inline std::tuple<Lanes<acc_t>, Lanes<acc_t>> load_step(const scalar_t* source, int64_t count) {
  alignas(64) acc_t widened[kStep<acc_t>] = {};
  for (int64_t i = 0; i < count; ++i) {
    widened[i] = static_cast<acc_t>(source[i]);
  }
  return load_step<acc_t>(static_cast<const acc_t*>(widened));
}

template <typename acc_t, typename scalar_t>
inline void store_step(scalar_t* target, const Lanes<acc_t>& low, const Lanes<acc_t>& high) {
  if constexpr (std::is_same_v<acc_t, scalar_t>) {
    low.store(target);
    high.store(target + Lanes<acc_t>::size());
  } else {
    at::vec::convert_from_float<scalar_t>(low, high).store(target);
  }
}

// out[i] = sum of the lanes of the i-th argument
template <typename acc_t>
inline void sum_lanes(
    const Lanes<acc_t>& a, const Lanes<acc_t>& b, const Lanes<acc_t>& c, const Lanes<acc_t>& d, acc_t* out) {
  alignas(64) acc_t lanes[Lanes<acc_t>::size()];
  const Lanes<acc_t>* vectors[4] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i) {
    vectors[i]->store(lanes);
    acc_t sum = 0;
    for (int64_t lane = 0; lane < Lanes<acc_t>::size(); ++lane) {
      sum += lanes[lane];
    }
    out[i] = sum;
  }
}

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
inline __m256 half_width(const Lanes<float>& vector) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 whole = vector;
  return _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
#else
  return vector;
#endif
}

template <>
inline void sum_lanes<float>(
    const Lanes<float>& a, const Lanes<float>& b, const Lanes<float>& c, const Lanes<float>& d, float* out) {
  const __m256 first = _mm256_hadd_ps(half_width(a), half_width(b));
  const __m256 second = _mm256_hadd_ps(half_width(c), half_width(d));
  const __m256 both = _mm256_hadd_ps(first, second);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
}
#endif

}  // namespace spear_fast
