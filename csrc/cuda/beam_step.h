// what the kernel of beam_step.cu takes
#pragma once

namespace spear_fast {

// all fields take eight bytes, as in SelfAttention; the buffers are those of csrc/select/buffers.h
struct BeamStep {
  const void* logits;
  const void* null_logits;
  const float* float_params;
  const int* int_params;
  const int* prefix;
  long long* inputs;
  float* scores;
  long long* lengths;
  unsigned char* ancestors;
  int* tokens;
  unsigned char* parents;
  float* logprobs;
  float* pool_scores;
  long long* pool_beams;
  long long* pool_ends;
  bool* pool_finished;
  float* pool_last_logprobs;
  long long* ended;
  bool* done;
  // memory for 2 * beams * vocabulary values of an utterance, where a block's own has no room for them
  float* values;
  long long utterances, beams, vocab, capacity, halves, prefix_width;
  long long logits_utterance, logits_beam, logits_token, null_utterance, null_beam, null_token;
};

}  // namespace spear_fast
