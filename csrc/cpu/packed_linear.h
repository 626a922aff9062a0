// a matrix of weights, laid out once for many matmuls with few rows
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <optional>
#include <string>

#include "panels.h"

namespace spear_fast {

// y = x @ weight.T + bias for x [rows, features], float32
//
// float32: exact. int8: weights rounded to 8 bits with a scale for each output, and x to 8 bits with one for each row;
// their sums are whole numbers. Either way a row of y depends on that row of x alone, to the last bit.
class PackedLinear : public torch::CustomClassHolder {
 public:
  enum class Kind { kFloat, kInt8 };

  // weight: [outputs, features], float32. bias: [outputs] or none. kind: "float32" or "int8"
  PackedLinear(const at::Tensor& weight, const std::optional<at::Tensor>& bias, const std::string& kind);

  // returns [rows, outputs]
  at::Tensor forward(const at::Tensor& x) const;

  // returns to + the product, perhaps in the memory of `to`, which must be dense
  at::Tensor added(const at::Tensor& x, const at::Tensor& to) const;

  std::string kind() const;
  int64_t outputs() const { return outputs_; }
  int64_t features() const { return features_; }

  // bytes of the weights as they are laid out
  int64_t bytes() const;

  // moves them into `memory`, that many bytes, which it holds on to
  void move_to(const at::Tensor& memory);

 private:
  void check(const at::Tensor& x) const;
  void multiply(const at::Tensor& x, at::Tensor& out, bool add) const;
  void by_floats(const at::Tensor& rows, at::Tensor& out, bool add) const;
  void by_int8(const at::Tensor& rows, at::Tensor& out, bool add) const;

  Kind kind_;
  int64_t outputs_, features_;
  Panels panels_;
  at::Tensor weight_;
  std::optional<at::Tensor> bias_;
  // of int8: the scale of each output, and what its sum is too large by
  at::Tensor scales_, middles_;
};

}  // namespace spear_fast
