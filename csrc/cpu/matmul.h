// matmuls of small matrices that lie in the nearest caches: what attention over tiles is made of
#pragma once

#include <utility>

#include "attention_rows.h"

namespace spear_fast {

// rows of a product that stay in registers, two vectors of columns each
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kProductRows = 12;
#else
inline constexpr int kProductRows = 6;
#endif

// the rows are written out by the compiler: an array whose elements are set or taken in a loop is kept in memory, where
// every step would store all of it
template <bool ADD, typename acc_t, int... ROW>
inline void product_block(
    std::integer_sequence<int, ROW...>, const acc_t* a, int64_t a_row, int64_t a_depth, const acc_t* b, int64_t b_depth,
    acc_t* c, int64_t c_row, int64_t depth) {
  constexpr int64_t half = kStep<acc_t> / 2;
  const auto begin = [](const acc_t* sum) { return ADD ? Lanes<acc_t>::loadu(sum) : Lanes<acc_t>(0); };
  Lanes<acc_t> low[] = {begin(c + ROW * c_row)...}, high[] = {begin(c + ROW * c_row + half)...};
  for (int64_t i = 0; i < depth; ++i) {
    const auto b_low = Lanes<acc_t>::loadu(b + i * b_depth), b_high = Lanes<acc_t>::loadu(b + i * b_depth + half);
    const auto add = [&](int row, const Lanes<acc_t>& factor) {
      low[row] = at::vec::fmadd(factor, b_low, low[row]);
      high[row] = at::vec::fmadd(factor, b_high, high[row]);
    };
    (add(ROW, Lanes<acc_t>(a[ROW * a_row + i * a_depth])), ...);
  }
  (low[ROW].store(c + ROW * c_row), ...);
  (high[ROW].store(c + ROW * c_row + half), ...);
}

// c[row, column] = sum over i of a[row, i] * b[i, column], added to what is there with ADD; columns are a multiple of
// kStep
template <bool ADD, typename acc_t>
inline void product(
    const acc_t* a, int64_t a_row, int64_t a_depth, const acc_t* b, int64_t b_depth, acc_t* c, int64_t c_row,
    int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t column = 0; column < columns; column += kStep<acc_t>) {
    for_row_blocks<kProductRows>(rows, [&](int64_t row, auto block) {
      product_block<ADD>(
          std::make_integer_sequence<int, decltype(block)::value>(), a + row * a_row, a_row, a_depth, b + column,
          b_depth, c + row * c_row + column, c_row, depth);
    });
  }
}

}  // namespace spear_fast
