// loops over the last dimension of rows, whatever its size, and sums over the rows themselves
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "lanes.h"

namespace spear_fast {

// a step that lies within the row
struct Whole {};

// calls body(offset, Whole{}) for each whole step of a row and body(offset, elements left) for the rest
template <typename acc_t, typename Body>
inline void for_steps(int64_t size, const Body& body) {
  const int64_t whole = size / kStep<acc_t> * kStep<acc_t>;
  for (int64_t offset = 0; offset < whole; offset += kStep<acc_t>) {
    body(offset, Whole{});
  }
  if (whole < size) {
    body(whole, size - whole);
  }
}

template <typename acc_t, typename scalar_t>
inline std::tuple<Lanes<acc_t>, Lanes<acc_t>> load(const scalar_t* source, Whole) {
  return load_step<acc_t>(source);
}

template <typename acc_t, typename scalar_t>
inline std::tuple<Lanes<acc_t>, Lanes<acc_t>> load(const scalar_t* source, int64_t count) {
  return load_step<acc_t>(source, count);
}

template <typename acc_t, typename scalar_t>
inline void store(scalar_t* target, const Lanes<acc_t>& low, const Lanes<acc_t>& high, Whole) {
  store_step<acc_t>(target, low, high);
}

template <typename acc_t, typename scalar_t>
inline void store(scalar_t* target, const Lanes<acc_t>& low, const Lanes<acc_t>& high, int64_t count) {
  alignas(64) acc_t wide[kStep<acc_t>];
  low.store(wide);
  high.store(wide + Lanes<acc_t>::size());
  for (int64_t i = 0; i < count; ++i) {
    target[i] = static_cast<scalar_t>(wide[i]);
  }
}

template <typename acc_t>
inline acc_t sum_of(const Lanes<acc_t>& lanes) {
  alignas(64) acc_t each[Lanes<acc_t>::size()];
  lanes.store(each);
  acc_t sum = 0;
  for (const acc_t lane : each) {
    sum += lane;
  }
  return sum;
}

// sums over rows, column by column: a few rows in the accumulation type, all in double, so that many rows lose nothing
template <typename acc_t>
class ColumnSums {
 public:
  explicit ColumnSums(int64_t size) : size_(size), few_(round_up<acc_t>(size)), all_(size) {}

  void add(int64_t offset, const Lanes<acc_t>& low, const Lanes<acc_t>& high) {
    acc_t* few = few_.data() + offset;
    (Lanes<acc_t>::loadu(few) + low).store(few);
    few += Lanes<acc_t>::size();
    (Lanes<acc_t>::loadu(few) + high).store(few);
  }

  void end_row() {
    if (++rows_ == kRows) {
      flush();
    }
  }

  void flush() {
    for (int64_t i = 0; i < size_; ++i) {
      all_[i] += few_[i];
    }
    std::fill(few_.begin(), few_.end(), acc_t(0));
    rows_ = 0;
  }

  double operator[](int64_t column) const { return all_[column]; }

 private:
  static constexpr int64_t kRows = 32;
  int64_t size_, rows_ = 0;
  std::vector<acc_t> few_;
  std::vector<double> all_;
};

// calls body(first row, past the last row, sums) in parallel, each call with sums of its own, and writes their total
template <typename acc_t, typename scalar_t, typename Body>
inline void sum_rows(int64_t rows, int64_t size, int64_t grain, scalar_t* target, const Body& body) {
  const int64_t parts = std::clamp<int64_t>(rows / std::max<int64_t>(grain, 1), 1, at::get_num_threads());
  std::vector<ColumnSums<acc_t>> sums(parts, ColumnSums<acc_t>(size));
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      body(rows * part / parts, rows * (part + 1) / parts, sums[part]);
      sums[part].flush();
    }
  });
  for (int64_t i = 0; i < size; ++i) {
    double total = 0;
    for (const auto& part : sums) {
      total += part[i];
    }
    target[i] = static_cast<scalar_t>(total);
  }
}

inline at::ScalarType accumulation_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// a tensor's numbers in the order of its shape
inline at::Tensor packed(const at::Tensor& tensor) { return tensor.contiguous(); }

inline at::Tensor packed(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->contiguous() : at::Tensor();
}

template <typename scalar_t>
inline const scalar_t* pointer(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<scalar_t>() : nullptr;
}

}  // namespace spear_fast
