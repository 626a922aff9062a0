#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "../ops.h"
#include "exponential.h"
#include "sequences.h"

namespace spear_fast {
namespace {

template <typename acc_t>
struct GradientBlock {
  explicit GradientBlock(int64_t padded)
      : queries(kQueries * padded),
        grads(kQueries * padded),
        grad_queries(kQueries * padded),
        weights(kQueries * kColumns),
        grad_scores(kQueries * kColumns),
        shares(kQueries * kColumns) {}

  std::vector<acc_t> queries, grads, grad_queries, weights, grad_scores, shares;
  acc_t lse[kQueries], delta[kQueries];
  int64_t counts[kQueries];
};

// in the order and with the roundings of a product, so that the gradient of a lone key's score is exactly zero
template <typename acc_t>
acc_t dot(const acc_t* a, const acc_t* b, int64_t size) {
  acc_t sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    sum = std::fma(a[i], b[i], sum);
  }
  return sum;
}

// weights = exp(scores - lse) * shares, zeros after a query's `count` keys; grad_scores = weights * (grad_weights -
// delta)
//
// whole: the tile has all keys of the query, and delta, the mean of grad_weights, is taken from it rather than from the
// result, whose rounding would be all that is left where two large numbers cancel
template <typename acc_t>
void differentiate(
    acc_t* weights, acc_t* grad_scores, const acc_t* shares, int64_t count, acc_t lse, acc_t delta, bool whole) {
  constexpr int64_t width = Lanes<acc_t>::size();
  std::fill(weights + std::max<int64_t>(count, 0), weights + kColumns, -std::numeric_limits<acc_t>::infinity());
  Lanes<acc_t> mean(0);
  for (int64_t j = 0; j < kColumns; j += width) {
    const auto weight = exponential(Lanes<acc_t>::loadu(weights + j) - Lanes<acc_t>(lse));
    weight.store(weights + j);
    if (shares != nullptr) {
      (Lanes<acc_t>::loadu(grad_scores + j) * Lanes<acc_t>::loadu(shares + j)).store(grad_scores + j);
    }
    mean = at::vec::fmadd(weight, Lanes<acc_t>::loadu(grad_scores + j), mean);
  }
  if (whole) {
    alignas(64) acc_t lanes[width];
    mean.store(lanes);
    delta = 0;
    for (const acc_t lane : lanes) {
      delta += lane;
    }
  }
  for (int64_t j = 0; j < kColumns; j += width) {
    const auto weight = Lanes<acc_t>::loadu(weights + j);
    (weight * (Lanes<acc_t>::loadu(grad_scores + j) - Lanes<acc_t>(delta))).store(grad_scores + j);
    if (shares != nullptr) {
      (weight * Lanes<acc_t>::loadu(shares + j)).store(weights + j);
    }
  }
}

template <typename scalar_t>
void attend_backward(
    const Sequences& sequences, const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse, at::Tensor& grad_query, at::Tensor& grad_key,
    at::Tensor& grad_value, at::Tensor& grad_null) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t size = sequences.size, heads = sequences.heads, kv_heads = sequences.kv_heads;
  const int64_t padded = round_up<acc_t>(size);
  const acc_t scale = 1 / std::sqrt(static_cast<acc_t>(size));
  const auto rotations = sequences.rotations<acc_t>();
  const Tokens<acc_t, scalar_t> queries(query, std::nullopt, rotations);
  const Tokens<acc_t, scalar_t> keys(key, sequences.options.null_key, rotations);
  const Tokens<acc_t, scalar_t> values(value, sequences.options.null_value, {});
  const Tokens<acc_t, scalar_t> grads(grad_out, std::nullopt, {}), outs(out, std::nullopt, {});
  const auto dense_lse = lse.contiguous();
  const auto* p_lse = dense_lse.const_data_ptr<acc_t>();
  auto* p_grad_query = grad_query.data_ptr<scalar_t>();
  auto* p_grad_key = grad_key.data_ptr<scalar_t>();
  auto* p_grad_value = grad_value.data_ptr<scalar_t>();
  auto* p_grad_null = grad_null.data_ptr<acc_t>();

