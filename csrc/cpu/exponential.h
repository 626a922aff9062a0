// exponentials and polynomials of vectors, inline: a call for each vector would cost more than the arithmetic
#pragma once

#include "lanes.h"

namespace spear_fast {

// coefficients: the highest power's first
template <typename acc_t, size_t COUNT>
inline Lanes<acc_t> polynomial(const Lanes<acc_t>& x, const acc_t (&coefficients)[COUNT]) {
  Lanes<acc_t> value(coefficients[0]);
  for (size_t i = 1; i < COUNT; ++i) {
    value = at::vec::fmadd(value, x, Lanes<acc_t>(coefficients[i]));
  }
  return value;
}

// exp(x) for x up to about 0, as differences from a largest are; zero where the result would be no normal number
inline Lanes<double> exponential(const Lanes<double>& x) { return x.exp(); }

inline Lanes<float> exponential(const Lanes<float>& x) {
  // fitted to exp within half a power of two: off by 3e-9 of itself, less than a rounding
  static constexpr float kPowers[] = {
      1.38145976e-3F, 8.36871658e-3F, 4.16683890e-2F, 1.66665211e-1F, 4.99999940e-1F, 1.0F, 1.0F};
  constexpr float least = -87.0F;
  // not maximum(): this keeps what is not a number as well, and with that the whole took four times as long
  const auto bounded = at::vec::clamp_min(x, Lanes<float>(least));
  const auto twos = (bounded * Lanes<float>(1.44269504F)).round();
  // ln 2 in two parts, of which the first has few digits: its multiples are exact
  auto rest = at::vec::fmadd(twos, Lanes<float>(-0.693359375F), bounded);
  rest = at::vec::fmadd(twos, Lanes<float>(2.12194440e-4F), rest);
  using Integers = at::vec::Vectorized<int32_t>;
  const auto exponent = (at::vec::convert_to_int_of_same_size<float>(twos) + Integers(127)) << Integers(23);
  const auto value = polynomial(rest, kPowers) * at::vec::cast<float, int32_t>(exponent);
  return Lanes<float>::blendv(value, Lanes<float>(0.0F), x < Lanes<float>(least));
}

}  // namespace spear_fast
