#include "decoder_layers.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include <array>
#include <cmath>
#include <cstring>

#include "../ops.h"
#include "checks.h"
#include "pages.h"
#include "rows.h"

namespace spear_fast {
namespace {

// numbers that are worth a thread of their own
constexpr int64_t kGrain = 1 << 14;
constexpr int64_t kLinears = 6, kConstants = 5;
constexpr float kSmallest = 1e-12F;

// returns x / max(||x||, 1e-12) of each row
at::Tensor l2_normalize(const at::Tensor& x) {
  const int64_t rows = x.size(0), size = x.size(1);
  at::Tensor out = at::empty({rows, size}, x.options());
  const auto* p_x = x.const_data_ptr<float>();
  auto* p_out = out.data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* source = p_x + row * size;
      float* target = p_out + row * size;
      Lanes<float> low_sum(0), high_sum(0);
      for_steps<float>(size, [&](int64_t offset, auto count) {
        const auto [low, high] = load<float>(source + offset, count);
        low_sum = at::vec::fmadd(low, low, low_sum);
        high_sum = at::vec::fmadd(high, high, high_sum);
      });
      const Lanes<float> share(1 / std::max(std::sqrt(sum_of<float>(low_sum + high_sum)), kSmallest));
      for_steps<float>(size, [&](int64_t offset, auto count) {
        const auto [low, high] = load<float>(source + offset, count);
        store<float>(target + offset, low * share, high * share, count);
      });
    }
  });
  return out;
}

// what a profiler is told of a part of the step
template <typename Part>
auto profiled(const char* name, const Part& part) {
  RECORD_FUNCTION(name, c10::ArrayRef<const c10::IValue>{});
  return part();
}

// adds a row to each of some rows
void add_row(at::Tensor x, const at::Tensor& row) {
  auto* p_x = x.data_ptr<float>();
  const auto* p_row = row.const_data_ptr<float>();
  const int64_t size = x.size(1);
  for (int64_t i = 0; i < x.size(0); ++i) {
    for (int64_t j = 0; j < size; ++j) {
      p_x[i * size + j] += p_row[j];
    }
  }
}

// weights one after the other, in the order in which a step reads them, so that they fill large pages
void lay_together(const std::vector<c10::intrusive_ptr<PackedLinear>>& linears) {
  int64_t bytes = 0;
  for (const auto& each : linears) {
    bytes += each->bytes();
  }
  const at::Tensor memory = whole_pages(bytes);
  int64_t offset = 0;
  for (const auto& each : linears) {
    const int64_t size = each->bytes();
    each->move_to(memory.narrow(0, offset, size));
    offset += size;
  }
}

}  // namespace

