#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "../ops.h"
#include "attention_rows.h"
#include "inverse_rms.h"

namespace spear_fast {
namespace {

// multiplications that are worth a thread of their own
constexpr int64_t kGrain = 1 << 16;

template <typename scalar_t>
void attend(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& null_key,
    const at::Tensor& null_value, const int64_t* lengths, const std::optional<at::Tensor>& residual, at::Tensor& out,
    at::Tensor& weights) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t utterances = query.size(0), beams = query.size(1), heads = query.size(2), size = query.size(3);
  const int64_t padded = round_up<acc_t>(size);
  const int64_t longest = key.size(2) + 1;
  const int64_t score_stride = longest + kKeys;
  const acc_t scale = 1 / std::sqrt(static_cast<acc_t>(size));
  const std::vector<acc_t> norms = inverse_rms<scalar_t>(residual);
  const auto* p_query = query.const_data_ptr<scalar_t>();
  const auto* p_key = key.const_data_ptr<scalar_t>();
  const auto* p_value = value.const_data_ptr<scalar_t>();
  const auto* p_null_key = null_key.const_data_ptr<scalar_t>();
  const auto* p_null_value = null_value.const_data_ptr<scalar_t>();
  auto* p_out = out.data_ptr<scalar_t>();
  auto* p_weights = weights.numel() > 0 ? weights.data_ptr<scalar_t>() : nullptr;
  const auto query_strides = query.strides(), key_strides = key.strides(), value_strides = value.strides();

  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, beams * longest * size));
  at::parallel_for(0, utterances * heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> queries(beams * padded), sums(beams * padded), scores(beams * score_stride);
    std::vector<const scalar_t*> keys(longest), values(longest);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t utterance = item / heads, head = item % heads;
      const int64_t count = lengths[utterance] + 1;
      keys[0] = p_null_key + head * null_key.stride(0);
      values[0] = p_null_value + head * null_value.stride(0);
      const scalar_t* first_key = p_key + utterance * key_strides[0] + head * key_strides[1];
      const scalar_t* first_value = p_value + utterance * value_strides[0] + head * value_strides[1];
      for (int64_t position = 1; position < count; ++position) {
        keys[position] = first_key + (position - 1) * key_strides[2];
        values[position] = first_value + (position - 1) * value_strides[2];
      }
      for (int64_t beam = 0; beam < beams; ++beam) {
        const scalar_t* source =
            p_query + utterance * query_strides[0] + beam * query_strides[1] + head * query_strides[2];
        const acc_t factor = norms.empty() ? scale : scale * norms[utterance * beams + beam];
        for (int64_t i = 0; i < size; ++i) {
          queries[beam * padded + i] = static_cast<acc_t>(source[i]) * factor;
        }
      }
      score_rows<acc_t>(queries.data(), beams, padded, keys.data(), count, size, scores.data(), score_stride);
      std::fill(sums.begin(), sums.end(), acc_t(0));
      std::vector<acc_t> totals(beams);
      for (int64_t beam = 0; beam < beams; ++beam) {
        totals[beam] = exponentiate(scores.data() + beam * score_stride, count);
      }
      value_rows<acc_t>(scores.data(), beams, score_stride, values.data(), count, size, sums.data(), padded);
      for (int64_t beam = 0; beam < beams; ++beam) {
        scalar_t* target = p_out + ((utterance * beams + beam) * heads + head) * size;
        const acc_t share = 1 / totals[beam];
        for (int64_t i = 0; i < size; ++i) {
          target[i] = static_cast<scalar_t>(sums[beam * padded + i] * share);
        }
        if (p_weights != nullptr) {
          scalar_t* row = p_weights + ((utterance * beams + beam) * heads + head) * longest;
          for (int64_t i = 0; i < count; ++i) {
            row[i] = static_cast<scalar_t>(scores[beam * score_stride + i] * share);
          }
          std::fill(row + count, row + longest, scalar_t(0));
        }
      }
    }
  });
}

at::Tensor dense_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) == 1 ? tensor : tensor.contiguous();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> decode_cross_attention_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& null_key,
    const at::Tensor& null_value, const at::Tensor& lengths, bool return_weights,
    const std::optional<at::Tensor>& residual) {
  // the caller's mistakes are explained in Python; these keep a direct caller inside the buffers
  TORCH_CHECK(
      query.dim() == 4 && key.dim() == 4 && key.sizes() == value.sizes() && null_key.dim() == 2 &&
          null_key.sizes() == null_value.sizes() && lengths.dim() == 1 && lengths.size(0) == query.size(0) &&
          key.size(0) == query.size(0) && key.size(1) == query.size(2) && key.size(3) == query.size(3) &&
          null_key.size(0) == query.size(2) && null_key.size(1) == query.size(3) &&
          fits_residual(residual, query.size(0) * query.size(1), query),
      "decode_cross_attention: the shapes of the arguments do not fit each other");
  const auto counts = lengths.contiguous();
  const auto* p_counts = counts.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < counts.size(0); ++row) {
    TORCH_CHECK_VALUE(
        p_counts[row] >= 0 && p_counts[row] <= key.size(2), "decode_cross_attention: lengths must lie in 0..",
        key.size(2), ", the number of keys, and utterance ", row, " has ", p_counts[row],
        "; pass the number of valid source positions of each utterance");
  }
  auto out = at::empty(query.sizes(), query.options());
  auto weights = return_weights
      ? at::empty({query.size(0), query.size(1), query.size(2), key.size(2) + 1}, query.options())
      : at::empty({0}, query.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "decode_cross_attention", [&] {
    attend<scalar_t>(
        dense_rows(query), dense_rows(key), dense_rows(value), dense_rows(null_key), dense_rows(null_value), p_counts,
        residual, out, weights);
  });
  return {out, weights};
}

}  // namespace spear_fast
