// penalties and bans: what a hypothesis' own history, the prefix and the shortest length make of its next token's
// values
#pragma once

#include "buffers.h"

namespace spear_fast {

// a hypothesis' own token of step i, -1 where the table leads out of the beam
//
// It was the input of position i + 1, at whose beam index it stands; the newest one's is the hypothesis' own.
template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline int own_token(
    const Buffers<acc_t>& b, int64_t utterance, int beam, int64_t step, int64_t steps, bool moves) {
  int origin = beam;
  if (moves && step + 1 < steps) {
    origin = b.ancestors[(utterance * b.beams + beam) * b.capacity + step + 1];
  }
  return origin < b.beams ? b.tokens[b.place(utterance, step, origin)] : -1;
}

template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline bool is_restricted(const Buffers<acc_t>& b, int64_t utterance, int64_t steps) {
  return b.float_param(utterance, kRepetitionPenalty) != 1 || b.int_param(utterance, kNoRepeatNgramSize) > 0 ||
      (b.int_param(utterance, kEosId) >= 0 && steps < b.int_param(utterance, kMinLength)) ||
      steps < b.prefix_of(utterance);
}

// whether the n-gram that ended at step i began as the one which ends next
template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline bool is_repeated(
    const Buffers<acc_t>& b, int64_t utterance, int beam, int64_t i, int64_t steps, int size, bool moves) {
  for (int back = 1; back < size; ++back) {
    if (own_token(b, utterance, beam, i - back, steps, moves) !=
        own_token(b, utterance, beam, steps - back, steps, moves)) {
      return false;
    }
  }
  return true;
}

// target[token] = source[token] with the penalty, or -inf where the token must not come; both `[vocabulary]`
//
// All threads of the group call it; `source` must be complete, `target` is when it returns. moves: hypotheses may have
// changed their beam indices, so that the ancestor table is followed.
template <typename Group, typename acc_t>
SPEAR_FAST_HOST_DEVICE inline void restrict_values(
    const Group& group, const Buffers<acc_t>& b, int64_t utterance, int beam, int64_t steps, bool moves,
    const acc_t* source, acc_t* target) {
  const acc_t nothing = minus_infinite<acc_t>();
  if (steps < b.prefix_of(utterance)) {
    // the given token costs nothing: all hypotheses have it
    const int wanted = b.prefix[utterance * b.prefix_width + steps];
    for (int token = group.thread(); token < b.vocab; token += group.threads()) {
      target[token] = token == wanted ? acc_t(0) : nothing;
    }
    group.sync();
    return;
  }
  for (int token = group.thread(); token < b.vocab; token += group.threads()) {
    target[token] = source[token];
  }
  group.sync();
  const acc_t penalty = b.float_param(utterance, kRepetitionPenalty);
  if (penalty != 1) {
    // from the source, so that a token which came often is penalised once
    for (int64_t i = group.thread(); i < steps; i += group.threads()) {
      const int token = own_token(b, utterance, beam, i, steps, moves);
      if (token >= 0 && token < b.vocab) {
        target[token] = source[token] < 0 ? source[token] * penalty : source[token] / penalty;
      }
    }
    group.sync();
  }
  const int size = b.int_param(utterance, kNoRepeatNgramSize);
  if (size > 0) {
    for (int64_t i = size - 1 + group.thread(); i < steps; i += group.threads()) {
      const int token = own_token(b, utterance, beam, i, steps, moves);
      if (token >= 0 && token < b.vocab && is_repeated(b, utterance, beam, i, steps, size, moves)) {
        target[token] = nothing;
      }
    }
  }
  const int eos = b.int_param(utterance, kEosId);
  if (group.thread() == 0 && eos >= 0 && eos < b.vocab && steps < b.int_param(utterance, kMinLength)) {
    target[eos] = nothing;
  }
  group.sync();
}

}  // namespace spear_fast
