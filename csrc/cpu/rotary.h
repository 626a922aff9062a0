// rotation of a head by its position: interleaved pairs, angle = position * frequency
#pragma once

#include <cmath>
#include <vector>

#include "lanes.h"

namespace spear_fast {

// sines and cosines of one position; consecutive rows are mostly at the same position, which then costs nothing
template <typename acc_t>
class Rotary {
 public:
  // freqs: [pairs]
  Rotary(const acc_t* freqs, int64_t pairs) : freqs_(freqs), cos_(pairs), sin_(pairs) {}

  void move_to(int64_t position) {
    if (position == position_) {
      return;
    }
    position_ = position;
    for (size_t i = 0; i < cos_.size(); ++i) {
      const acc_t angle = static_cast<acc_t>(position) * freqs_[i];
      cos_[i] = std::cos(angle);
      sin_[i] = std::sin(angle);
    }
  }

  // out = source rotated, times scale
  template <typename scalar_t, typename out_t>
  void rotate(const scalar_t* source, acc_t scale, out_t* out) const {
    for (size_t i = 0; i < cos_.size(); ++i) {
      const auto even = static_cast<acc_t>(source[2 * i]);
      const auto odd = static_cast<acc_t>(source[2 * i + 1]);
      out[2 * i] = static_cast<out_t>((even * cos_[i] - odd * sin_[i]) * scale);
      out[2 * i + 1] = static_cast<out_t>((odd * cos_[i] + even * sin_[i]) * scale);
    }
  }

 private:
  const acc_t* freqs_;
  std::vector<acc_t> cos_, sin_;
  int64_t position_ = -1;
};

}  // namespace spear_fast
