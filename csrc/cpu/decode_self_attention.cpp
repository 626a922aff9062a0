#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "../ops.h"
#include "attention_rows.h"
#include "inverse_rms.h"
#include "rotary.h"

namespace spear_fast {
namespace {

// multiplications that are worth a thread of their own
constexpr int64_t kGrain = 1 << 16;

// where the key or value of each position lies, following the ancestor table
template <typename scalar_t>
struct Rows {
  const scalar_t* first;
  int64_t beam_stride, position_stride;

  void find(const uint8_t* ancestors, int64_t begin, int64_t end, const scalar_t** rows) const {
    for (int64_t position = begin; position < end; ++position) {
      rows[position - begin] = first + ancestors[position] * beam_stride + position * position_stride;
    }
  }
};

// positions that the given token reads, of a hypothesis with so many positions, the last ones those of the new tokens
int64_t reach(int64_t length, int64_t tokens, int64_t token) {
  return std::max<int64_t>(length - (tokens - 1 - token), 0);
}

// returns how many positions all tokens of all hypotheses of an utterance read from the same beams
int64_t common_trunk(const uint8_t* ancestors, const int64_t* lengths, int64_t beams, int64_t tokens, int64_t buffer) {
  int64_t trunk = reach(*std::min_element(lengths, lengths + beams), tokens, 0);
  for (int64_t beam = 1; beam < beams; ++beam) {
    const uint8_t* other = ancestors + beam * buffer;
    trunk = std::mismatch(ancestors, ancestors + trunk, other).first - ancestors;
  }
  return trunk;
}

template <typename scalar_t>
void attend(
    const at::Tensor& query, const at::Tensor& freqs, const at::Tensor& cache_key, const at::Tensor& cache_value,
    const uint8_t* ancestors, const int64_t* lengths, const std::optional<at::Tensor>& residual, at::Tensor& out) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t utterances = query.size(0), beams = query.size(1), tokens = query.size(2);
  const int64_t heads = query.size(3), size = query.size(4);
  const int64_t groups = cache_key.size(1), buffer = cache_key.size(2);
  // rows of a hypothesis: token by token, the heads that share a key head inside
  const int64_t members = heads / groups, block = tokens * members, rows = beams * block;
  const int64_t padded = round_up<acc_t>(size);
  const acc_t scale = 1 / std::sqrt(static_cast<acc_t>(size));
  const std::vector<acc_t> norms = inverse_rms<scalar_t>(residual);
  const at::Tensor frequencies = freqs.to(c10::CppTypeToScalarType<acc_t>::value).contiguous();
  const auto* p_freqs = frequencies.const_data_ptr<acc_t>();
  const auto* p_query = query.const_data_ptr<scalar_t>();
  const auto* p_key = cache_key.const_data_ptr<scalar_t>();
  const auto* p_value = cache_value.const_data_ptr<scalar_t>();
  auto* p_out = out.data_ptr<scalar_t>();
  const auto query_strides = query.strides(), key_strides = cache_key.strides(), value_strides = cache_value.strides();

  const int64_t longest = *std::max_element(lengths, lengths + utterances * beams);
  const int64_t score_stride = longest + kKeys;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, rows * longest * size));
  at::parallel_for(0, utterances * groups, grain, [&](int64_t begin, int64_t end) {
    // the t-th tokens of the hypotheses are mostly at the same position
    std::vector<Rotary<acc_t>> rotaries(tokens, Rotary<acc_t>(p_freqs, size / 2));
    std::vector<acc_t> queries(rows * padded), sums(rows * padded), scores(rows * score_stride), totals(rows);
    std::vector<const scalar_t*> found(longest);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t utterance = item / groups, group = item % groups;
      const int64_t* length = lengths + utterance * beams;
      const uint8_t* ancestor = ancestors + utterance * beams * buffer;
      const Rows<scalar_t> keys{
          p_key + utterance * beams * key_strides[0] + group * key_strides[1], key_strides[0], key_strides[2]};
      const Rows<scalar_t> values{
          p_value + utterance * beams * value_strides[0] + group * value_strides[1], value_strides[0],
          value_strides[2]};

      for (int64_t beam = 0; beam < beams; ++beam) {
        for (int64_t token = 0; token < tokens; ++token) {
          rotaries[token].move_to(std::max<int64_t>(reach(length[beam], tokens, token) - 1, 0));
          const acc_t norm = norms.empty() ? acc_t(1) : norms[(utterance * beams + beam) * tokens + token];
          for (int64_t member = 0; member < members; ++member) {
            rotaries[token].rotate(
                p_query + utterance * query_strides[0] + beam * query_strides[1] + token * query_strides[2] +
                    (group * members + member) * query_strides[3],
                scale * norm, queries.data() + (beam * block + token * members + member) * padded);
          }
        }
      }

      // what all hypotheses share is read once for all; what each has of its own, once for its tokens and heads; and
      // the new positions once for each token that comes after
      const int64_t trunk = common_trunk(ancestor, length, beams, tokens, buffer);
      keys.find(ancestor, 0, trunk, found.data());
      score_rows<acc_t>(queries.data(), rows, padded, found.data(), trunk, size, scores.data(), score_stride);
      for (int64_t beam = 0; beam < beams; ++beam) {
        const int64_t first = reach(length[beam], tokens, 0);
        keys.find(ancestor + beam * buffer, trunk, length[beam], found.data());
        score_rows<acc_t>(
            queries.data() + beam * block * padded, block, padded, found.data(), first - trunk, size,
            scores.data() + beam * block * score_stride + trunk, score_stride);
        for (int64_t token = 0; token < tokens; ++token) {
          const int64_t count = reach(length[beam], tokens, token), row = beam * block + token * members;
          score_rows<acc_t>(
              queries.data() + row * padded, members, padded, found.data() + first - trunk, count - first, size,
              scores.data() + row * score_stride + first, score_stride);
          for (int64_t i = row; i < row + members; ++i) {
            totals[i] = exponentiate(scores.data() + i * score_stride, count);
          }
        }
      }
      std::fill(sums.begin(), sums.end(), acc_t(0));
      values.find(ancestor, 0, trunk, found.data());
      value_rows<acc_t>(scores.data(), rows, score_stride, found.data(), trunk, size, sums.data(), padded);
      for (int64_t beam = 0; beam < beams; ++beam) {
        const int64_t first = reach(length[beam], tokens, 0);
        values.find(ancestor + beam * buffer, trunk, length[beam], found.data());
        value_rows<acc_t>(
            scores.data() + beam * block * score_stride + trunk, block, score_stride, found.data(), first - trunk, size,
            sums.data() + beam * block * padded, padded);
        for (int64_t token = 0; token < tokens; ++token) {
          const int64_t count = reach(length[beam], tokens, token), row = beam * block + token * members;
          value_rows<acc_t>(
              scores.data() + row * score_stride + first, members, score_stride, found.data() + first - trunk,
              count - first, size, sums.data() + row * padded, padded);
          scalar_t* targets = p_out + (((utterance * beams + beam) * tokens + token) * heads + group * members) * size;
          for (int64_t member = 0; member < members; ++member) {
            const acc_t* sum = sums.data() + (row + member) * padded;
            const acc_t share = count > 0 ? 1 / totals[row + member] : acc_t(0);
            for (int64_t i = 0; i < size; ++i) {
              targets[member * size + i] = static_cast<scalar_t>(sum[i] * share);
            }
          }
        }
      }
    }
  });
}

}  // namespace

