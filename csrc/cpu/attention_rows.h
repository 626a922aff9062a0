// attention of a few query rows over a list of key and value rows: the body of both decoding ops
//
// Keys and values are given as lists of pointers, one for each position, so that a null key before them, a strided
// buffer and an ancestor table are all the same to it. Every position is loaded once for a block of query rows, tile by
// tile, so that the other blocks find it in the nearest cache.
#pragma once

#include <cmath>
#include <limits>

#include "exponential.h"
#include "lanes.h"

namespace spear_fast {

// positions whose keys, or values, stay in the nearest cache while all query rows pass over them
inline constexpr int64_t kTile = 64;
// keys whose terms are summed together
inline constexpr int64_t kKeys = 4;
// positions that are asked for ahead: rows found through an ancestor table look random to the processor's own
// prefetching
inline constexpr int64_t kAhead = 8;

template <typename scalar_t>
inline void prefetch(const scalar_t* row, int64_t size) {
  constexpr int64_t line = 64 / sizeof(scalar_t);
  for (int64_t i = 0; i < size; i += line) {
    __builtin_prefetch(row + i);
  }
}

// scores[row, position] = queries[row] · keys[position]; may write up to kKeys - 1 scores past `count`; keys up to
// `reach` are asked for ahead
template <typename acc_t, int ROWS, typename scalar_t>
inline void score_block(
    const acc_t* queries, int64_t query_stride, const scalar_t* const* keys, int64_t count, int64_t reach, int64_t size,
    acc_t* scores, int64_t score_stride) {
  const int64_t whole = size / kStep<acc_t> * kStep<acc_t>;
  for (int64_t position = 0; position < count; position += kKeys) {
    const scalar_t* rows[kKeys];
    for (int64_t i = 0; i < kKeys; ++i) {
      rows[i] = keys[std::min(position + i, count - 1)];
      if (position + i + kAhead < reach) {
        prefetch(keys[position + i + kAhead], size);
      }
    }
    Lanes<acc_t> sums[ROWS][kKeys];
    for (auto& row : sums) {
      for (auto& sum : row) {
        sum = Lanes<acc_t>(0);
      }
    }
    const auto add = [&](int64_t offset, auto load) {
      Lanes<acc_t> low[ROWS], high[ROWS];
      for (int row = 0; row < ROWS; ++row) {
        std::tie(low[row], high[row]) = load_step<acc_t>(queries + row * query_stride + offset);
      }
      for (int64_t i = 0; i < kKeys; ++i) {
        const auto [key_low, key_high] = load(rows[i] + offset);
        for (int row = 0; row < ROWS; ++row) {
          sums[row][i] = at::vec::fmadd(low[row], key_low, sums[row][i]);
          sums[row][i] = at::vec::fmadd(high[row], key_high, sums[row][i]);
        }
      }
    };
    for (int64_t offset = 0; offset < whole; offset += kStep<acc_t>) {
      add(offset, [](const scalar_t* row) { return load_step<acc_t>(row); });
    }
    if (whole < size) {
      add(whole, [&](const scalar_t* row) { return load_step<acc_t>(row, size - whole); });
    }
    for (int row = 0; row < ROWS; ++row) {
      sum_lanes<acc_t>(sums[row][0], sums[row][1], sums[row][2], sums[row][3], scores + row * score_stride + position);
    }
  }
}

// out[row] += sum over positions of weights[row, position] * values[position]; values up to `reach` are asked for ahead
template <typename acc_t, int ROWS, typename scalar_t>
inline void value_block(
    const acc_t* weights, int64_t weight_stride, const scalar_t* const* values, int64_t count, int64_t reach,
    int64_t size, acc_t* out, int64_t out_stride) {
  constexpr int64_t half = kStep<acc_t> / 2;
  const auto add = [&](int64_t offset, auto load) {
    const int64_t ahead = offset == 0 ? reach - kAhead : 0;
    Lanes<acc_t> low[ROWS], high[ROWS];
    for (int row = 0; row < ROWS; ++row) {
      std::tie(low[row], high[row]) = load_step<acc_t>(static_cast<const acc_t*>(out + row * out_stride + offset));
    }
    for (int64_t position = 0; position < count; ++position) {
      if (position < ahead) {
        prefetch(values[position + kAhead], size);
      }
      const auto [value_low, value_high] = load(values[position] + offset);
      for (int row = 0; row < ROWS; ++row) {
        const Lanes<acc_t> weight(weights[row * weight_stride + position]);
        low[row] = at::vec::fmadd(weight, value_low, low[row]);
        high[row] = at::vec::fmadd(weight, value_high, high[row]);
      }
    }
    for (int row = 0; row < ROWS; ++row) {
      low[row].store(out + row * out_stride + offset);
      high[row].store(out + row * out_stride + offset + half);
    }
  };
  const int64_t whole = size / kStep<acc_t> * kStep<acc_t>;
  for (int64_t offset = 0; offset < whole; offset += kStep<acc_t>) {
    add(offset, [](const scalar_t* row) { return load_step<acc_t>(row); });
  }
  if (whole < size) {
    add(whole, [&](const scalar_t* row) { return load_step<acc_t>(row, size - whole); });
  }
}

// calls body(first row, rows in the block as a constant) for blocks of at most MOST rows
template <int MOST, typename Body>
inline void for_row_blocks(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; rows - row >= MOST; row += MOST) {
    body(row, std::integral_constant<int, MOST>{});
  }
  if constexpr (MOST > 1) {
    if (row < rows) {
      for_row_blocks<MOST - 1>(rows - row, [&](int64_t i, auto block) { body(row + i, block); });
    }
  }
}

