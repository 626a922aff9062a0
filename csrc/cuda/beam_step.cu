// a step of beam search: a block an utterance, one launch a step
//
// A warp takes a hypothesis: its logits become log-probabilities, and of those each lane offers the best of its share
// in turn, until the warp has the hypothesis' best. The candidates of all hypotheses are ranked by counting, and one
// thread sorts them into pool and hypotheses by the logic that the CPU has too (csrc/select).
#include "../select/beam.h"
#include "../select/restrict.h"
#include "beam_step.h"
#include "selecting.h"

namespace spear_fast {

// ancestors that are moved at once
inline constexpr int kBytes = 8192;

// the first of a lane's share that comes after `last`, which came from it; any where nothing came from it yet
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
  fill_buffers(a, b);
  b.pool_scores = a.pool_scores;
  b.pool_beams = reinterpret_cast<int64_t*>(a.pool_beams);
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
  const float guidance = b.float_param(utterance, kGuidance), asked = b.float_param(utterance, kTemperature);
  const float temperature = asked > static_cast<float>(kColdest) ? asked : static_cast<float>(kColdest);
  const bool restricted = is_restricted<float>(b, utterance, steps);
  float* likely = a.values + utterance * 2 * a.beams * a.vocab;
  // the final candidates first, then those of each hypothesis
  Candidate<float>* candidates = static_cast<Candidate<float>*>(a.candidates) + utterance * (a.beams + 1) * 2 * a.beams;
  Candidate<float>* found = candidates + wanted;
  Next<float>* next = static_cast<Next<float>*>(a.next) + utterance * a.beams;

  for (int rank = thread; rank < wanted; rank += kSelectThreads) {
    // where the vocabulary has too few candidates
    candidates[rank] = {minus_infinity(), 0};
  }
  for (int beam = thread / kWarp; beam < size; beam += kSelectThreads / kWarp) {
    float* row = likely + static_cast<long long>(beam) * vocab;
    const Normaliser normaliser =
        fill_row(MixedLogits<scalar_t>(a, utterance, beam, guidance), temperature, vocab, row);
    for (int token = thread % kWarp; token < vocab; token += kWarp) {
      row[token] = (row[token] - normaliser.top) - normaliser.log_total;
    }
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