DecoderLayers::DecoderLayers(
    Linears linears, std::vector<at::Tensor> constants, at::Tensor embedding, int64_t heads, int64_t kv_heads)
    : heads_(heads), kv_heads_(kv_heads) {
  const auto count = static_cast<int64_t>(linears.size()) / kLinears;
  TORCH_CHECK_VALUE(
      count >= 1 && static_cast<int64_t>(linears.size()) == count * kLinears + 1 &&
          static_cast<int64_t>(constants.size()) == count * kConstants,
      "DecoderLayers: wanted at least one layer, ", kLinears, " matmuls and ", kConstants,
      " constants for each and one matmul for the logits, got ", linears.size(), " and ", constants.size());
  TORCH_CHECK_VALUE(
      kv_heads >= 1 && heads >= kv_heads && heads % kv_heads == 0,
      "DecoderLayers: heads must be a multiple of kv_heads, got ", heads, " and ", kv_heads);
  TORCH_CHECK_VALUE(
      is_plain(embedding, at::kFloat) && embedding.dim() == 2,
      "DecoderLayers: embedding must be float32 [vocabulary + 1, dim] on the CPU, strided, got ", described(embedding));
  embedding_ = embedding.contiguous();
  const int64_t dim = embedding_.size(1);
  const at::Tensor& null_key = constants.front();
  TORCH_CHECK_VALUE(
      is_plain(null_key, at::kFloat) && null_key.dim() == 2 && null_key.size(0) == heads && null_key.size(1) >= 2 &&
          null_key.size(1) % 2 == 0,
      "DecoderLayers: null_key of layer 0 must be float32 [", heads, ", an even size] on the CPU, strided, got ",
      described(null_key));
  head_size_ = null_key.size(1);
  const int64_t width = heads * head_size_;
  const auto check_linear = [](int64_t layer, const char* name, const auto& linear, int64_t outputs, int64_t features) {
    TORCH_CHECK_VALUE(
        linear && linear->outputs() == outputs && linear->features() == features, "DecoderLayers: ", name, " of layer ",
        layer, " must have a weight [", outputs, ", ", features, "], got ",
        linear ? c10::str(c10::IntArrayRef{linear->outputs(), linear->features()}) : "none");
  };
  for (int64_t i = 0; i < count; ++i) {
    const auto* linear = linears.data() + i * kLinears;
    auto* constant = constants.data() + i * kConstants;
    TORCH_CHECK_VALUE(linear[5] != nullptr, "DecoderLayers: down of layer ", i, " must be a PackedLinear, got none");
    const at::Tensor& bias = constant[3];
    TORCH_CHECK_VALUE(
        is_plain(bias, at::kFloat) && bias.dim() == 1 && bias.size(0) % 2 == 0 && bias.size(0) >= 2 &&
            bias.size(0) / 2 <= linear[5]->features(),
        "DecoderLayers: bias of layer ", i, " must be float32 [2 * inner] on the CPU, strided, inner at most ",
        linear[5]->features(), ", got ", described(bias));
    check_linear(i, "query_key_value", linear[0], width + 2 * kv_heads * head_size_, dim);
    check_linear(i, "self_output", linear[1], dim, width);
    check_linear(i, "cross_query", linear[2], width, dim);
    check_linear(i, "cross_output", linear[3], dim, width);
    check_linear(i, "up_gate", linear[4], bias.size(0), dim);
    check_linear(i, "down", linear[5], dim, linear[5]->features());
    const auto check_constant = [&](const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) {
      check_tensor("DecoderLayers", c10::str(name, " of layer ", i), tensor, at::kFloat, sizes);
    };
    check_constant("null_key", constant[0], {heads, head_size_});
    check_constant("null_value", constant[1], {heads, head_size_});
    check_constant("null_output", constant[2], {dim});
    check_constant("freqs", constant[4], {head_size_ / 2});
    for (int64_t j = 0; j < kConstants; ++j) {
      constant[j] = constant[j].contiguous();
    }
    layers_.push_back(
        {linear[0], linear[1], linear[2], linear[3], linear[4], linear[5], constant[0], constant[1], constant[2],
         constant[3], constant[4]});
  }
  logits_ = linears.back();
  TORCH_CHECK_VALUE(
      logits_ && logits_->features() == dim, "DecoderLayers: the logits' product must take ", dim, " features, got ",
      logits_ ? c10::str(logits_->features()) : "none");
  lay_together(linears);
  // what packing held in between is a third of the weights
  give_memory_back();
}

void DecoderLayers::check(
    const at::Tensor& inputs, const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values,
    const std::vector<at::Tensor>& memory_keys, const std::vector<at::Tensor>& memory_values,
    const at::Tensor& memory_lengths, const at::Tensor& ancestors, const at::Tensor& lengths) const {
  constexpr const char* name = "DecoderLayers";
  const size_t count = layers_.size();
  TORCH_CHECK_VALUE(
      keys.size() == count && values.size() == count && memory_keys.size() == count && memory_values.size() == count,
      "DecoderLayers: each layer must have caches and a memory, wanted ", count, " of each, got ", keys.size(), ", ",
      values.size(), ", ", memory_keys.size(), " and ", memory_values.size());
  TORCH_CHECK_VALUE(
      is_plain(inputs, at::kLong) && inputs.dim() == 2,
      "DecoderLayers: inputs must be int64 [utterances, beams] on the CPU, strided, got ", described(inputs));
  const int64_t utterances = inputs.size(0), beams = inputs.size(1);
  TORCH_CHECK_VALUE(
      is_plain(lengths, at::kLong) && lengths.dim() == 2 && lengths.size(1) == beams &&
          (lengths.size(0) == utterances || lengths.size(0) == 2 * utterances),
      "DecoderLayers: lengths must be int64 [", utterances, " or ", 2 * utterances, ", ", beams,
      "] on the CPU, strided, got ", described(lengths));
  const int64_t halves = lengths.size(0);
  TORCH_CHECK_VALUE(
      is_plain(ancestors, at::kByte) && ancestors.dim() == 3, "DecoderLayers: ancestors must be uint8 [", halves, ", ",
      beams, ", capacity] on the CPU, strided, got ", described(ancestors));
  const int64_t capacity = ancestors.size(2);
  check_tensor(name, "ancestors", ancestors, at::kByte, {halves, beams, capacity});
  check_tensor(name, "memory_lengths", memory_lengths, at::kLong, {utterances});
  for (size_t i = 0; i < count; ++i) {
    for (const auto* caches : {&keys, &values}) {
      const at::Tensor& cache = (*caches)[i];
      check_tensor(
          name, caches == &keys ? "keys" : "values", cache, at::kFloat,
          {halves * beams, kv_heads_, capacity, head_size_});
      TORCH_CHECK_VALUE(
          cache.stride(3) == 1,
          "DecoderLayers: keys and values must be contiguous in their last dimension, got strides ", cache.strides(),
          "; call .contiguous() when they are made");
    }
    const at::Tensor& memory = memory_keys[i];
    TORCH_CHECK_VALUE(
        is_plain(memory, at::kFloat) && memory.dim() == 4, "DecoderLayers: memory_keys must be float32 [", utterances,
        ", ", heads_, ", positions, ", head_size_, "] on the CPU, strided, got ", described(memory));
    const std::array<int64_t, 4> sizes{utterances, heads_, memory.size(2), head_size_};
    check_tensor(name, "memory_keys", memory, at::kFloat, sizes);
    check_tensor(name, "memory_values", memory_values[i], at::kFloat, sizes);
  }
}

