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

// an unsigned number in the order of the values: the same for 0 and -0, the largest for any NaN, never 0
__device__ inline unsigned order_of(float value) {
  if (is_nan(value)) {
    return 0xffffffffu;
  }
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline Candidate<float> no_candidate() { return {minus_infinity(), 0x7fffffff}; }

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
    return mix(value, widen(unconditional[token * unconditional_stride]));
  }

  __device__ float mix(float value, float without) const { return without + (value - without) * guidance; }
};

// what makes values log-probabilities: (value - top) - log_total
struct Normaliser {
  float top, log_total;
};

// loads of a lane that are under way together
inline constexpr int kLoads = 8;

// row = mixed logits / temperature; for a warp, each lane its share
template <typename scalar_t>
__device__ inline Normaliser fill_row(const MixedLogits<scalar_t>& mixed, float temperature, int vocab, float* row) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  // where a value is NaN, so is the sum of what is raised to it
  float top = minus_infinity();
  const scalar_t* logits = mixed.logits + lane * mixed.stride;
  const scalar_t* unconditional = mixed.unconditional;
  if (unconditional != nullptr) {
    unconditional += lane * mixed.unconditional_stride;
  }
  for (int first = lane; first < vocab; first += kLoads * kWarp) {
    scalar_t loaded[kLoads];
    float values[kLoads];
    // all of them under way before one is waited for
#pragma unroll
    for (int i = 0; i < kLoads; ++i, logits += kWarp * mixed.stride) {
      loaded[i] = scalar_t{};
      if (first + i * kWarp < vocab) {
        loaded[i] = *logits;
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      values[i] = widen(loaded[i]);
    }
    if (unconditional != nullptr) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i, unconditional += kWarp * mixed.unconditional_stride) {
        if (first + i * kWarp < vocab) {
          loaded[i] = *unconditional;
        }
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        values[i] = mixed.mix(values[i], widen(loaded[i]));
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i * kWarp < vocab) {
        row[first + i * kWarp] = values[i];
        top = fmaxf(values[i], top);
      }
    }
  }
  if (temperature != 1) {
    top = minus_infinity();
    for (int token = lane; token < vocab; token += kWarp) {
      row[token] /= temperature;
      top = fmaxf(row[token], top);
    }
  }
  top = warp_max(top);
  float total = 0;
  for (int token = lane; token < vocab; token += kWarp) {
    total += expf(row[token] - top);
  }
  return {top, logf(sum_lanes<kWarp>(total))};
}

}  // namespace spear_fast
