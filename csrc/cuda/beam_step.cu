// a step of beam search: a block an utterance, one launch a step
//
// A warp takes a hypothesis: its logits become log-probabilities, and of those each lane offers the best of its share in turn,
// until the warp has the hypothesis' best. The candidates of all hypotheses are ranked by counting, and one thread sorts them
// into pool and hypotheses by the logic that the CPU has too (csrc/select).
#include "../select/beam.h"
#include "../select/restrict.h"
#include "beam_step.h"
#include "device.h"

namespace spear_fast {

inline constexpr int kSelectThreads = 256;
// ancestors that are moved at once
inline constexpr int kBytes = 8192;

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
    const float other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = is_better(other, x) ? other : x;
  }
  return x;
}

__device__ inline Candidate<float> warp_best(Candidate<float> best) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Candidate<float> other = {
        __shfl_xor_sync(0xffffffffu, best.value, offset), __shfl_xor_sync(0xffffffffu, best.index, offset)};
    best = comes_before(other, best) ? other : best;
  }
  return best;
}

// row = log-probabilities of (null + (logits - null) * guidance) / temperature; for a warp, each lane its share
template <typename scalar_t>
__device__ inline void log_probabilities(
    const BeamStep& a, long long utterance, int beam, float guidance, float temperature, float* row) {
  const int lane = static_cast<int>(threadIdx.x % kWarp), vocab = static_cast<int>(a.vocab);
  const scalar_t* logits =
      static_cast<const scalar_t*>(a.logits) + utterance * a.logits_utterance + beam * a.logits_beam;
  const scalar_t* blind = static_cast<const scalar_t*>(a.null_logits);
  const bool mixes = blind != nullptr && guidance != 1;
  blind = mixes ? blind + utterance * a.null_utterance + beam * a.null_beam : nullptr;
  float top = minus_infinity();
  for (int token = lane; token < vocab; token += kWarp) {
    float value = widen(logits[token * a.logits_token]);
    if (mixes) {
      const float without = widen(blind[token * a.null_token]);
      value = without + (value - without) * guidance;
    }
    value = temperature != 1 ? value / temperature : value;
    row[token] = value;
    top = is_better(value, top) ? value : top;
  }
  top = warp_largest(top);
  float total = 0;
  for (int token = lane; token < vocab; token += kWarp) {
    total += expf(row[token] - top);
  }
  const float normaliser = logf(sum_lanes<kWarp>(total));
  for (int token = lane; token < vocab; token += kWarp) {
    row[token] = (row[token] - top) - normaliser;
  }
}

// the first of a lane's share that comes behind `last`, which came from it; any where nothing came from it yet
__device__ inline Candidate<float> next_of_lane(
    const float* row, int vocab, float score, int first, bool any, const Candidate<float>& last) {
  Candidate<float> best = no_candidate();
  for (int token = static_cast<int>(threadIdx.x % kWarp); token < vocab; token += kWarp) {
    const Candidate<float> one = {score + row[token], first + token};
    if ((any || comes_before(last, one)) && comes_before(one, best)) {
      best = one;
    }
  }
  return best;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kSelectThreads, 2) beam_step(BeamStep a) {
  __shared__ uint8_t s_bytes[kBytes];
  __shared__ int s_over;
  BeamBuffers<float> b;
  b.utterances = a.utterances;
  b.capacity = a.capacity;
  b.beams = static_cast<int>(a.beams);
  b.vocab = static_cast<int>(a.vocab);
  b.halves = static_cast<int>(a.halves);
  b.prefix_width = static_cast<int>(a.prefix_width);
  b.real = a.real_settings;
  b.whole = a.whole_settings;
  b.prefix = a.prefix;
  b.inputs = reinterpret_cast<int64_t*>(a.inputs);
  b.scores = a.scores;
  b.lengths = reinterpret_cast<int64_t*>(a.lengths);
  b.ancestors = a.ancestors;
  b.tokens = a.tokens;
  b.parents = a.parents;
  b.logprobs = a.logprobs;
  b.done = a.done;
  b.pool_scores = a.pool_scores;
  b.pool_slots = reinterpret_cast<int64_t*>(a.pool_slots);
  b.pool_ends = reinterpret_cast<int64_t*>(a.pool_ends);
  b.pool_finished = a.pool_finished;
  b.pool_last_logprobs = a.pool_last_logprobs;
  b.ended = reinterpret_cast<int64_t*>(a.ended);

  const long long utterance = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), vocab = b.vocab;
  const long long steps = b.lengths[utterance * b.beams];
  if (!is_live<float>(b, utterance, kBeam) || !has_room<float>(b, steps)) {
    return;
  }
  const int size = b.size_of(utterance), wanted = 2 * size;
  const float guidance = b.real_of(utterance, kGuidance), asked = b.real_of(utterance, kTemperature);
  const float temperature = asked > static_cast<float>(kColdest) ? asked : static_cast<float>(kColdest);
  const bool restricted = is_restricted<float>(b, utterance, steps);
  float* likely = a.values + utterance * 2 * a.beams * a.vocab;
  // the final candidates first, then those of each hypothesis
  Candidate<float>* candidates =
      static_cast<Candidate<float>*>(a.candidates) + utterance * (a.beams + 1) * 2 * a.beams;
  Candidate<float>* found = candidates + wanted;
  Next<float>* next = static_cast<Next<float>*>(a.next) + utterance * a.beams;

  for (int rank = thread; rank < wanted; rank += kSelectThreads) {
    // where the vocabulary has too few candidates
    candidates[rank] = {minus_infinity(), 0};
  }
  for (int beam = thread / kWarp; beam < size; beam += kSelectThreads / kWarp) {
    float* row = likely + static_cast<long long>(beam) * vocab;
    log_probabilities<scalar_t>(a, utterance, beam, guidance, temperature, row);
    __syncwarp();
    if (restricted) {
      float* ranked = row + a.beams * a.vocab;
      restrict_values<WarpGroup, float>(WarpGroup(), b, utterance, beam, steps, true, row, ranked);
      row = ranked;
    }
    const float score = b.scores[utterance * b.beams + beam];
    const int first = beam * vocab;
    Candidate<float> mine = next_of_lane(row, vocab, score, first, true, no_candidate());
    for (int rank = 0; rank < wanted; ++rank) {
      const Candidate<float> best = warp_best(mine);
      if (thread % kWarp == 0) {
        found[beam * wanted + rank] = best;
      }
      if (mine.index == best.index && best.index != no_candidate().index) {
        mine = next_of_lane(row, vocab, score, first, false, best);
      }
    }
  }
  __syncthreads();

  // a candidate's rank is the number of those that come before it
  for (int i = thread; i < size * wanted; i += kSelectThreads) {
    const Candidate<float> one = found[i];
    int rank = one.index == no_candidate().index ? wanted : 0;
    for (int j = 0; j < size * wanted && rank < wanted; ++j) {
      rank += comes_before(found[j], one) ? 1 : 0;
    }
    if (rank < wanted) {
      candidates[rank] = one;
    }
  }
  __syncthreads();
  if (thread == 0) {
    s_over = sort_out<float>(b, utterance, steps, candidates, likely, next) ? 1 : 0;
  }
  __syncthreads();
  move_on<BlockGroup, float>(BlockGroup(), b, utterance, steps, next, s_over != 0, s_bytes, kBytes / size);
}

}  // namespace spear_fast
