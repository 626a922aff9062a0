// the rows of a batch, padded or packed, as attention's C++ walks over them: where each begins, which keys it reads
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/outer.h>

#include <optional>
#include <vector>

#include "../philox.h"
#include "matmul.h"

namespace spear_fast {

// queries that are worked on together, and keys that they meet at a time
inline constexpr int64_t kQueries = 48;
inline constexpr int64_t kColumns = 64;

// the arguments that attention and its backward pass share
struct AttentionOptions {
  std::optional<at::Tensor> key_mask, cu_query, cu_key, null_key, null_value, freqs, seed;
  int64_t max_query, max_key;
  bool causal, modulo_heads;
  double dropout;
};

// tokens of one row of the batch
struct Span {
  int64_t first, length;
};

inline at::Tensor dense(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

class Sequences {
 public:
  Sequences(const char* op, const at::Tensor& query, const at::Tensor& key, const AttentionOptions& options)
      : options(options), packed(options.cu_query.has_value()) {
    const auto fits = [&](bool condition) {
      // the caller's mistakes are explained in Python; these keep a direct caller inside the buffers
      TORCH_CHECK(condition, op, ": the shapes of the arguments do not fit each other");
    };
    fits(packed == options.cu_key.has_value() && query.dim() == (packed ? 3 : 4) && key.dim() == query.dim());
    heads = query.size(-2), kv_heads = key.size(-2), size = query.size(-1);
    fits(kv_heads > 0 && heads % kv_heads == 0 && key.size(-1) == size);
    if (packed) {
      fits(!options.key_mask && options.cu_query->dim() == 1 && options.cu_query->sizes() == options.cu_key->sizes());
      fits(options.cu_query->size(0) > 0);
      rows = options.cu_query->size(0) - 1;
      queries_ = spans(op, "cu_query", *options.cu_query, query.size(0), "max_query", options.max_query);
      keys_ = spans(op, "cu_key", *options.cu_key, key.size(0), "max_key", options.max_key);
    } else {
      rows = query.size(0);
      fits(key.size(0) == rows && (!options.key_mask || options.key_mask->sizes() == key.sizes().slice(0, 2)));
      for (int64_t row = 0; row < rows; ++row) {
        queries_.push_back({row * query.size(1), query.size(1)});
        keys_.push_back({row * key.size(1), key.size(1)});
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      longest_ = std::max({longest_, queries_[row].length, keys_[row].length});
      TORCH_CHECK_VALUE(
          !options.causal || queries_[row].length == keys_[row].length, op,
          ": cu_key must equal cu_query, got other lengths (row ", row, " has ", keys_[row].length, " keys and ",
          queries_[row].length, " queries); causal positions read their own past");
    }
    fits(options.null_key.has_value() == options.null_value.has_value());
    for (const auto& null : {options.null_key, options.null_value}) {
      fits(!null || (null->dim() == 2 && null->size(0) == kv_heads && null->size(1) == size));
    }
    fits(!options.freqs || (size % 2 == 0 && options.freqs->dim() == 1 && options.freqs->numel() * 2 == size));
    fits(options.dropout >= 0 && options.dropout < 1 && (options.dropout == 0 || options.seed.has_value()));
    if (options.key_mask) {
      mask_ = options.key_mask->contiguous();
    }
    if (options.dropout > 0) {
      seed_ = static_cast<uint64_t>(options.seed->item<int64_t>());
    }
  }

  Span queries(int64_t row) const { return queries_[row]; }
  Span keys(int64_t row) const { return keys_[row]; }
  int64_t longest() const { return longest_; }
  int64_t group() const { return heads / kv_heads; }
  int64_t kv_head_of(int64_t head) const { return options.modulo_heads ? head % kv_heads : head / group(); }
  int64_t head_of(int64_t kv_head, int64_t member) const {
    return options.modulo_heads ? member * kv_heads + kv_head : kv_head * group() + member;
  }
  bool has_null() const { return options.null_key.has_value(); }

  // positions of the keys that a row reads, in order; -1 is the null key
  std::vector<int64_t> positions(int64_t row) const {
    std::vector<int64_t> found;
    if (has_null()) {
      found.push_back(-1);
    }
    const bool* mask = mask_.defined() ? mask_.const_data_ptr<bool>() + keys_[row].first : nullptr;
    for (int64_t position = 0; position < keys_[row].length; ++position) {
      if (mask == nullptr || mask[position]) {
        found.push_back(position);
      }
    }
    return found;
  }

  // how many of a row's `positions` each query of a block reads: they come first
  void count_keys(const std::vector<int64_t>& positions, int64_t first, int64_t count, int64_t* counts) const {
    for (int64_t i = 0; i < count; ++i) {
      counts[i] = options.causal ? std::upper_bound(positions.begin(), positions.end(), first + i) - positions.begin()
                                 : static_cast<int64_t>(positions.size());
    }
  }

  // cosines and sines of all positions, [longest, size / 2] each, or nothing
  template <typename acc_t>
  std::pair<at::Tensor, at::Tensor> rotations() const {
    if (!options.freqs) {
      return {};
    }
    const auto kind = c10::CppTypeToScalarType<acc_t>::value;
    const auto angles = at::outer(at::arange(longest_, at::TensorOptions().dtype(kind)), options.freqs->to(kind));
    return {angles.cos(), angles.sin()};
  }

  // multiplies weights of the queries first..first + count and of a tile of positions by what dropout leaves of them
  template <typename acc_t>
  void drop(
      int64_t row, int64_t head, int64_t first, int64_t count, const int64_t* positions, int64_t columns,
      acc_t* weights) const {
    if (options.dropout == 0) {
      return;
    }
    const uint32_t threshold = dropout_threshold(options.dropout);
    const acc_t share = static_cast<acc_t>(1 / (1 - options.dropout));
    const uint32_t of_row = static_cast<uint32_t>(row * heads + head);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const auto key = static_cast<uint32_t>(positions[j] + (has_null() ? 1 : 0));
        const bool stays = keeps(key, static_cast<uint32_t>(first + i), of_row, seed_, threshold);
        weights[i * kColumns + j] *= stays ? share : acc_t(0);
      }
    }
  }

  const AttentionOptions& options;
  const bool packed;
  int64_t rows, heads, kv_heads, size;

 private:
  std::vector<Span> spans(
      const char* op, const char* name, const at::Tensor& offsets, int64_t total, const char* longest_name,
      int64_t longest) const {
    const auto dense_offsets = offsets.contiguous();
    const auto* p_offsets = dense_offsets.const_data_ptr<int32_t>();
    std::vector<Span> found;
    bool rising = p_offsets[0] == 0 && p_offsets[rows] == total;
    for (int64_t row = 0; row < rows; ++row) {
      // in 64 bits: a difference that wraps would pass for a length
      const int64_t first = p_offsets[row], last = p_offsets[row + 1];
      found.push_back({first, last - first});
      rising = rising && found.back().length >= 0;
    }
    TORCH_CHECK_VALUE(
        rising, op, ": ", name, " must rise from 0 to ", total, ", got ",
        c10::IntArrayRef(std::vector<int64_t>(p_offsets, p_offsets + std::min<int64_t>(rows + 1, 8))),
        "; pass cumulative lengths, from 0");
    for (const Span& span : found) {
      TORCH_CHECK_VALUE(
          span.length <= longest, op, ": ", longest_name, " must be at least the longest length ", span.length,
          ", got ", longest, "; take it from ", name);
    }
    return found;
  }

  std::vector<Span> queries_, keys_;
  at::Tensor mask_;
  uint64_t seed_ = 0;
  int64_t longest_ = 0;
};

// one tensor's tokens in the type of the accumulation, rotated where asked
template <typename acc_t, typename scalar_t>
class Tokens {
 public:
  // tensor: [batch, length, heads, size] or [total, heads, size], dense in its last dimension; null: [heads, size]
  Tokens(
      const at::Tensor& tensor, const std::optional<at::Tensor>& null,
      const std::pair<at::Tensor, at::Tensor>& rotations)
      : tensor_(dense(tensor)),
        null_(null ? null->contiguous() : at::Tensor()),
        cos_(rotations.first),
        sin_(rotations.second),
        size_(tensor.size(-1)) {}

