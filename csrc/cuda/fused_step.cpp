// the whole step of few rows for torch: what Python has gathered, launched on the current stream
#include "fused_step.h"

#include <torch/library.h>

#include <cstring>

#include "launch.h"
#include "tensors.h"

namespace spear_fast {
namespace {

// like: any tensor of the device and the dtype. fields: of FusedStep, in their order
void launch_fused_step_cuda(const at::Tensor& like, at::IntArrayRef fields, int64_t blocks, int64_t rows) {
  constexpr const char* op = "launch_fused_step";
  FusedStep a;
  TORCH_CHECK_VALUE(
      fields.size() * sizeof(int64_t) == sizeof(a), op, ": fields must be ", sizeof(a) / sizeof(int64_t),
      " numbers, got ", fields.size(), "; reinstall spear-fast");
  TORCH_CHECK_VALUE(blocks >= 1 && rows >= 1 && rows <= 16, op, ": rows must lie in 1..16, got ", rows);
  std::memcpy(&a, fields.data(), sizeof(a));
  const c10::DeviceGuard guard(like.device());
  void* stream = current_stream(like);
  switch (like.scalar_type()) {
    case at::kBFloat16:
      check_launch(op, launch_fused_step<BFloat16>(a, blocks, rows, stream));
      return;
    case at::kHalf:
      check_launch(op, launch_fused_step<Half>(a, blocks, rows, stream));
      return;
    default:
      TORCH_CHECK_VALUE(
          false, op, ": the dtype must be bfloat16 or float16, got ", like.scalar_type(), "; use another provider");
  }
}

}  // namespace
}  // namespace spear_fast

TORCH_LIBRARY_FRAGMENT(spear_fast, library) {
  library.def("launch_fused_step(Tensor like, int[] fields, int blocks, int rows) -> ()");
}

TORCH_LIBRARY_IMPL(spear_fast, CUDA, library) {
  library.impl("launch_fused_step", TORCH_FN(spear_fast::launch_fused_step_cuda));
}
