// what the rows of a matmul's result are multiplied by where the norm before the matmul was left out
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "lanes.h"

namespace spear_fast {

// returns sqrt(dim) / max(norm, 1e-12) of each row of `residual`, [rows, dim]; nothing where there is none
template <typename scalar_t>
std::vector<accumulate_t<scalar_t>> inverse_rms(const std::optional<at::Tensor>& residual) {
  using acc_t = accumulate_t<scalar_t>;
  if (!residual.has_value()) {
    return {};
  }
  const at::Tensor rows = residual->contiguous();
  const int64_t count = rows.size(0), size = rows.size(1);
  const auto* row = rows.const_data_ptr<scalar_t>();
  std::vector<acc_t> scales(count);
  for (int64_t i = 0; i < count; ++i, row += size) {
    double squares = 0;
    for (int64_t j = 0; j < size; ++j) {
      const auto x = static_cast<double>(row[j]);
      squares += x * x;
    }
    const double norm = std::sqrt(squares);
    // in this order a norm that is no number stays none
    scales[i] = static_cast<acc_t>(std::sqrt(static_cast<double>(size)) / (norm < 1e-12 ? 1e-12 : norm));
  }
  return scales;
}

// whether `residual` fits the tensors whose rows it scales; the caller's mistakes are explained in Python
inline bool fits_residual(const std::optional<at::Tensor>& residual, int64_t rows, const at::Tensor& scaled) {
  return !residual.has_value() ||
      (residual->dim() == 2 && residual->size(0) == rows && residual->scalar_type() == scaled.scalar_type());
}

}  // namespace spear_fast
