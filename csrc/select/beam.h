// beam search after the choice of candidates: the pool, the hypotheses that go on, ancestors, the end
#pragma once

#include "buffers.h"
#include "candidates.h"

namespace spear_fast {

// a hypothesis that goes on
template <typename acc_t>
struct Next {
  acc_t score, logprob;
  int origin, token;
};

// what divides a score of a hypothesis of `length` tokens; those of the prefix do not count
template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline acc_t length_divisor(const Buffers<acc_t>& b, int64_t utterance, int64_t length) {
  const int64_t counted = length - b.prefix_of(utterance);
  return power(acc_t(counted < 1 ? 1 : counted), b.float_param(utterance, kLengthPenalty));
}

// puts a hypothesis after all that are at least as good; drops the last one
template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline void enter_pool(
    const BeamBuffers<acc_t>& b, int64_t utterance, acc_t score, int64_t beam, int64_t end, bool finished,
    acc_t last_logprob) {
  const int64_t first = utterance * b.beams, size = b.size_of(utterance);
  ++b.ended[utterance];
  if (!is_better(score, b.pool_scores[first + size - 1])) {
    return;
  }
  int64_t place = first + size - 1;
  for (; place > first && is_better(score, b.pool_scores[place - 1]); --place) {
    b.pool_scores[place] = b.pool_scores[place - 1];
    b.pool_beams[place] = b.pool_beams[place - 1];
    b.pool_ends[place] = b.pool_ends[place - 1];
    b.pool_finished[place] = b.pool_finished[place - 1];
    b.pool_last_logprobs[place] = b.pool_last_logprobs[place - 1];
  }
  b.pool_scores[place] = score;
  b.pool_beams[place] = beam;
  b.pool_ends[place] = end;
  b.pool_finished[place] = finished;
  b.pool_last_logprobs[place] = last_logprob;
}

// whether enough have ended and, by early stopping, no other will still enter the pool
//
// best: the score of the best that goes on. ended: how many have ended. worst: the last score in the pool.
template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline bool cannot_improve(
    const Buffers<acc_t>& b, int64_t utterance, acc_t best, int64_t length, int64_t ended, acc_t worst) {
  // true of NaN too
  if (!(best > minus_infinite<acc_t>())) {
    return true;
  }
  const int64_t size = b.size_of(utterance);
  const acc_t patient = acc_t(size) * b.float_param(utterance, kPatience) + acc_t(0.5);
  int64_t enough = static_cast<int64_t>(patient < 1 ? acc_t(1) : patient > acc_t(1 << 30) ? acc_t(1 << 30) : patient);
  if (ended < enough) {
    return false;
  }
  const int mode = b.int_param(utterance, kEarlyStopping);
  if (mode == kAtOnce) {
    return true;
  }
  // sums are negative: where the penalty is positive, the longest hypothesis divides by most
  const bool longest = mode == kNever && b.float_param(utterance, kLengthPenalty) > 0;
  const acc_t divisor = length_divisor(b, utterance, longest ? b.int_param(utterance, kMaxLength) : length);
  return best / divisor <= worst;
}

// sorts the best 2 * size candidates into pool and `next`; for one thread
//
// likely: `[beams, vocabulary]`, log-probabilities without penalties. Returns whether the search is over.
template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline bool sort_out(
    const BeamBuffers<acc_t>& b, int64_t utterance, int64_t steps, const Candidate<acc_t>* candidates,
    const acc_t* likely, Next<acc_t>* next) {
  const int size = b.size_of(utterance), eos = b.int_param(utterance, kEosId);
  const acc_t nothing = minus_infinite<acc_t>();
  const acc_t divisor = length_divisor(b, utterance, steps + 1);
  int going = 0;
  for (int rank = 0; rank < 2 * size; ++rank) {
    const Candidate<acc_t> one = candidates[rank];
    const int origin = one.index / b.vocab, token = one.index % b.vocab;
    if (eos < 0 || token != eos) {
      if (going < size) {
        next[going++] = {one.value, likely[one.index], origin, token};
      }
    } else if (rank < size && one.value != nothing) {
      enter_pool<acc_t>(b, utterance, one.value / divisor, origin, steps, true, likely[one.index]);
    }
  }
  // too few go on: those that ended fill the beam, without a chance
  for (int rank = 0; rank < 2 * size && going < size; ++rank) {
    const int index = candidates[rank].index;
    if (eos >= 0 && index % b.vocab == eos) {
      next[going++] = {nothing, likely[index], index / b.vocab, eos};
    }
  }
  const bool limit = steps + 1 >= b.int_param(utterance, kMaxLength);
  if (limit) {
    for (int beam = 0; beam < size; ++beam) {
      if (next[beam].score != nothing) {
        enter_pool<acc_t>(b, utterance, next[beam].score / divisor, beam, steps + 1, false, acc_t(0));
      }
    }
  }
  const acc_t worst = b.pool_scores[utterance * b.beams + size - 1];
  return limit || cannot_improve(b, utterance, next[0].score, steps + 1, b.ended[utterance], worst);
}

// gives each hypothesis the ancestors of its origin; all threads of the group call it
//
// bytes: scratch of `beams * width`, at most 2^31, shared by the group.
template <typename Group, typename acc_t>
SPEAR_FAST_HOST_DEVICE inline void move_ancestors(
    const Group& group, const Buffers<acc_t>& b, int64_t utterance, int64_t steps, const Next<acc_t>* next,
    uint8_t* bytes, int64_t width) {
  const int size = b.size_of(utterance);
  for (int half = 0; half < b.halves; ++half) {
    uint8_t* table = b.ancestors + (half * b.utterances + utterance) * b.beams * b.capacity;
    for (int64_t begin = 0; begin < steps; begin += width) {
      // a division of 32 bits takes a device a fifth of one of 64
      const int count = static_cast<int>(steps - begin < width ? steps - begin : width);
      for (int i = group.thread(); i < size * count; i += group.threads()) {
        bytes[i] = table[next[i / count].origin * b.capacity + begin + i % count];
      }
      group.sync();
      for (int i = group.thread(); i < size * count; i += group.threads()) {
        table[i / count * b.capacity + begin + i % count] = bytes[i];
      }
      group.sync();
    }
  }
}

// writes the hypotheses that go on, but for the ancestors before this step; all threads of the group call it
//
// over: whether the search is.
template <typename Group, typename acc_t>
SPEAR_FAST_HOST_DEVICE inline void write_next(
    const Group& group, const Buffers<acc_t>& b, int64_t utterance, int64_t steps, const Next<acc_t>* next, bool over) {
  const int size = b.size_of(utterance);
  for (int half = 0; half < b.halves; ++half) {
    uint8_t* table = b.ancestors + (half * b.utterances + utterance) * b.beams * b.capacity;
    for (int beam = group.thread(); beam < size; beam += group.threads()) {
      // the newest input of each origin stands at its own beam index, the next one at the hypothesis' own
      table[beam * b.capacity + steps] = static_cast<uint8_t>(next[beam].origin);
      if (steps + 1 < b.capacity) {
        table[beam * b.capacity + steps + 1] = static_cast<uint8_t>(beam);
      }
      b.lengths[(half * b.utterances + utterance) * b.beams + beam] = steps + 1;
    }
  }
  for (int beam = group.thread(); beam < size; beam += group.threads()) {
    const int64_t hypothesis = utterance * b.beams + beam, place = b.place(utterance, steps, beam);
    b.tokens[place] = next[beam].token;
    b.parents[place] = static_cast<uint8_t>(next[beam].origin);
    b.logprobs[place] = next[beam].logprob;
    b.inputs[hypothesis] = next[beam].token;
    b.scores[hypothesis] = next[beam].score;
  }
  if (group.thread() == 0 && over) {
    b.done[utterance] = true;
  }
}

}  // namespace spear_fast
