// a step of sampling: a block an utterance, one launch a step
//
// A warp takes a hypothesis. What top-k and top-p leave is found without sorting: the bits of the least value that
// stays are guessed from the top, each guess a sum over the vocabulary. For the draw each lane takes neighbouring
// tokens, and the lane in whose share the draw falls looks for the token. The CPU takes the same uniform number and the
// same order (csrc/select).
#include "../select/restrict.h"
#include "../select/sample.h"
#include "sample_step.h"
#include "selecting.h"

namespace spear_fast {

// what a token counts for: one, or its weight
__device__ inline int count_of(int, float) { return 1; }
__device__ inline double count_of(double, float weight) { return weight; }

// the count of all tokens whose value is beyond one
template <typename count_t>
__device__ inline count_t count_above(const float* values, const float* weights, int vocab, unsigned order) {
  count_t count = 0;
  for (int token = static_cast<int>(threadIdx.x % kWarp); token < vocab; token += kWarp) {
    count += order_of(values[token]) > order ? count_of(count_t(), weights[token]) : count_t(0);
  }
  return sum_lanes<kWarp>(count);
}

// the first of the best tokens keep their weights, the others get zero: those before one must count for less than
// `limit`
//
// Equals come in the order of their ids. top: the largest value. For a warp, each lane its share.
template <typename count_t>
__device__ inline void keep_first(const float* values, float* weights, int vocab, float top, count_t limit) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  unsigned least = 0, most = order_of(top);
  while (least < most) {
    const unsigned middle = least + (most - least) / 2;
    if (count_above<count_t>(values, weights, vocab, middle) < limit) {
      most = middle;
    } else {
      least = middle + 1;
    }
  }
  const count_t above = count_above<count_t>(values, weights, vocab, least);
  int equals = 0;
  for (int first = 0; first < vocab; first += kWarp) {
    const int token = first + lane;
    const unsigned order = token < vocab ? order_of(values[token]) : 0;
    const unsigned votes = __ballot_sync(kAllLanes, token < vocab && order == least);
    const int before = equals + __popc(votes & ((1u << lane) - 1));
    equals += __popc(votes);
    if (token < vocab &&
        (order < least || (order == least && above + before * count_of(count_t(), weights[token]) >= limit))) {
      weights[token] = 0;
    }
  }
}

// the token in whose weight that share of the total falls, -1 where the total is not positive; for a warp
__device__ inline int warp_draw(const float* weights, int vocab, double uniform) {
  const int lane = static_cast<int>(threadIdx.x % kWarp), share = (vocab + kWarp - 1) / kWarp;
  const int begin = lane * share < vocab ? lane * share : vocab;
  const int end = begin + share < vocab ? begin + share : vocab;
  double mine = 0;
  for (int token = begin; token < end; ++token) {
    mine += weights[token];
  }
  double through = mine;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const double other = __shfl_sync(kAllLanes, through, (lane - offset) & (kWarp - 1));
    through += lane >= offset ? other : 0;
  }
  const double total = __shfl_sync(kAllLanes, through, kWarp - 1);
  const double others = __shfl_sync(kAllLanes, through, (lane - 1) & (kWarp - 1));
  if (!(total > 0)) {
    return -1;
  }
  const double target = uniform * total;
  const unsigned holders = __ballot_sync(kAllLanes, mine > 0);
  const unsigned beyond = __ballot_sync(kAllLanes, mine > 0 && through > target);
  // the first, or where rounding passes over all of them the last
  const int chosen = beyond ? __ffs(static_cast<int>(beyond)) - 1 : kWarp - 1 - __clz(static_cast<int>(holders));
  const int token = lane == chosen ? draw_token(weights, begin, end, lane > 0 ? others : 0.0, target) : -1;
  return __shfl_sync(kAllLanes, token, chosen);
}

