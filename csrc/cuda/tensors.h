// torch's side of the CUDA ops: the current stream and what a tensor must be
//
// Only headers of the CPU build of torch are used, so that this compiles wherever torch is installed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include "launch.h"

// of torch's stable C interface, in libtorch_cuda
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace spear_fast {

inline void* current_stream(const at::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream) == 0, "the current CUDA stream of device ",
      tensor.get_device(), " cannot be had; restart the process");
  return stream;
}

// calls body with a null pointer of the type that the kernels have for the tensor's
template <typename Body>
inline int for_scalar(const char* op, const at::Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return body(static_cast<float*>(nullptr));
    case at::kBFloat16:
      return body(static_cast<BFloat16*>(nullptr));
    case at::kHalf:
      return body(static_cast<Half*>(nullptr));
    default:
      TORCH_CHECK_VALUE(
          false, op, ": the dtype must be float32, bfloat16 or float16, got ", tensor.scalar_type(),
          "; convert it with .to()");
  }
}

inline void check_launch(const char* op, int error) {
  TORCH_CHECK(
      error == 0, op, ": the launch failed with CUDA error ", error, "; set CUDA_LAUNCH_BLOCKING=1 to see where");
}

}  // namespace spear_fast
