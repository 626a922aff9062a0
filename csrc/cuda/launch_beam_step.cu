#include <cuda_runtime.h>

#include "beam_step.cu"
#include "launch.h"

namespace spear_fast {

template <typename scalar_t>
int launch_beam_step(const BeamStep& a, void* stream) {
  if (a.utterances > 0) {
    const auto queue = static_cast<cudaStream_t>(stream);
    beam_step<scalar_t><<<static_cast<unsigned>(a.utterances), kSelectThreads, 0, queue>>>(a);
  }
  return static_cast<int>(cudaGetLastError());
}

template int launch_beam_step<float>(const BeamStep&, void*);
template int launch_beam_step<BFloat16>(const BeamStep&, void*);
template int launch_beam_step<Half>(const BeamStep&, void*);

}  // namespace spear_fast