// a draw from the values at a temperature by top-k and top-p, -1 where their weights have no sum; for a warp
//
// values: overwritten. best: the largest of `allowed`, which become weights.
__device__ inline int draw_allowed(
    const SampleBuffers<float>& b, long long utterance, int beam, long long steps, float best, float* values,
    float* allowed) {
  const float temperature = b.float_param(utterance, kTemperature), top_p = b.float_param(utterance, kTopP);
  const int vocab = b.vocab, top_k = b.int_param(utterance, kTopK);
  const float top = temperature != 1 ? best / temperature : best;
  for (int token = static_cast<int>(threadIdx.x % kWarp); token < vocab; token += kWarp) {
    values[token] = temperature != 1 ? allowed[token] / temperature : allowed[token];
    allowed[token] = expf(values[token] - top);
  }
  if (top_k > 0 && top_k < vocab) {
    keep_first<int>(values, allowed, vocab, top, top_k);
  }
  if (top_p < 1) {
    double total = 0;
    for (int token = static_cast<int>(threadIdx.x % kWarp); token < vocab; token += kWarp) {
      total += allowed[token];
    }
    const double limit = top_p * sum_lanes<kWarp>(total);
    // the first always stays, whose weight is 1
    keep_first<double>(values, allowed, vocab, top, limit > 0 ? limit : 0.5);
  }
  // until here each lane had its own share
  __syncwarp();
  return warp_draw(allowed, vocab, uniform_number(b.seeds[utterance], steps, beam));
}

template <typename scalar_t>
__device__ inline void sample_hypothesis(
    const SampleStep& a, const SampleBuffers<float>& b, long long utterance, int beam, long long steps) {
  const int lane = static_cast<int>(threadIdx.x % kWarp), vocab = b.vocab;
  float* values = a.values + (utterance * a.beams + beam) * 2 * a.vocab;
  float* allowed = values + vocab;
  const MixedLogits<scalar_t> mixed(a, utterance, beam, b.float_param(utterance, kGuidance));
  const Normaliser normaliser = fill_row(mixed, 1, vocab, values);
  if (a.filtered != nullptr) {
    const scalar_t* filtered =
        static_cast<const scalar_t*>(a.filtered) + utterance * a.filtered_utterance + beam * a.filtered_beam;
    for (int token = lane; token < vocab; token += kWarp) {
      values[token] = widen(filtered[token * a.filtered_token]);
    }
  }
  __syncwarp();
  restrict_values<WarpGroup, float>(WarpGroup(), b, utterance, beam, steps, false, values, allowed);
  Candidate<float> best = no_candidate();
  for (int token = lane; token < vocab; token += kWarp) {
    const Candidate<float> one = {allowed[token], token};
    best = comes_before(one, best) ? one : best;
  }
  best = warp_best(best);
  int token = best.index;
  const bool nothing_left = best.value == minus_infinity();
  if (b.float_param(utterance, kTemperature) > static_cast<float>(kColdest) && !nothing_left) {
    const int drawn = draw_allowed(b, utterance, beam, steps, best.value, values, allowed);
    token = drawn < 0 ? token : drawn;
  }
  if (lane == 0) {
    const float logprob = (mixed(token) - normaliser.top) - normaliser.log_total;
    append_token<float>(b, utterance, beam, steps, token, nothing_left ? minus_infinity() : logprob);
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kSelectThreads, 2) sample_step(SampleStep a) {
  SampleBuffers<float> b;
  fill_buffers(a, b);
  b.seeds = reinterpret_cast<const int64_t*>(a.seeds);
  b.finished = a.finished;
  const long long utterance = blockIdx.x;
  if (!is_live<float>(b, utterance, kSample)) {
    return;
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int beam = warp; beam < b.size_of(utterance); beam += kSelectThreads / kWarp) {
    const long long steps = b.lengths[utterance * b.beams + beam];
    const bool goes_on = !b.finished[utterance * b.beams + beam] && has_room<float>(b, steps);
    if (goes_on) {
      sample_hypothesis<scalar_t>(a, b, utterance, beam, steps);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    b.done[utterance] = all_ended<float>(b, utterance);
  }
}

}  // namespace spear_fast
