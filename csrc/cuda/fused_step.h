// what the kernel of fused_step.cu takes
#pragma once

namespace spear_fast {

// layers of a decoder, at most
inline constexpr int kFusedLayers = 24;

// all fields take eight bytes; an array as many as it has elements
struct FusedStep {
  // addresses of each layer's weights in the order of FusedWeight, [layers][kFusedWeights]
  const long long* weights;
  const void* embedding;
  const void* final_gamma;
  const void* logits_weight;
  const long long* inputs;
  const long long* lengths;
  const unsigned char* ancestors;
  const void* memory;
  const long long* memory_lengths;
  // [rows, groups, capacity, size] of each layer
  void* keys[24];
  void* values[24];
  // zeros before and after: arrivals at the barrier, exits, and arrivals of parts for each tile of queries
  unsigned* counters;
  // [rows, dim], and [rows, heads + 2 * groups, size] of queries, keys and values
  float* hidden;
  float* projected;
  // [rows, heads, size] and [rows, inner] in the dtype
  void* attended;
  void* activations;
  // [rows, heads, parts, size + 2]
  float* partial;
  void* logits;
  // rows: hypotheses, first those that have a source, `sourced` of them
  long long layers, rows, sourced, beams, dim, heads, groups, size, inner, vocab, embeddings, capacity, source;
  // source positions of a part
  long long split;
  long long memory_layer, memory_value, memory_utterance, memory_head, memory_position;
};

}  // namespace spear_fast
