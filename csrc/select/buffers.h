// raw pointers to what a selection op reads and writes; shapes and meaning: spear_fast/ops/selection.py
//
// All buffers are contiguous. `halves` is 2 where `lengths` and `ancestors` have a second half for guidance.
#pragma once

#include "params.h"
#include "portable.h"

namespace spear_fast {

template <typename acc_t>
struct Buffers {
  int64_t utterances, capacity;
  int beams, vocab, halves, prefix_width;
  const acc_t* float_params;
  const int32_t* int_params;
  const int32_t* prefix;
  int64_t* inputs;
  acc_t* scores;
  int64_t* lengths;
  uint8_t* ancestors;
  int32_t* tokens;
  uint8_t* parents;
  acc_t* logprobs;
  bool* done;

  SPEAR_FAST_HOST_DEVICE acc_t float_param(int64_t utterance, FloatParam which) const {
    return float_params[utterance * kFloatParams + which];
  }
  SPEAR_FAST_HOST_DEVICE int int_param(int64_t utterance, IntParam which) const {
    return int_params[utterance * kIntParams + which];
  }
  // hypotheses in use; settings out of range must not lead out of the buffers
  SPEAR_FAST_HOST_DEVICE int size_of(int64_t utterance) const {
    const int size = int_param(utterance, kBeamSize);
    return size < 1 ? 1 : size > beams ? beams : size;
  }
  SPEAR_FAST_HOST_DEVICE int prefix_of(int64_t utterance) const {
    const int length = int_param(utterance, kPrefixLength);
    return length < prefix_width ? length : prefix_width;
  }
  SPEAR_FAST_HOST_DEVICE int64_t place(int64_t utterance, int64_t step, int beam) const {
    return (utterance * capacity + step) * beams + beam;
  }
};

template <typename acc_t>
struct BeamBuffers : Buffers<acc_t> {
  acc_t* pool_scores;
  int64_t* pool_beams;
  int64_t* pool_ends;
  bool* pool_finished;
  acc_t* pool_last_logprobs;
  int64_t* ended;
};

template <typename acc_t>
struct SampleBuffers : Buffers<acc_t> {
  const int64_t* seeds;
  bool* finished;
};

// whether an utterance is for this method, goes on, and has room for another token
template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline bool is_live(const Buffers<acc_t>& b, int64_t utterance, SelectionMethod method) {
  return !b.done[utterance] && b.int_param(utterance, kMethod) == method;
}

template <typename acc_t>
SPEAR_FAST_HOST_DEVICE inline bool has_room(const Buffers<acc_t>& b, int64_t steps) {
  return steps >= 0 && steps < b.capacity;
}

}  // namespace spear_fast
