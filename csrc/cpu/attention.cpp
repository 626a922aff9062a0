#include <ATen/ops/empty.h>

#include "../ops.h"
#include "exponential.h"
#include "sequences.h"

namespace spear_fast {
namespace {

// a block of queries on its way over the keys: what they have gathered, and how far their weights are scaled
template <typename acc_t>
struct QueryBlock {
  explicit QueryBlock(int64_t padded)
      : padded(padded), queries(kQueries * padded), sums(kQueries * padded), weights(kQueries * kColumns) {}

  void begin() {
    std::fill(sums.begin(), sums.end(), acc_t(0));
    std::fill(largest, largest + kQueries, -std::numeric_limits<acc_t>::infinity());
    std::fill(totals, totals + kQueries, acc_t(0));
  }

  // turns a query's first `count` scores of the tile into weights, zeros after them
  void weigh(int64_t i, int64_t count) {
    acc_t* scores = weights.data() + i * kColumns;
    std::fill(scores + std::max<int64_t>(count, 0), scores + kColumns, -std::numeric_limits<acc_t>::infinity());
    if (count <= 0) {
      std::fill(scores, scores + kColumns, acc_t(0));
      return;
    }
    constexpr int64_t width = Lanes<acc_t>::size();
    Lanes<acc_t> most = Lanes<acc_t>::loadu(scores);
    for (int64_t j = width; j < kColumns; j += width) {
      most = at::vec::maximum(most, Lanes<acc_t>::loadu(scores + j));
    }
    const auto larger = [](Lanes<acc_t>& a, Lanes<acc_t>& b) { return at::vec::maximum(a, b); };
    const acc_t now = std::max(largest[i], at::vec::vec_reduce_all<acc_t>(larger, most));
    Lanes<acc_t> added(0);
    for (int64_t j = 0; j < kColumns; j += width) {
      const auto weight = exponential(Lanes<acc_t>::loadu(scores + j) - Lanes<acc_t>(now));
      weight.store(scores + j);
      added = added + weight;
    }
    if (now > largest[i]) {
      const acc_t factor = std::exp(largest[i] - now);
      totals[i] *= factor;
      acc_t* row = sums.data() + i * padded;
      for (int64_t j = 0; j < padded; j += width) {
        (Lanes<acc_t>::loadu(row + j) * Lanes<acc_t>(factor)).store(row + j);
      }
      largest[i] = now;
    }
    const auto sum = [](Lanes<acc_t>& a, Lanes<acc_t>& b) { return a + b; };
    totals[i] += at::vec::vec_reduce_all<acc_t>(sum, added);
  }

  int64_t padded;
  std::vector<acc_t> queries, sums, weights;
  acc_t largest[kQueries], totals[kQueries];
  int64_t counts[kQueries];
};

template <typename scalar_t>
void attend(
    const Sequences& sequences, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    at::Tensor& out, at::Tensor& lse) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t size = sequences.size, heads = sequences.heads, padded = round_up<acc_t>(size);
  const acc_t scale = 1 / std::sqrt(static_cast<acc_t>(size));
  const auto rotations = sequences.rotations<acc_t>();
  const Tokens<acc_t, scalar_t> queries(query, std::nullopt, rotations);
  const Tokens<acc_t, scalar_t> keys(key, sequences.options.null_key, rotations);
  const Tokens<acc_t, scalar_t> values(value, sequences.options.null_value, {});
  auto* p_out = out.data_ptr<scalar_t>();
  auto* p_lse = lse.data_ptr<acc_t>();

  // parts of a row's queries: one, unless there are too few rows and heads for all threads
  const int64_t whole = std::max<int64_t>(1, sequences.rows * heads);
  const int64_t most = std::max<int64_t>(1, (sequences.longest() + kQueries - 1) / kQueries);
  const int64_t parts = std::clamp<int64_t>((4 * at::get_num_threads() + whole - 1) / whole, 1, most);

