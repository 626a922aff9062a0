// what the kernel of sample_step.cu takes
#pragma once

namespace spear_fast {

// all fields take eight bytes, as in SelfAttention; the buffers are those of csrc/select/buffers.h
struct SampleStep {
  const void* logits;
  const void* null_logits;
  const void* filtered;
  const float* float_params;
  const int* int_params;
  const int* prefix;
  const long long* seeds;
  long long* inputs;
  float* scores;
  long long* lengths;
  unsigned char* ancestors;
  int* tokens;
  unsigned char* parents;
  float* logprobs;
  bool* finished;
  bool* done;
  // memory for a hypothesis each, 2 * vocabulary
  float* values;
  long long utterances, beams, vocab, capacity, halves, prefix_width;
  long long logits_utterance, logits_beam, logits_token, null_utterance, null_beam, null_token;
  long long filtered_utterance, filtered_beam, filtered_token;
};

}  // namespace spear_fast
