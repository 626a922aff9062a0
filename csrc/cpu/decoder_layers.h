// a whole decoding step of float32 models on the CPU: newest inputs in, logits out, no interpreter in between
#pragma once

#include <torch/custom_class.h>

#include <vector>

#include "packed_linear.h"

namespace spear_fast {

// the matmuls after a norm have its gamma folded in; query head i reads key head i / (heads / kv_heads)
class DecoderLayers : public torch::CustomClassHolder {
 public:
  using Linears = std::vector<c10::intrusive_ptr<PackedLinear>>;

  // linears: of each layer query_key_value, self_output, cross_query, cross_output, the feed-forward's up_gate (values,
  // then gates) and down; after them the logits'. constants: of each layer null_key, null_value [heads, head_dim],
  // null_output [dim], the feed-forward's first bias [2 * inner], freqs [head_dim / 2]. embedding: [vocabulary + 1,
  // dim]
  DecoderLayers(
      Linears linears, std::vector<at::Tensor> constants, at::Tensor embedding, int64_t heads, int64_t kv_heads);

  // returns logits [rows * beams, vocabulary] of what follows inputs [utterances, beams], and writes their keys and
  // values; caches, ancestors, lengths as in decode_self_attention, their rows 2 * utterances under guidance; memory as
  // in decode_cross_attention
  at::Tensor step(
      const at::Tensor& inputs, std::vector<at::Tensor> keys, std::vector<at::Tensor> values,
      const std::vector<at::Tensor>& memory_keys, const std::vector<at::Tensor>& memory_values,
      const at::Tensor& memory_lengths, const at::Tensor& ancestors, const at::Tensor& lengths) const;

 private:
  struct Layer {
    c10::intrusive_ptr<PackedLinear> query_key_value, self_output, cross_query, cross_output, up_gate, down;
    at::Tensor null_key, null_value, null_output, bias, freqs;
  };

  void check(
      const at::Tensor& inputs, const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values,
      const std::vector<at::Tensor>& memory_keys, const std::vector<at::Tensor>& memory_values,
      const at::Tensor& memory_lengths, const at::Tensor& ancestors, const at::Tensor& lengths) const;

  std::vector<Layer> layers_;
  c10::intrusive_ptr<PackedLinear> logits_;
  at::Tensor embedding_;
  int64_t heads_, kv_heads_, head_size_;
};

}  // namespace spear_fast