  // target[i] = the token, times scale; zeros are left as they are after it
  void load(int64_t row, Span span, int64_t position, int64_t head, acc_t scale, acc_t* target) const {
    const scalar_t* source = source_of(row, span, position, head);
    if (!cos_.defined() || position < 0) {
      for (int64_t i = 0; i < size_; ++i) {
        target[i] = static_cast<acc_t>(source[i]) * scale;
      }
      return;
    }
    rotate(position, acc_t(1), [&](int64_t i, acc_t cos, acc_t sin) {
      const auto even = static_cast<acc_t>(source[2 * i]), odd = static_cast<acc_t>(source[2 * i + 1]);
      target[2 * i] = (even * cos - odd * sin) * scale;
      target[2 * i + 1] = (odd * cos + even * sin) * scale;
    });
  }

  // target[i] = the gradient of the token, for that of its rotation, times scale
  template <typename out_t>
  void store_gradient(const acc_t* gradient, int64_t position, acc_t scale, out_t* target) const {
    if (!cos_.defined() || position < 0) {
      for (int64_t i = 0; i < size_; ++i) {
        target[i] = static_cast<out_t>(gradient[i] * scale);
      }
      return;
    }
    rotate(position, acc_t(-1), [&](int64_t i, acc_t cos, acc_t sin) {
      target[2 * i] = static_cast<out_t>((gradient[2 * i] * cos - gradient[2 * i + 1] * sin) * scale);
      target[2 * i + 1] = static_cast<out_t>((gradient[2 * i + 1] * cos + gradient[2 * i] * sin) * scale);
    });
  }

