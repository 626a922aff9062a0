// sampling after the values: which tokens are left, the draw, the end
#pragma once

#include "../philox.h"
#include "buffers.h"
#include "candidates.h"

namespace spear_fast {

// 53 bits in [0, 1) for a hypothesis' token of this step, whatever else is in the batch
SPEAR_FAST_HOST_DEVICE inline double uniform_number(int64_t seed, int64_t step, int beam) {
  const uint64_t key = static_cast<uint64_t>(seed);
  const Philox drawn = philox(
      static_cast<uint32_t>(step), static_cast<uint32_t>(beam), 0, 0, static_cast<uint32_t>(key),
      static_cast<uint32_t>(key >> 32));
  const uint64_t bits = (static_cast<uint64_t>(drawn.words[0] >> 5) << 26) + (drawn.words[1] >> 6);
  return static_cast<double>(bits) * (1.0 / 9007199254740992.0);
}

// the first of the tokens begin..end - 1 at which the cumulative weight exceeds `target`; where rounding passes over
// all of them the last with any weight; -1 where none has any
//
// before: the weight of the tokens before `begin`.
template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline int draw_token(const acc_t* weights, int begin, int end, double before, double target) {
  int last = -1;
  double sum = before;
  for (int token = begin; token < end; ++token) {
    if (weights[token] > 0) {
      last = token;
      sum += weights[token];
      if (sum > target) {
        break;
      }
    }
  }
  return last;
}

// appends a token to a hypothesis; for one thread. logprob: of the mixed logits, -inf where nothing may come.
template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline void append_token(
    const SampleBuffers<acc_t>& b, int64_t utterance, int beam, int64_t steps, int token, acc_t logprob) {
  const int64_t hypothesis = utterance * b.beams + beam, place = b.place(utterance, steps, beam);
  b.tokens[place] = token;
  b.parents[place] = static_cast<uint8_t>(beam);
  b.logprobs[place] = logprob;
  b.inputs[hypothesis] = token;
  if (steps >= b.prefix_of(utterance)) {
    b.scores[hypothesis] += logprob;
  }
  for (int half = 0; half < b.halves; ++half) {
    const int64_t row = (half * b.utterances + utterance) * b.beams + beam;
    b.lengths[row] = steps + 1;
    if (steps + 1 < b.capacity) {
      b.ancestors[row * b.capacity + steps + 1] = static_cast<uint8_t>(beam);
    }
  }
  const int eos = b.int_param(utterance, kEosId);
  // where logits are NaN, or nothing may come, nothing sensible can follow
  if ((eos >= 0 && token == eos) || !(logprob > minus_infinite<acc_t>())) {
    b.finished[hypothesis] = true;
  }
}

// whether each hypothesis of an utterance has ended or reached the limit
template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline bool all_ended(const SampleBuffers<acc_t>& b, int64_t utterance) {
  for (int beam = 0; beam < b.size_of(utterance); ++beam) {
    const int64_t hypothesis = utterance * b.beams + beam;
    if (!b.finished[hypothesis] && b.lengths[hypothesis] < b.int_param(utterance, kMaxLength)) {
      return false;
    }
  }
  return true;
}

}  // namespace spear_fast