  const auto run = [&](int64_t row, int64_t kv_head, GradientBlock<acc_t>& block) {
    const Span of_query = sequences.queries(row), of_key = sequences.keys(row);
    const auto positions = sequences.positions(row);
    const int64_t count = static_cast<int64_t>(positions.size());
    const auto key_tiles = keys.transposed(row, of_key, positions, kv_head);
    const auto key_rows = keys.natural(row, of_key, positions, kv_head);
    const auto value_tiles = values.transposed(row, of_key, positions, kv_head);
    std::vector<acc_t> grad_keys(count * padded), grad_values(count * padded), token(padded);
    for (int64_t member = 0; member < sequences.group(); ++member) {
      const int64_t head = sequences.head_of(kv_head, member);
      for (int64_t first = 0; first < of_query.length; first += kQueries) {
        const int64_t together = std::min(kQueries, of_query.length - first);
        for (int64_t i = 0; i < together; ++i) {
          queries.load(row, of_query, first + i, head, scale, block.queries.data() + i * padded);
          grads.load(row, of_query, first + i, head, acc_t(1), block.grads.data() + i * padded);
          outs.load(row, of_query, first + i, head, acc_t(1), token.data());
          block.delta[i] = dot(token.data(), block.grads.data() + i * padded, size);
          block.lse[i] = p_lse
              [sequences.packed ? head * query.size(0) + of_query.first + first + i
                                : (row * heads + head) * of_query.length + first + i];
        }
        sequences.count_keys(positions, first, together, block.counts);
        std::fill(block.grad_queries.begin(), block.grad_queries.end(), acc_t(0));
        for (int64_t tile = 0; tile < block.counts[together - 1]; tile += kColumns) {
          const int64_t columns = std::min(kColumns, count - tile);
          product<false>(
              block.queries.data(), padded, 1, key_tiles.data() + tile * padded, kColumns, block.weights.data(),
              kColumns, together, kColumns, size);
          product<false>(
              block.grads.data(), padded, 1, value_tiles.data() + tile * padded, kColumns, block.grad_scores.data(),
              kColumns, together, kColumns, size);
          const bool drops = sequences.options.dropout > 0;
          if (drops) {
            std::fill(block.shares.begin(), block.shares.end(), acc_t(1));
            sequences.drop(row, head, first, together, positions.data() + tile, columns, block.shares.data());
          }
          for (int64_t i = 0; i < together; ++i) {
            // a query that reads nothing has no weights; its log-sum-exp is -inf
            const int64_t read = std::min(kColumns, block.counts[i] - tile);
            differentiate(
                block.weights.data() + i * kColumns, block.grad_scores.data() + i * kColumns,
                drops ? block.shares.data() + i * kColumns : nullptr, read, read > 0 ? block.lse[i] : acc_t(0),
                block.delta[i], block.counts[i] <= kColumns);
          }
          product<true>(
              block.weights.data(), 1, kColumns, block.grads.data(), padded, grad_values.data() + tile * padded, padded,
              columns, padded, together);
          product<true>(
              block.grad_scores.data(), 1, kColumns, block.queries.data(), padded, grad_keys.data() + tile * padded,
              padded, columns, padded, together);
          product<true>(
              block.grad_scores.data(), kColumns, 1, key_rows.data() + tile * padded, padded, block.grad_queries.data(),
              padded, together, padded, columns);
        }
        for (int64_t i = 0; i < together; ++i) {
          queries.store_gradient(
              block.grad_queries.data() + i * padded, first + i, scale,
              p_grad_query + ((of_query.first + first + i) * heads + head) * size);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const acc_t *from_key = grad_keys.data() + i * padded, *from_value = grad_values.data() + i * padded;
      if (positions[i] < 0) {
        acc_t* target = p_grad_null + (row * kv_heads + kv_head) * 2 * size;
        std::copy(from_key, from_key + size, target);
        std::copy(from_value, from_value + size, target + size);
        continue;
      }
      const int64_t target = ((of_key.first + positions[i]) * kv_heads + kv_head) * size;
      keys.store_gradient(from_key, positions[i], acc_t(1), p_grad_key + target);
      values.store_gradient(from_value, positions[i], acc_t(1), p_grad_value + target);
    }
  };
  // heads outermost: each thread gets rows of all lengths
  at::parallel_for(0, kv_heads * sequences.rows, 1, [&](int64_t begin, int64_t end) {
    GradientBlock<acc_t> block(padded);
    for (int64_t item = begin; item < end; ++item) {
      run(item % sequences.rows, item / sequences.rows, block);
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& lse, const std::optional<at::Tensor>& key_mask,
    const std::optional<at::Tensor>& cu_query, const std::optional<at::Tensor>& cu_key, int64_t max_query,
    int64_t max_key, const std::optional<at::Tensor>& null_key, const std::optional<at::Tensor>& null_value,
    const std::optional<at::Tensor>& freqs, bool causal, bool modulo_heads, double dropout,
    const std::optional<at::Tensor>& seed) {
  const AttentionOptions options{key_mask, cu_query,  cu_key,  null_key, null_value,   freqs,
                                 seed,     max_query, max_key, causal,   modulo_heads, dropout};
  TORCH_CHECK(
      key.sizes() == value.sizes() && grad_out.sizes() == query.sizes() && out.sizes() == query.sizes() &&
          lse.numel() * query.size(-1) == query.numel(),
      "attention_backward: the shapes of the arguments do not fit each other");
  const Sequences sequences("attention_backward", query, key, options);
  const auto empty_like = [](const at::Tensor& tensor) {
    return at::empty(tensor.sizes(), tensor.options().memory_format(at::MemoryFormat::Contiguous));
  };
  auto grad_query = empty_like(query);
  // keys that are not read get zeros
  auto grad_key = key_mask ? at::zeros(key.sizes(), key.options()) : empty_like(key);
  auto grad_value = key_mask ? at::zeros(key.sizes(), key.options()) : empty_like(value);
  const int64_t nulls = sequences.has_null() ? sequences.rows : 0;
  auto grad_null = at::empty({nulls, sequences.kv_heads, 2, sequences.size}, lse.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "attention_backward", [&] {
    attend_backward<scalar_t>(
        sequences, grad_out, query, key, value, out, lse, grad_query, grad_key, grad_value, grad_null);
  });
  if (!sequences.has_null()) {
    return {grad_query, grad_key, grad_value, at::empty({0}, query.options()), at::empty({0}, query.options())};
  }
  const auto summed = grad_null.sum(0).to(query.scalar_type());
  return {grad_query, grad_key, grad_value, summed.select(1, 0).contiguous(), summed.select(1, 1).contiguous()};
}

}  // namespace spear_fast
