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
    const Lanes<acc_t> factor(static_cast<acc_t>(position));
    at::vec::map([&](auto freq) { return (freq * factor).cos(); }, cos_.data(), freqs_, pairs());
    at::vec::map([&](auto freq) { return (freq * factor).sin(); }, sin_.data(), freqs_, pairs());
  }

  // out = source rotated, times scale
  template <typename scalar_t, typename out_t>
  void rotate(const scalar_t* source, acc_t scale, out_t* out) const {
    constexpr int64_t width = Lanes<acc_t>::size();
    const Lanes<acc_t> scales(scale);
    int64_t i = 0;
    for (; i + width <= pairs(); i += width) {
      const auto [low, high] = load_step<acc_t>(source + 2 * i);
      const auto [even, odd] = at::vec::deinterleave2<acc_t>(low, high);
      const auto cos = Lanes<acc_t>::loadu(cos_.data() + i) * scales;
      const auto sin = Lanes<acc_t>::loadu(sin_.data() + i) * scales;
      const auto [first, second] = at::vec::interleave2<acc_t>(even * cos - odd * sin, odd * cos + even * sin);
      store_step<acc_t>(out + 2 * i, first, second);
    }
    for (; i < pairs(); ++i) {
      const auto even = static_cast<acc_t>(source[2 * i]);
      const auto odd = static_cast<acc_t>(source[2 * i + 1]);
      out[2 * i] = static_cast<out_t>((even * cos_[i] - odd * sin_[i]) * scale);
      out[2 * i + 1] = static_cast<out_t>((odd * cos_[i] + even * sin_[i]) * scale);
    }
  }

 private:
  int64_t pairs() const { return static_cast<int64_t>(cos_.size()); }

  const acc_t* freqs_;
  std::vector<acc_t> cos_, sin_;
  int64_t position_ = -1;
};

}  // namespace spear_fast
