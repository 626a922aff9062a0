// a step of beam search: a block an utterance, one launch a step, its scratch in shared memory
//
// What the block waits for it asks for at once: first what is known of the search, then a hypothesis' logits by a warp
// each, beside which its row of the ancestor table arrives. The best candidates are found without sorting: each lane
// puts its best one forward; what is no worse than the last of as many of them as are wanted is little, and is ranked
// by counting. A thread then takes each into pool and hypotheses by the logic that the CPU has in a loop (csrc/select).
#include "../select/beam.h"
#include "../select/restrict.h"
#include "beam_candidates.h"
#include "beam_memory.h"
#include "beam_step.h"
#include "selecting.h"

namespace spear_fast {

// the buffers as they are for one utterance, which is then number 0
__device__ inline void move_to(BeamBuffers<float>& b, long long utterance) {
  const long long rows = utterance * b.beams, history = rows * b.capacity;
  b.prefix += utterance * b.prefix_width;
  b.inputs += rows;
  b.scores += rows;
  b.lengths += rows;
  b.ancestors += history;
  b.tokens += history;
  b.parents += history;
  b.logprobs += history;
  b.pool_scores += rows;
  b.pool_beams += rows;
  b.pool_ends += rows;
  b.pool_finished += rows;
  b.pool_last_logprobs += rows;
  b.ended += utterance;
  b.done += utterance;
}

// fills m.next, and of what may enter the pool m.ends and m.pool; for the block, as `sort_out` does it
__device__ inline void sort_candidates(
    BeamMemory& m, const BeamBuffers<float>& b, const float* likely, const float* ranked, int size, float divisor) {
  const int thread = static_cast<int>(threadIdx.x), wanted = 2 * size, eos = b.int_param(0, kEosId);
  for (int rank = thread; rank < wanted; rank += kSelectThreads) {
    const int index = m.best[rank], origin = index < 0 ? 0 : index / b.vocab;
    const float value = index < 0 ? minus_infinity() : m.scores[origin] + ranked[index];
    const int token = index < 0 ? 0 : index - origin * b.vocab;
    const bool ends = eos >= 0 && token == eos, enters = ends && rank < size && value != minus_infinity();
    m.ends[rank] = enters ? kEnters : ends ? kEnds : kGoesOn;
    if (enters) {
      m.pool[kMostBeams + rank] = order_of(value / divisor);
    }
  }
  __syncthreads();
  for (int rank = thread; rank < wanted; rank += kSelectThreads) {
    int going = 0, going_before = 0;
    for (int other = 0; other < wanted; ++other) {
      const int goes = m.ends[other] == kGoesOn ? 1 : 0;
      going += goes;
      going_before += other < rank ? goes : 0;
    }
    const bool ends = m.ends[rank] != kGoesOn;
    // where too few go on, those that ended fill the beam, without a chance
    const int place = ends ? going + rank - going_before : going_before;
    if (place < size) {
      const int index = m.best[rank] < 0 ? 0 : m.best[rank], origin = index / b.vocab;
      const float value = m.best[rank] < 0 || ends ? minus_infinity() : m.scores[origin] + ranked[index];
      m.next[place] = {value, likely[index], origin, index - origin * b.vocab};
    }
  }
  __syncthreads();
}

// where an entry comes in the pool: the number of entries that are better, or as good and earlier
//
// order: of its score. kind: 0 was there before, 1 ended now, 2 reached the limit; position: among those of its kind.
__device__ inline int pool_place(const BeamMemory& m, int size, bool limit, unsigned order, int kind, int position) {
  int place = 0;
  for (int i = 0; i < size; ++i) {
    // of as good ones, those of an earlier kind come before, and of the same kind those before the position
    const auto comes_before = [&](int its_kind) {
      const unsigned its = m.pool[its_kind * kMostBeams + i];
      return its > order || (its == order && (its_kind < kind || (its_kind == kind && i < position)));
    };
    place += comes_before(0) ? 1 : 0;
    place += m.ends[i] == kEnters && comes_before(1) ? 1 : 0;
    place += limit && m.next[i].score != minus_infinity() && comes_before(2) ? 1 : 0;
  }
  return place;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kSelectThreads, 3) beam_step(BeamStep a) {
  __shared__ BeamMemory m;
  BeamBuffers<float> b;
  fill_buffers(a, b);
  b.pool_scores = a.pool_scores;
  b.pool_beams = reinterpret_cast<int64_t*>(a.pool_beams);
  b.pool_ends = reinterpret_cast<int64_t*>(a.pool_ends);
  b.pool_finished = a.pool_finished;
  b.pool_last_logprobs = a.pool_last_logprobs;
  b.ended = reinterpret_cast<int64_t*>(a.ended);
  const long long utterance = blockIdx.x;
  move_to(b, utterance);

  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp, vocab = b.vocab;
  // all of it asked for before any of it is waited for
  const float float_param = thread < kFloatParams ? a.float_params[utterance * kFloatParams + thread] : 0.0f;
  const int int_param = thread < kIntParams ? a.int_params[utterance * kIntParams + thread] : 0;
  const float score = thread < b.beams ? b.scores[thread] : 0.0f;
  const float pool_score = thread < b.beams ? b.pool_scores[thread] : 0.0f;
  const long long steps = b.lengths[0], ended = b.ended[0];
  const bool done = b.done[0];
  if (thread == 0) {
    m.ended = ended;
    m.count = 0;
    m.least = 0;
  }
  if (thread < kFloatParams) {
    m.float_params[thread] = float_param;
  }
  if (thread < kIntParams) {
    m.int_params[thread] = int_param;
  }
  if (thread < b.beams) {
    m.scores[thread] = score;
    m.pool[thread] = order_of(pool_score);
  }
  b.float_params = m.float_params;
  b.int_params = m.int_params;
  __syncthreads();
  if (done || b.int_param(0, kMethod) != kBeam || !has_room<float>(b, steps)) {
    return;
  }

  const int size = b.size_of(0);
  const float guidance = b.float_param(0, kGuidance), asked = b.float_param(0, kTemperature);
  const float temperature = asked > static_cast<float>(kColdest) ? asked : static_cast<float>(kColdest);
  const bool restricted = is_restricted<float>(b, 0, steps), held = fits(size, vocab);
  float* scratch = a.values + utterance * 2 * a.beams * a.vocab;
  float* ranked = held ? m.values : restricted ? scratch + a.beams * a.vocab : scratch;
  float* likely = restricted ? scratch : ranked;
  const AncestorRows rows(b, size, steps);
  for (int beam = warp; beam < size; beam += kSelectThreads / kWarp) {
    if (rows.held) {
      rows.fetch(m, b, beam);
    }
    float* row = likely + static_cast<long long>(beam) * vocab;
    const Normaliser normaliser =
        fill_row(MixedLogits<scalar_t>(a, utterance, beam, guidance), temperature, vocab, row);
    const float before = m.scores[beam];
    BestValue best;
    for (int token = lane; token < vocab; token += kWarp) {
      row[token] = (row[token] - normaliser.top) - normaliser.log_total;
      best.see(before + row[token]);
    }
    __syncwarp();
    if (restricted) {
      float* restrained = ranked + static_cast<long long>(beam) * vocab;
      restrict_values<WarpGroup, float>(WarpGroup(), b, 0, beam, steps, true, row, restrained);
      best = {};
      for (int token = lane; token < vocab; token += kWarp) {
        best.see(before + restrained[token]);
      }
    }
    if (size <= kFewBeams) {
      put_forward(m, size, beam, best.order());
    }
  }
  wait_for_copies();
  __syncthreads();
  if (size <= kFewBeams) {
    find_least(m, size);
  }
  choose(m, ranked, size, vocab);
  // asked for here, waited for where something enters the pool
  PoolEntry entry = {};
  if (thread < size) {
    entry = {
        b.pool_scores[thread], b.pool_last_logprobs[thread], static_cast<int>(b.pool_beams[thread]),
        static_cast<int>(b.pool_ends[thread]), b.pool_finished[thread]};
  }
  const float divisor = length_divisor<float>(b, 0, steps + 1);
  sort_candidates(m, b, likely, ranked, size, divisor);

  const bool limit = steps + 1 >= b.int_param(0, kMaxLength);
  const bool reached = limit && thread < size && m.next[thread].score != minus_infinity();
  if (reached) {
    m.pool[2 * kMostBeams + thread] = order_of(m.next[thread].score / divisor);
  }
  __syncthreads();
  int entered = 0;
  for (int i = 0; i < size; ++i) {
    entered += m.ends[i] == kEnters ? 1 : 0;
    entered += limit && m.next[i].score != minus_infinity() ? 1 : 0;
  }
  const int step = static_cast<int>(steps);
  if (entered > 0 && thread < size) {
    put(m, b, size, pool_place(m, size, limit, m.pool[thread], 0, thread), entry);
    if (m.ends[thread] == kEnters) {
      const int index = m.best[thread], origin = index / vocab;
      const PoolEntry own = {(m.scores[origin] + ranked[index]) / divisor, likely[index], origin, step, true};
      put(m, b, size, pool_place(m, size, limit, m.pool[kMostBeams + thread], 1, thread), own);
    }
    if (reached) {
      const PoolEntry own = {m.next[thread].score / divisor, 0.0f, thread, step + 1, false};
      put(m, b, size, pool_place(m, size, limit, m.pool[2 * kMostBeams + thread], 2, thread), own);
    }
  } else if (thread == size - 1) {
    m.worst = entry.score;
  }
  __syncthreads();
  bool over = limit;
  if (thread == 0) {
    b.ended[0] = m.ended + entered;
    over = limit || cannot_improve<float>(b, 0, m.next[0].score, steps + 1, m.ended + entered, m.worst);
  }
  if (rows.held) {
    rows.store(m, b);
  } else {
    // the values have been read
    auto* bytes = reinterpret_cast<uint8_t*>(m.values);
    move_ancestors<BlockGroup, float>(BlockGroup(), b, 0, steps, m.next, bytes, sizeof(m.values) / size);
  }
  write_next<BlockGroup, float>(BlockGroup(), b, 0, steps, m.next, over);
}

}  // namespace spear_fast
