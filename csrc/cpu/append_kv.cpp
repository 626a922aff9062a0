#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <cstring>
#include <vector>

#include "../ops.h"
#include "inverse_rms.h"
#include "rotary.h"

namespace spear_fast {
namespace {

// tokens that are worth a thread of their own
constexpr int64_t kGrain = 32;

template <typename scalar_t>
void append(
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& freqs, const at::Tensor& positions,
    at::Tensor& cache_key, at::Tensor& cache_value, const std::optional<at::Tensor>& residual) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t rows = key.size(0), tokens = key.size(1), groups = key.size(2), size = key.size(3);
  const at::Tensor frequencies = freqs.to(c10::CppTypeToScalarType<acc_t>::value).contiguous();
  const auto* p_freqs = frequencies.const_data_ptr<acc_t>();
  const auto* p_positions = positions.const_data_ptr<int64_t>();
  const auto* p_key = key.const_data_ptr<scalar_t>();
  const auto* p_value = value.const_data_ptr<scalar_t>();
  auto* p_cache_key = cache_key.data_ptr<scalar_t>();
  auto* p_cache_value = cache_value.data_ptr<scalar_t>();
  const auto key_strides = key.strides(), value_strides = value.strides();
  const std::vector<acc_t> scales = inverse_rms<scalar_t>(residual);
  const auto cache_key_strides = cache_key.strides(), cache_value_strides = cache_value.strides();

  at::parallel_for(0, rows, (kGrain + tokens - 1) / tokens, [&](int64_t begin, int64_t end) {
    // the t-th tokens of the rows are mostly at the same position
    std::vector<Rotary<acc_t>> rotaries(tokens, Rotary<acc_t>(p_freqs, size / 2));
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t token = 0; token < tokens; ++token) {
        const int64_t position = p_positions[row] + token;
        const acc_t scale = scales.empty() ? acc_t(1) : scales[row * tokens + token];
        rotaries[token].move_to(position);
        for (int64_t group = 0; group < groups; ++group) {
          rotaries[token].rotate(
              p_key + row * key_strides[0] + token * key_strides[1] + group * key_strides[2], scale,
              p_cache_key + row * cache_key_strides[0] + group * cache_key_strides[1] +
                  position * cache_key_strides[2]);
          const scalar_t* source =
              p_value + row * value_strides[0] + token * value_strides[1] + group * value_strides[2];
          scalar_t* target = p_cache_value + row * cache_value_strides[0] + group * cache_value_strides[1] +
              position * cache_value_strides[2];
          if (scales.empty()) {
            std::memcpy(target, source, size * sizeof(scalar_t));
            continue;
          }
          for (int64_t i = 0; i < size; ++i) {
            target[i] = static_cast<scalar_t>(static_cast<acc_t>(source[i]) * scale);
          }
        }
      }
    }
  });
}

}  // namespace

void append_kv_cpu(
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& freqs, const at::Tensor& positions,
    at::Tensor& cache_key, at::Tensor& cache_value) {
  append_normed_kv_cpu(key, value, freqs, positions, cache_key, cache_value, std::nullopt);
}

void append_normed_kv_cpu(
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& freqs, const at::Tensor& positions,
    at::Tensor& cache_key, at::Tensor& cache_value, const std::optional<at::Tensor>& residual) {
  // the caller's mistakes are explained in Python; these keep a direct caller inside the buffers
  TORCH_CHECK(
      key.dim() == 4 && key.sizes() == value.sizes() && key.size(3) % 2 == 0 && freqs.numel() * 2 == key.size(3) &&
          positions.dim() == 1 && positions.size(0) == key.size(0) && cache_key.dim() == 4 &&
          cache_key.sizes() == cache_value.sizes() && cache_key.size(0) == key.size(0) &&
          cache_key.size(1) == key.size(2) && cache_key.size(3) == key.size(3) && cache_key.size(2) >= key.size(1) &&
          fits_residual(residual, key.size(0) * key.size(1), key),
      "append_kv: the shapes of the arguments do not fit each other");
  TORCH_CHECK(
      cache_key.stride(3) == 1 && cache_value.stride(3) == 1,
      "append_kv: the caches must be contiguous in their last dimension; call .contiguous() when they are made");
  if (key.numel() == 0) {
    return;
  }
  const int64_t last = cache_key.size(2) - key.size(1);
  const auto where = positions.contiguous();
  const auto* p_where = where.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < where.size(0); ++row) {
    TORCH_CHECK_VALUE(
        p_where[row] >= 0 && p_where[row] <= last, "append_kv: positions must lie in 0..", last,
        ", for all tokens to fit into the caches, and row ", row, " is at ", p_where[row],
        "; make the caches longer or end the row");
  }
  const auto keys = key.stride(3) == 1 ? key : key.contiguous();
  const auto values = value.stride(3) == 1 ? value : value.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, key.scalar_type(), "append_kv", [&] {
    append<scalar_t>(keys, values, freqs, where, cache_key, cache_value, residual);
  });
}

}  // namespace spear_fast
