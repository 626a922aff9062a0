// the launch of the kernels of decode_self_attention.cu for one type; a file for each type, so that they compile side
// by side
#pragma once

#include <cuda_runtime.h>

#include "decode_self_attention.cu"
#include "launch.h"

namespace spear_fast {

template <typename scalar_t, int LANES>
void attend(const SelfAttention& a, bool aligned, const SelfAttentionPlan& plan, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(plan.blocks);
  if (!aligned) {
    decode_self_attention<scalar_t, LANES, 5, false><<<blocks, kThreads, 0, stream>>>(a);
  } else if (plan.rows == 1) {
    decode_self_attention<scalar_t, LANES, 1, true><<<blocks, kThreads, 0, stream>>>(a);
  } else if (plan.rows == 5) {
    decode_self_attention<scalar_t, LANES, 5, true><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    decode_self_attention<scalar_t, LANES, 8, true><<<blocks, kThreads, 0, stream>>>(a);
  }
}

template <typename scalar_t>
int launch_self_attention(const SelfAttention& a, bool aligned, const SelfAttentionPlan& plan, void* queue) {
  const auto stream = static_cast<cudaStream_t>(queue);
  if (plan.lanes == 8) {
    attend<scalar_t, 8>(a, aligned, plan, stream);
  } else if (plan.lanes == 16) {
    attend<scalar_t, 16>(a, aligned, plan, stream);
  } else {
    attend<scalar_t, 32>(a, aligned, plan, stream);
  }
  if (plan.splits > 1) {
    const long long rows = a.utterances * a.beams * a.tokens * a.heads;
    merge_self_attention<scalar_t><<<static_cast<unsigned>((rows + kWarps - 1) / kWarps), kThreads, 0, stream>>>(a);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace spear_fast