at::Tensor DecoderLayers::step(
    const at::Tensor& inputs, std::vector<at::Tensor> keys, std::vector<at::Tensor> values,
    const std::vector<at::Tensor>& memory_keys, const std::vector<at::Tensor>& memory_values,
    const at::Tensor& memory_lengths, const at::Tensor& ancestors, const at::Tensor& lengths) const {
  // all of it before the first layer writes into its caches
  check(inputs, keys, values, memory_keys, memory_values, memory_lengths, ancestors, lengths);
  const size_t count = layers_.size();
  const int64_t utterances = inputs.size(0), beams = inputs.size(1), dim = embedding_.size(1);
  const int64_t rows = lengths.size(0) * beams, sourced = utterances * beams;
  const at::Tensor dense_inputs = inputs.contiguous();
  const auto* p_inputs = dense_inputs.const_data_ptr<int64_t>();
  at::Tensor x = at::empty({rows, dim}, embedding_.options());
  const auto* p_embedding = embedding_.const_data_ptr<float>();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t id = p_inputs[row % sourced];
    TORCH_CHECK_VALUE(
        id >= 0 && id < embedding_.size(0), "DecoderLayers: inputs must lie in 0..", embedding_.size(0) - 1, ", got ",
        id);
    std::memcpy(x.data_ptr<float>() + row * dim, p_embedding + id * dim, dim * sizeof(float));
  }
  const at::Tensor positions = lengths.reshape({rows});
  const at::Tensor written = lengths.add(1);
  const int64_t size = head_size_;
  for (size_t i = 0; i < count; ++i) {
    const Layer& layer = layers_[i];
    const at::Tensor projected =
        layer.query_key_value->forward(l2_normalize(x)).view({rows, 1, heads_ + 2 * kv_heads_, size});
    const at::Tensor query = projected.narrow(2, 0, heads_).view({lengths.size(0), beams, 1, heads_, size});
    profiled("spear_fast::append_kv", [&] {
      append_kv_cpu(
          projected.narrow(2, heads_, kv_heads_), projected.narrow(2, heads_ + kv_heads_, kv_heads_), layer.freqs,
          positions, keys[i], values[i]);
    });
    const at::Tensor attended = profiled("spear_fast::decode_self_attention", [&] {
      return decode_self_attention_cpu(
          query, layer.freqs, keys[i], values[i], ancestors, written, std::nullopt, std::nullopt, std::nullopt);
    });
    x = layer.self_output->added(attended.view({rows, heads_ * size}), x);

    at::Tensor conditional = x.narrow(0, 0, sourced);
    const at::Tensor asked =
        layer.cross_query->forward(l2_normalize(conditional)).view({utterances, beams, heads_, size});
    const at::Tensor seen = profiled("spear_fast::decode_cross_attention", [&] {
      return std::get<0>(decode_cross_attention_cpu(
          asked, memory_keys[i], memory_values[i], layer.null_key, layer.null_value, memory_lengths, false));
    });
    conditional = layer.cross_output->added(seen.view({sourced, heads_ * size}), conditional);
    if (rows > sourced) {
      // without its source the other half sees the null key alone, which needs no query
      at::Tensor unconditional = x.narrow(0, sourced, rows - sourced);
      add_row(unconditional, layer.null_output);
      x = conditional.data_ptr() == x.data_ptr() ? x : at::cat({conditional, unconditional});
    } else {
      x = conditional;
    }
    const at::Tensor gated = layer.up_gate->forward(l2_normalize(x));
    const at::Tensor inner =
        profiled("spear_fast::geglu", [&] { return geglu_cpu(gated, layer.bias, layer.down->features()); });
    x = layer.down->added(inner, x);
  }
  return logits_->forward(l2_normalize(x));
}

}  // namespace spear_fast