// scores of all rows against all positions; rows need kKeys - 1 spare scores at the end
template <typename acc_t, typename scalar_t>
inline void score_rows(
    const acc_t* queries, int64_t rows, int64_t query_stride, const scalar_t* const* keys, int64_t count, int64_t size,
    acc_t* scores, int64_t score_stride) {
  for (int64_t start = 0; start < count; start += kTile) {
    const int64_t length = std::min(kTile, count - start);
    const auto block = [&](int64_t row, auto size_of_block) {
      score_block<acc_t, decltype(size_of_block)::value>(
          queries + row * query_stride, query_stride, keys + start, length, row == 0 ? count - start : 0, size,
          scores + row * score_stride + start, score_stride);
    };
#if defined(CPU_CAPABILITY_AVX512)
    for_row_blocks<4>(rows, block);
#else
    // half the registers; no remainder of one where that is possible: 2 + 2 rather than 3 + 1
    rows % 3 == 1 ? for_row_blocks<2>(rows, block) : for_row_blocks<3>(rows, block);
#endif
  }
}

// out of all rows, each a weighted sum over all positions, added to what is there
template <typename acc_t, typename scalar_t>
inline void value_rows(
    const acc_t* weights, int64_t rows, int64_t weight_stride, const scalar_t* const* values, int64_t count,
    int64_t size, acc_t* out, int64_t out_stride) {
  for (int64_t start = 0; start < count; start += kTile) {
    const int64_t length = std::min(kTile, count - start);
    for_row_blocks<4>(rows, [&](int64_t row, auto size_of_block) {
      value_block<acc_t, decltype(size_of_block)::value>(
          weights + row * weight_stride + start, weight_stride, values + start, length, row == 0 ? count - start : 0,
          size, out + row * out_stride, out_stride);
    });
  }
}

// turns scores into exp(score - largest), in place; returns their sum
template <typename acc_t>
inline acc_t exponentiate(acc_t* scores, int64_t count) {
  constexpr int64_t width = Lanes<acc_t>::size();
  const int64_t whole = count / width * width;
  Lanes<acc_t> largest_lanes(-std::numeric_limits<acc_t>::infinity());
  for (int64_t i = 0; i < whole; i += width) {
    largest_lanes = at::vec::maximum(largest_lanes, Lanes<acc_t>::loadu(scores + i));
  }
  if (whole < count) {
    const auto rest = Lanes<acc_t>::loadu(scores + whole, count - whole);
    largest_lanes = at::vec::maximum(largest_lanes, Lanes<acc_t>::set(largest_lanes, rest, count - whole));
  }
  const auto larger = [](Lanes<acc_t>& a, Lanes<acc_t>& b) { return at::vec::maximum(a, b); };
  const Lanes<acc_t> largest(at::vec::vec_reduce_all<acc_t>(larger, largest_lanes));
  Lanes<acc_t> sums(0);
  for (int64_t i = 0; i < whole; i += width) {
    const auto weight = exponential(Lanes<acc_t>::loadu(scores + i) - largest);
    weight.store(scores + i);
    sums = sums + weight;
  }
  if (whole < count) {
    const auto weight = exponential(Lanes<acc_t>::loadu(scores + whole, count - whole) - largest);
    weight.store(scores + whole, count - whole);
    sums = sums + Lanes<acc_t>::set(Lanes<acc_t>(0), weight, count - whole);
  }
  const auto sum = [](Lanes<acc_t>& a, Lanes<acc_t>& b) { return a + b; };
  return at::vec::vec_reduce_all<acc_t>(sum, sums);
}

}  // namespace spear_fast
