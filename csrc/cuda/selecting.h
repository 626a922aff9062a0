// what the selection kernels share: groups of threads, reductions over a warp, buffers from arguments, rows of logits
#pragma once

#include "../select/buffers.h"
#include "../select/candidates.h"
#include "device.h"

namespace spear_fast {

inline constexpr int kSelectThreads = 256;
inline constexpr unsigned kAllLanes = 0xffffffffu;

struct WarpGroup {
  __device__ int thread() const { return static_cast<int>(threadIdx.x % kWarp); }
  __device__ int threads() const { return kWarp; }
  __device__ void sync() const { __syncwarp(); }
};

struct BlockGroup {
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return kSelectThreads; }
  __device__ void sync() const { __syncthreads(); }
};

__device__ inline Candidate<float> no_candidate() { return {minus_infinity(), 0x7fffffff}; }

// the largest of a warp's numbers, NaN where there is one
__device__ inline float warp_largest(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, x, offset);
    x = is_better(other, x) ? other : x;
  }
  return x;
}

__device__ inline Candidate<float> warp_best(Candidate<float> best) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Candidate<float> other = {
        __shfl_xor_sync(kAllLanes, best.value, offset), __shfl_xor_sync(kAllLanes, best.index, offset)};
    best = comes_before(other, best) ? other : best;
  }
  return best;
}

// the part of the buffers that both ops have
template <typename Arguments>
__device__ inline void fill_buffers(const Arguments& a, Buffers<float>& b) {
  b.utterances = a.utterances;
  b.capacity = a.capacity;
  b.beams = static_cast<int>(a.beams);
  b.vocab = static_cast<int>(a.vocab);
  b.halves = static_cast<int>(a.halves);
  b.prefix_width = static_cast<int>(a.prefix_width);
  b.float_params = a.float_params;
  b.int_params = a.int_params;
  b.prefix = a.prefix;
  b.inputs = reinterpret_cast<int64_t*>(a.inputs);
  b.scores = a.scores;
  b.lengths = reinterpret_cast<int64_t*>(a.lengths);
  b.ancestors = a.ancestors;
  b.tokens = a.tokens;
  b.parents = a.parents;
  b.logprobs = a.logprobs;
  b.done = a.done;
}

// a hypothesis' logits: null + (logits - null) * guidance, or the logits alone
template <typename scalar_t>
struct MixedLogits {
  const scalar_t* logits;
  // none where it would change nothing
  const scalar_t* unconditional;
  long long stride, unconditional_stride;
  float guidance;

  template <typename Arguments>
  __device__ MixedLogits(const Arguments& a, long long utterance, int beam, float guidance)
      : logits(static_cast<const scalar_t*>(a.logits) + utterance * a.logits_utterance + beam * a.logits_beam),
        unconditional(static_cast<const scalar_t*>(a.null_logits)),
        stride(a.logits_token),
        unconditional_stride(a.null_token),
        guidance(guidance) {
    const bool mixes = unconditional != nullptr && guidance != 1;
    unconditional = mixes ? unconditional + utterance * a.null_utterance + beam * a.null_beam : nullptr;
  }

  __device__ float operator()(int token) const {
    const float value = widen(logits[token * stride]);
    if (unconditional == nullptr) {
      return value;
    }
    const float without = widen(unconditional[token * unconditional_stride]);
    return without + (value - without) * guidance;
  }
};

// what makes values log-probabilities: (value - top) - log_total
struct Normaliser {
  float top, log_total;
};

// row = mixed logits / temperature; for a warp, each lane its share
template <typename scalar_t>
__device__ inline Normaliser fill_row(const MixedLogits<scalar_t>& mixed, float temperature, int vocab, float* row) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  float top = minus_infinity();
  for (int token = lane; token < vocab; token += kWarp) {
    float value = mixed(token);
    value = temperature != 1 ? value / temperature : value;
    row[token] = value;
    top = is_better(value, top) ? value : top;
  }
  top = warp_largest(top);
  float total = 0;
  for (int token = lane; token < vocab; token += kWarp) {
    total += expf(row[token] - top);
  }
  return {top, logf(sum_lanes<kWarp>(total))};
}

}  // namespace spear_fast