at::Tensor decode_self_attention_cpu(
    const at::Tensor& query, const at::Tensor& freqs, at::Tensor& cache_key, at::Tensor& cache_value,
    const at::Tensor& ancestors, const at::Tensor& lengths, const std::optional<at::Tensor>& key,
    const std::optional<at::Tensor>& value, const std::optional<at::Tensor>& residual) {
  // the caller's mistakes are explained in Python; these keep a direct caller inside the buffers
  TORCH_CHECK(
      query.dim() == 5 && query.size(4) % 2 == 0 && freqs.numel() * 2 == query.size(4) && cache_key.dim() == 4 &&
          cache_key.sizes() == cache_value.sizes() && cache_key.size(0) == query.size(0) * query.size(1) &&
          cache_key.size(1) > 0 && query.size(3) % cache_key.size(1) == 0 && cache_key.size(3) == query.size(4) &&
          ancestors.dim() == 3 && ancestors.size(0) == query.size(0) && ancestors.size(1) == query.size(1) &&
          ancestors.size(2) == cache_key.size(2) && lengths.sizes() == query.sizes().slice(0, 2) &&
          key.has_value() == value.has_value() &&
          (!key.has_value() || (key->dim() == 5 && key->sizes().slice(0, 3) == query.sizes().slice(0, 3))) &&
          fits_residual(residual, query.size(0) * query.size(1) * query.size(2), query),
      "decode_self_attention: the shapes of the arguments do not fit each other");
  TORCH_CHECK(
      cache_key.stride(3) == 1 && cache_value.stride(3) == 1,
      "decode_self_attention: the caches must be contiguous in their last dimension; call .contiguous() when they are "
      "made");
  auto out = at::empty(query.sizes(), query.options());
  if (out.numel() == 0) {
    return out;
  }
  const int64_t beams = query.size(1), tokens = query.size(2), buffer = cache_key.size(2);
  const auto counts = lengths.contiguous();
  const auto table = ancestors.contiguous();
  const auto* p_counts = counts.const_data_ptr<int64_t>();
  const auto* p_table = table.const_data_ptr<uint8_t>();
  const int64_t least = key.has_value() ? tokens : 0;
  for (int64_t row = 0; row < counts.numel(); ++row) {
    TORCH_CHECK_VALUE(
        p_counts[row] >= least && p_counts[row] <= buffer, "decode_self_attention: lengths must lie in ", least, "..",
        buffer, ", the caches' length, and hypothesis ", row, " has ", p_counts[row],
        "; make the caches longer or end it");
    uint8_t highest = 0;
    for (int64_t position = 0; position < p_counts[row]; ++position) {
      highest = std::max(highest, p_table[row * buffer + position]);
    }
    TORCH_CHECK_VALUE(
        highest < std::max<int64_t>(beams, 1), "decode_self_attention: ancestors must be below ", beams,
        ", the number of beams of an utterance, and hypothesis ", row, " has ", static_cast<int64_t>(highest),
        "; write each position's beam index before it is read");
  }
  if (key.has_value()) {
    append_normed_kv_cpu(
        key->flatten(0, 1), value->flatten(0, 1), freqs, counts.flatten().sub(tokens), cache_key, cache_value,
        residual);
  }
  const auto queries = query.stride(4) == 1 ? query : query.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "decode_self_attention", [&] {
    attend<scalar_t>(queries, freqs, cache_key, cache_value, p_table, p_counts, residual, out);
  });
  return out;
}

}  // namespace spear_fast
