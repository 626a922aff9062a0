#include <cuda_runtime.h>

#include "launch.h"
#include "sample_step.cu"

namespace spear_fast {

template <typename scalar_t>
int launch_sample_step(const SampleStep& a, void* stream) {
  if (a.utterances > 0) {
    const auto queue = static_cast<cudaStream_t>(stream);
    sample_step<scalar_t><<<static_cast<unsigned>(a.utterances), kSelectThreads, 0, queue>>>(a);
  }
  return static_cast<int>(cudaGetLastError());
}

template int launch_sample_step<float>(const SampleStep&, void*);
template int launch_sample_step<BFloat16>(const SampleStep&, void*);
template int launch_sample_step<Half>(const SampleStep&, void*);

}  // namespace spear_fast
