// a matrix of weights, laid out once for many products with few rows
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <optional>
#include <string>

namespace spear_fast {

// y = x @ weight.T + bias for x [rows, features], float32; the product is a library's, what surrounds it is here
class PackedLinear : public torch::CustomClassHolder {
 public:
  enum class Kind { kMkl, kOneDnn, kInt8 };

  // weight: [outputs, features], float32. bias: [outputs] or none. kind: "float32", "mkl", "onednn" or "int8"
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

 private:
  void check(const at::Tensor& x) const;
  at::Tensor by_onednn(const at::Tensor& x, const std::optional<at::Tensor>& to) const;
  void by_mkl(const at::Tensor& x, at::Tensor& out, bool add) const;
  void by_int8(const at::Tensor& x, at::Tensor& out, bool add) const;

  Kind kind_;
  int64_t outputs_, features_;
  at::Tensor weight_;
  std::optional<at::Tensor> bias_;
  // of int8: what a unit of each output is worth
  at::Tensor scales_, zero_points_;
};

}  // namespace spear_fast
