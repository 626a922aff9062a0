// the launch of the kernels of fused_step.cu for one type; a file for each type, so that they compile side by side
#pragma once

#include <cuda_runtime.h>

#include "fused_step.cu"
#include "launch.h"

namespace spear_fast {

template <typename scalar_t>
int launch_fused_step(const FusedStep& a, int64_t blocks, int64_t rows, void* stream) {
  void (*kernel)(FusedStep) = rows <= 1 ? fused_step<scalar_t, 1>
      : rows <= 4                       ? fused_step<scalar_t, 4>
      : rows <= 8                       ? fused_step<scalar_t, 8>
                                        : fused_step<scalar_t, 16>;
  FusedStep copy = a;
  void* arguments[] = {&copy};
  return static_cast<int>(cudaLaunchCooperativeKernel(
      reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(kFusedThreads), arguments, 0,
      static_cast<cudaStream_t>(stream)));
}

}  // namespace spear_fast
