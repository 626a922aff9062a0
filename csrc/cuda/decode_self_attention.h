// what the kernels of decode_self_attention.cu take
#pragma once

namespace spear_fast {

// all fields take eight bytes: who launches without this header's compiler fills them in this order; strides count
// elements
struct SelfAttention {
  const void* query;
  const float* freqs;
  const void* cache_key;
  const void* cache_value;
  const unsigned char* ancestors;
  const long long* lengths;
  void* out;
  float* partial;
  long long utterances, beams, tokens, heads, groups, size, buffer, splits, tiles;
  long long query_utterance, query_beam, query_token, query_head, query_element, freqs_element;
  long long key_row, key_group, key_position;
  long long value_row, value_group, value_position;
  long long ancestors_utterance, ancestors_beam, ancestors_position;
  long long lengths_utterance, lengths_beam;
};

}  // namespace spear_fast