  const auto run = [&](int64_t row, int64_t head, int64_t part, QueryBlock<acc_t>& block) {
    const Span of_query = sequences.queries(row), of_key = sequences.keys(row);
    const int64_t blocks = (of_query.length + kQueries - 1) / kQueries;
    const int64_t begin = part * blocks / parts * kQueries;
    const int64_t end = std::min(of_query.length, (part + 1) * blocks / parts * kQueries);
    if (begin >= end) {
      return;
    }
    const auto positions = sequences.positions(row);
    const int64_t count = static_cast<int64_t>(positions.size()), kv_head = sequences.kv_head_of(head);
    const auto key_tiles = keys.transposed(row, of_key, positions, kv_head);
    const auto value_rows = values.natural(row, of_key, positions, kv_head);
    for (int64_t first = begin; first < end; first += kQueries) {
      const int64_t together = std::min(kQueries, end - first);
      for (int64_t i = 0; i < together; ++i) {
        queries.load(row, of_query, first + i, head, scale, block.queries.data() + i * padded);
      }
      sequences.count_keys(positions, first, together, block.counts);
      block.begin();
      // the last query reads the most
      for (int64_t tile = 0; tile < block.counts[together - 1]; tile += kColumns) {
        const int64_t columns = std::min(kColumns, count - tile);
        product<false>(
            block.queries.data(), padded, 1, key_tiles.data() + tile * padded, kColumns, block.weights.data(), kColumns,
            together, kColumns, size);
        for (int64_t i = 0; i < together; ++i) {
          block.weigh(i, std::min(kColumns, block.counts[i] - tile));
        }
        sequences.drop(row, head, first, together, positions.data() + tile, columns, block.weights.data());
        product<true>(
            block.weights.data(), kColumns, 1, value_rows.data() + tile * padded, padded, block.sums.data(), padded,
            together, padded, columns);
      }
      for (int64_t i = 0; i < together; ++i) {
        const acc_t share = block.totals[i] > 0 ? 1 / block.totals[i] : acc_t(0);
        scalar_t* target = p_out + ((of_query.first + first + i) * heads + head) * size;
        for (int64_t j = 0; j < size; ++j) {
          target[j] = static_cast<scalar_t>(block.sums[i * padded + j] * share);
        }
        const int64_t place = sequences.packed ? head * query.size(0) + of_query.first + first + i
                                               : (row * heads + head) * of_query.length + first + i;
        p_lse[place] = block.largest[i] + std::log(block.totals[i]);
      }
    }
  };
  // heads outermost: each thread gets rows of all lengths
  at::parallel_for(0, heads * parts * sequences.rows, 1, [&](int64_t begin, int64_t end) {
    QueryBlock<acc_t> block(padded);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t outer = item / sequences.rows;
      run(item % sequences.rows, outer / parts, outer % parts, block);
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& key_mask,
    const std::optional<at::Tensor>& cu_query, const std::optional<at::Tensor>& cu_key, int64_t max_query,
    int64_t max_key, const std::optional<at::Tensor>& null_key, const std::optional<at::Tensor>& null_value,
    const std::optional<at::Tensor>& freqs, bool causal, bool modulo_heads, double dropout,
    const std::optional<at::Tensor>& seed) {
  const AttentionOptions options{key_mask, cu_query,  cu_key,  null_key, null_value,   freqs,
                                 seed,     max_query, max_key, causal,   modulo_heads, dropout};
  TORCH_CHECK(key.sizes() == value.sizes(), "attention: the shapes of the arguments do not fit each other");
  const Sequences sequences("attention", query, key, options);
  auto out = at::empty(query.sizes(), query.options().memory_format(at::MemoryFormat::Contiguous));
  const auto kind = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto lse = sequences.packed ? at::empty({query.size(1), query.size(0)}, query.options().dtype(kind))
                              : at::empty({query.size(0), query.size(2), query.size(1)}, query.options().dtype(kind));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "attention", [&] {
    attend<scalar_t>(sequences, query, key, value, out, lse);
  });
  return {out, lse};
}

}  // namespace spear_fast
