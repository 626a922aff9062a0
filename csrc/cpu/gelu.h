// the exact GELU's two parts: the normal distribution below a gate, and its density there
#pragma once

#include <utility>

#include "exponential.h"

namespace spear_fast {

// returns (share of the normal distribution below `gate`, density at `gate`)
template <typename acc_t>
inline std::pair<Lanes<acc_t>, Lanes<acc_t>> normal_distribution(const Lanes<acc_t>& gate) {
  const Lanes<acc_t> bell = exponential(gate * gate * Lanes<acc_t>(-0.5));
  const Lanes<acc_t> density = bell * Lanes<acc_t>(0.3989422804014326779);
  const Lanes<acc_t> below = (gate * Lanes<acc_t>(-0.7071067811865475244)).erfc() * Lanes<acc_t>(0.5);
  return {below, density};
}

template <>
inline std::pair<Lanes<float>, Lanes<float>> normal_distribution(const Lanes<float>& gate) {
  // the share beyond |gate| is the density times Mills' ratio, which a quotient of polynomials with positive
  // coefficients gives to 6e-9 of itself (fitted up to 14, where the density is nothing): near zero and in the tail
  // alike, no digits are lost
  static constexpr float kAbove[] = {4.077644553e-3F, 4.037278518e-2F, 1.824624985e-1F, 4.372518063e-1F, 0.5F};
  static constexpr float kBelow[] = {1.022101007e-2F, 1.012063697e-1F, 4.674308896e-1F,
                                     1.199293494F,    1.672388554F,    1.0F};
  // beyond 14 the exponential is zero, and the polynomials' quotient stays a number
  const Lanes<float> distance = at::vec::clamp_max(gate.abs(), Lanes<float>(14.0F));
  const Lanes<float> bell = exponential(distance * distance * Lanes<float>(-0.5F));
  const Lanes<float> tail = bell * (polynomial(distance, kAbove) / polynomial(distance, kBelow));
  const Lanes<float> below = Lanes<float>::blendv(tail, Lanes<float>(1.0F) - tail, gate > Lanes<float>(0.0F));
  return {below, bell * Lanes<float>(0.39894228F)};
}

}  // namespace spear_fast