  // tiles of kColumns tokens, transposed: [tile, padded size, column]; zeros where there is no token
  std::vector<acc_t> transposed(int64_t row, Span span, const std::vector<int64_t>& positions, int64_t head) const {
    const int64_t padded = round_up<acc_t>(size_), count = static_cast<int64_t>(positions.size());
    std::vector<acc_t> tiles((count + kColumns - 1) / kColumns * kColumns * padded), token(size_);
    for (int64_t i = 0; i < count; ++i) {
      load(row, span, positions[i], head, acc_t(1), token.data());
      acc_t* column = tiles.data() + i / kColumns * kColumns * padded + i % kColumns;
      for (int64_t j = 0; j < size_; ++j) {
        column[j * kColumns] = token[j];
      }
    }
    return tiles;
  }

  // [token, padded size]
  std::vector<acc_t> natural(int64_t row, Span span, const std::vector<int64_t>& positions, int64_t head) const {
    const int64_t padded = round_up<acc_t>(size_), count = static_cast<int64_t>(positions.size());
    std::vector<acc_t> tokens(count * padded);
    for (int64_t i = 0; i < count; ++i) {
      load(row, span, positions[i], head, acc_t(1), tokens.data() + i * padded);
    }
    return tokens;
  }

 private:
  const scalar_t* source_of(int64_t row, Span span, int64_t position, int64_t head) const {
    if (position < 0) {
      return null_.const_data_ptr<scalar_t>() + head * size_;
    }
    const auto* data = tensor_.const_data_ptr<scalar_t>();
    if (tensor_.dim() == 3) {
      return data + (span.first + position) * tensor_.stride(0) + head * tensor_.stride(1);
    }
    return data + row * tensor_.stride(0) + position * tensor_.stride(1) + head * tensor_.stride(2);
  }

  template <typename Body>
  void rotate(int64_t position, acc_t sign, const Body& body) const {
    const auto* cos = cos_.const_data_ptr<acc_t>() + position * size_ / 2;
    const auto* sin = sin_.const_data_ptr<acc_t>() + position * size_ / 2;
    for (int64_t i = 0; i < size_ / 2; ++i) {
      body(i, cos[i], sign * sin[i]);
    }
  }

  at::Tensor tensor_, null_, cos_, sin_;
  int64_t size_;
};

}  // namespace spear_fast
