// a decoding step of few rows: all layers and the logits in one cooperative launch
//
// As many blocks as the device has multiprocessors walk through the phases together, with a barrier of the grid after
// each: a phase is a matmul with what comes before and after it, or an attention. Weights are read once, by whichever
// block has the outputs; what passes between phases is small and stays in the device's cache. Hidden states are float32
// throughout.
#include "fused_step.h"

#include "fused_attention.h"
#include "fused_product.h"
#include "grid_barrier.h"

namespace spear_fast {

enum FusedPhase {
  kProject,
  kAttendHistory,
  kAddHistory,
  kAskSource,
  kAttendSource,
  kAddSource,
  kActivate,
  kAddActivations,
  kFusedPhases
};

// returns the matmul of a phase; the one after the last layer gives the logits
template <typename scalar_t>
__device__ inline Product<scalar_t> product_of(const FusedStep& a, long long layer, int phase) {
  const int dim = static_cast<int>(a.dim), width = static_cast<int>(a.heads * a.size);
  const int inner = static_cast<int>(a.inner), rows = static_cast<int>(a.rows), sourced = static_cast<int>(a.sourced);
  const auto* attended = static_cast<const scalar_t*>(a.attended);
  if (layer == a.layers) {
    const auto* weight = static_cast<const scalar_t*>(a.logits_weight);
    const auto* gamma = static_cast<const scalar_t*>(a.final_gamma);
    return {weight, static_cast<int>(a.vocab), dim, rows, gamma, Into::kLogits, layer};
  }
  const auto weight = [&](FusedWeight which) { return weight_of<scalar_t>(a, layer, which); };
  const int projected = static_cast<int>((a.heads + 2 * a.groups) * a.size);
  switch (phase) {
    case kProject:
      return {weight(kQueryKeyValue), projected, dim, rows, weight(kSelfGamma), Into::kProjected, layer};
    case kAddHistory:
      return {weight(kSelfOutput), dim, width, rows, attended, Into::kHidden, layer};
    case kAskSource:
      return {weight(kCrossQuery), width, dim, sourced, weight(kCrossGamma), Into::kProjected, layer};
    case kAddSource:
      return {weight(kCrossOutput), dim, width, sourced, attended, Into::kHidden, layer};
    case kActivate:
      return {weight(kUpGate), 2 * inner, dim, rows, weight(kFeedGamma), Into::kActivations, layer};
    default:
      return {weight(kDown), dim, inner, rows, static_cast<const scalar_t*>(a.activations), Into::kHidden, layer};
  }
}

// the vectors of the newest inputs
template <typename scalar_t>
__device__ inline void embed(const FusedStep& a) {
  const auto* embedding = static_cast<const scalar_t*>(a.embedding);
  const long long first = static_cast<long long>(blockIdx.x) * kFusedThreads + threadIdx.x;
  for (long long i = first; i < a.rows * a.dim; i += static_cast<long long>(gridDim.x) * kFusedThreads) {
    long long id = a.inputs[i / a.dim % a.sourced];
    // what is wrong must not lead outside
    id = id < 0 ? 0 : id < a.embeddings ? id : a.embeddings - 1;
    a.hidden[i] = widen(embedding[id * a.dim + i % a.dim]);
  }
}

// without its source a hypothesis sees the null key alone, which needs no query
template <typename scalar_t>
__device__ inline void add_null_output(const FusedStep& a, const scalar_t* null_output) {
  const long long first = static_cast<long long>(blockIdx.x) * kFusedThreads + threadIdx.x;
  for (long long i = a.sourced * a.dim + first; i < a.rows * a.dim;
       i += static_cast<long long>(gridDim.x) * kFusedThreads) {
    a.hidden[i] += widen(null_output[i % a.dim]);
  }
}

template <typename scalar_t, int ROWS>
__global__ void __launch_bounds__(kFusedBound, 1) fused_step(FusedStep a) {
  __shared__ union Shared {
    ProductMemory<ROWS> product;
    AttentionMemory<scalar_t> attention;
  } shared;
  GridBarrier barrier{a.counters};
  embed<scalar_t>(a);
  barrier.wait();
  for (long long layer = 0; layer <= a.layers; ++layer) {
    for (int phase = 0; phase < (layer < a.layers ? kFusedPhases : 1); ++phase) {
      if (phase == kAttendHistory) {
        attend_history<scalar_t>(a, shared.attention, layer, weight_of<float>(a, layer, kFreqs));
      } else if (phase == kAttendSource) {
        attend_source(
            a, shared.attention, layer, weight_of<scalar_t>(a, layer, kNullKey),
            weight_of<scalar_t>(a, layer, kNullValue));
      } else {
        multiply<ROWS>(a, shared.product, product_of<scalar_t>(a, layer, phase));
      }
      if (phase == kAddSource) {
        add_null_output(a, weight_of<scalar_t>(a, layer, kNullOutput));
      }
      if (layer < a.layers) {
        if (phase != kAttendHistory && phase != kAttendSource) {
          // the next matmul, past an attention where that is next
          const int next = phase == kProject || phase == kAskSource ? phase + 2 : phase + 1;
          fetch_ahead(product_of<scalar_t>(a, layer + next / kFusedPhases, next % kFusedPhases));
        }
        barrier.wait();
      }
    }
  }
  barrier.leave();
}

}  // namespace spear_fast
