// the ops of spear_fast that have a C++ implementation; shapes and meaning: the families in spear_fast/ops
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace spear_fast {

void append_kv_cpu(
    const at::Tensor& key,
    const at::Tensor& value,
    const at::Tensor& freqs,
    const at::Tensor& positions,
    at::Tensor& cache_key,
    at::Tensor& cache_value);

at::Tensor decode_self_attention_cpu(
    const at::Tensor& query,
    const at::Tensor& freqs,
    const at::Tensor& cache_key,
    const at::Tensor& cache_value,
    const at::Tensor& ancestors,
    const at::Tensor& lengths);

std::tuple<at::Tensor, at::Tensor> decode_cross_attention_cpu(
    const at::Tensor& query,
    const at::Tensor& key,
    const at::Tensor& value,
    const at::Tensor& null_key,
    const at::Tensor& null_value,
    const at::Tensor& lengths,
    bool return_weights);

}  // namespace spear_fast
