// the ops of spear_fast that have a C++ implementation; shapes and meaning: the families in spear_fast/ops
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace spear_fast {

void append_kv_cpu(
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& freqs, const at::Tensor& positions,
    at::Tensor& cache_key, at::Tensor& cache_value);

// append_kv_cpu of keys and values that are multiplied by the inverse RMS of their rows of `residual`
void append_normed_kv_cpu(
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& freqs, const at::Tensor& positions,
    at::Tensor& cache_key, at::Tensor& cache_value, const std::optional<at::Tensor>& residual);

std::tuple<at::Tensor, at::Tensor> attention_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& key_mask,
    const std::optional<at::Tensor>& cu_query, const std::optional<at::Tensor>& cu_key, int64_t max_query,
    int64_t max_key, const std::optional<at::Tensor>& null_key, const std::optional<at::Tensor>& null_value,
    const std::optional<at::Tensor>& freqs, bool causal, bool modulo_heads, double dropout,
    const std::optional<at::Tensor>& seed);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& lse, const std::optional<at::Tensor>& key_mask,
    const std::optional<at::Tensor>& cu_query, const std::optional<at::Tensor>& cu_key, int64_t max_query,
    int64_t max_key, const std::optional<at::Tensor>& null_key, const std::optional<at::Tensor>& null_value,
    const std::optional<at::Tensor>& freqs, bool causal, bool modulo_heads, double dropout,
    const std::optional<at::Tensor>& seed);

void beam_step_cpu(
    const at::Tensor& logits, const std::optional<at::Tensor>& null_logits, const at::Tensor& float_params,
    const at::Tensor& int_params, const at::Tensor& prefix, at::Tensor& inputs, at::Tensor& scores, at::Tensor& lengths,
    at::Tensor& ancestors, at::Tensor& tokens, at::Tensor& parents, at::Tensor& logprobs, at::Tensor& pool_scores,
    at::Tensor& pool_beams, at::Tensor& pool_ends, at::Tensor& pool_finished, at::Tensor& pool_last_logprobs,
    at::Tensor& ended, at::Tensor& done);

std::tuple<at::Tensor, at::Tensor> cross_entropy_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels, int64_t ignore_index);

std::tuple<at::Tensor, at::Tensor> cross_entropy_backward_cpu(
    const at::Tensor& grad_losses, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
    const at::Tensor& lse, int64_t ignore_index);

at::Tensor decode_self_attention_cpu(
    const at::Tensor& query, const at::Tensor& freqs, at::Tensor& cache_key, at::Tensor& cache_value,
    const at::Tensor& ancestors, const at::Tensor& lengths, const std::optional<at::Tensor>& key,
    const std::optional<at::Tensor>& value, const std::optional<at::Tensor>& residual);

std::tuple<at::Tensor, at::Tensor> decode_cross_attention_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& null_key,
    const at::Tensor& null_value, const at::Tensor& lengths, bool return_weights,
    const std::optional<at::Tensor>& residual = std::nullopt);

at::Tensor geglu_cpu(
    const at::Tensor& x, const std::optional<at::Tensor>& bias, int64_t width,
    const std::optional<at::Tensor>& residual = std::nullopt);

std::tuple<at::Tensor, at::Tensor> geglu_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, const std::optional<at::Tensor>& bias);

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm_cpu(
    const at::Tensor& x, const at::Tensor& gamma, const std::optional<at::Tensor>& residual);

std::tuple<at::Tensor, at::Tensor> rms_norm_backward_cpu(
    const at::Tensor& grad_normed, const std::optional<at::Tensor>& grad_sum, const at::Tensor& x,
    const at::Tensor& gamma, const at::Tensor& inverse);

at::Tensor rotary_cpu(
    const at::Tensor& x, const at::Tensor& freqs, const std::optional<at::Tensor>& positions, bool inverse);

void sample_step_cpu(
    const at::Tensor& logits, const std::optional<at::Tensor>& null_logits, const std::optional<at::Tensor>& filtered,
    const at::Tensor& float_params, const at::Tensor& int_params, const at::Tensor& prefix, const at::Tensor& seeds,
    at::Tensor& inputs, at::Tensor& scores, at::Tensor& lengths, at::Tensor& ancestors, at::Tensor& tokens,
    at::Tensor& parents, at::Tensor& logprobs, at::Tensor& finished, at::Tensor& done);

}  // namespace spear_fast
