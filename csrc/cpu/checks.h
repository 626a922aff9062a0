// what the native classes ask of a tensor before they read its memory; of an op's arguments the dispatcher and Python
// ask it
#pragma once

#include <ATen/core/Tensor.h>

namespace spear_fast {

// whether a tensor's numbers lie in this process' memory, each as it is
inline bool is_plain(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.defined() && !tensor.is_nested() && tensor.layout() == at::kStrided && tensor.device().is_cpu() &&
      tensor.scalar_type() == type && !tensor.is_neg() && !tensor.is_conj() && !tensor._is_zerotensor();
}

// a dtype as Python calls it
inline std::string dtype_of(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

// what an error says of a tensor
inline std::string described(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return "none";
  }
  const bool is_view = tensor.is_neg() || tensor.is_conj();
  const char* kind = is_view    ? " as a negated or conjugated view"
      : tensor._is_zerotensor() ? " of zeros without memory"
                                : "";
  return c10::str(
      dtype_of(tensor.scalar_type()), " ", tensor.is_nested() ? c10::IntArrayRef() : tensor.sizes(), " on ",
      tensor.device(), ", ", tensor.layout(), kind);
}

inline void check_tensor(
    const char* owner, const std::string& name, const at::Tensor& tensor, at::ScalarType type, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(
      is_plain(tensor, type) && tensor.sizes() == sizes, owner, ": ", name, " must be ", dtype_of(type), " ", sizes,
      " on the CPU, strided, got ", described(tensor), "; convert it with .to(), views with .contiguous()");
}

}  // namespace spear_fast
