// products of small matrices that lie in the nearest caches: what attention over tiles is made of
#pragma once

#include "attention_rows.h"

namespace spear_fast {

// rows of a product that stay in registers, two vectors of columns each
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kProductRows = 12;
#else
inline constexpr int kProductRows = 6;
#endif

template <typename acc_t, int ROWS, bool ADD>
inline void product_block(
    const acc_t* a, int64_t a_row, int64_t a_depth, const acc_t* b, int64_t b_depth, acc_t* c, int64_t c_row,
    int64_t depth) {
  constexpr int64_t half = kStep<acc_t> / 2;
  Lanes<acc_t> low[ROWS], high[ROWS];
  for (int row = 0; row < ROWS; ++row) {
    if constexpr (ADD) {
      low[row] = Lanes<acc_t>::loadu(c + row * c_row);
      high[row] = Lanes<acc_t>::loadu(c + row * c_row + half);
    } else {
      low[row] = Lanes<acc_t>(0);
      high[row] = Lanes<acc_t>(0);
    }
  }
  for (int64_t i = 0; i < depth; ++i) {
    const auto b_low = Lanes<acc_t>::loadu(b + i * b_depth), b_high = Lanes<acc_t>::loadu(b + i * b_depth + half);
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row) {
      const Lanes<acc_t> factor(a[row * a_row + i * a_depth]);
      low[row] = at::vec::fmadd(factor, b_low, low[row]);
      high[row] = at::vec::fmadd(factor, b_high, high[row]);
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    low[row].store(c + row * c_row);
    high[row].store(c + row * c_row + half);
  }
}

// c[row, column] = sum over i of a[row, i] * b[i, column], added to what is there with ADD; columns are a multiple of kStep
template <bool ADD, typename acc_t>
inline void product(
    const acc_t* a, int64_t a_row, int64_t a_depth, const acc_t* b, int64_t b_depth, acc_t* c, int64_t c_row, int64_t rows,
    int64_t columns, int64_t depth) {
  for (int64_t column = 0; column < columns; column += kStep<acc_t>) {
    for_row_blocks<kProductRows>(rows, [&](int64_t row, auto block) {
      product_block<acc_t, decltype(block)::value, ADD>(
          a + row * a_row, a_row, a_depth, b + column, b_depth, c + row * c_row + column, c_row, depth);
    });
  }
}

}  // namespace spear_fast
