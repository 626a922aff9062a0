#include "decoder_layers.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include <cmath>
#include <cstring>

#include "../ops.h"
#include "pages.h"
#include "rows.h"

namespace spear_fast {
namespace {

// numbers that are worth a thread of their own
constexpr int64_t kGrain = 1 << 14;
constexpr int64_t kLinears = 6, kConstants = 5;
constexpr float kSmallest = 1e-12F;

// returns x / max(||x||, 1e-12) of each row
at::Tensor unit(const at::Tensor& x) {
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
auto recorded(const char* name, const Part& part) {
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

// weights one behind the other, in the order in which a step reads them, so that they fill large pages
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
    : embedding_(embedding.contiguous()), heads_(heads), kv_heads_(kv_heads) {
  const auto count = static_cast<int64_t>(linears.size()) / kLinears;
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(linears.size()) == count * kLinears + 1 &&
          static_cast<int64_t>(constants.size()) == count * kConstants,
      "DecoderLayers: wanted ", kLinears, " products and ", kConstants, " constants a layer and one product for the logits, got ",
      linears.size(), " and ", constants.size());
  for (int64_t i = 0; i < count; ++i) {
    const auto* linear = linears.data() + i * kLinears;
    for (int64_t j = 0; j < kConstants; ++j) {
      constants[i * kConstants + j] = constants[i * kConstants + j].contiguous();
    }
    const auto* constant = constants.data() + i * kConstants;
    layers_.push_back(
        {linear[0], linear[1], linear[2], linear[3], linear[4], linear[5], constant[0], constant[1], constant[2], constant[3],
         constant[4]});
  }
  logits_ = linears.back();
  lay_together(linears);
  // what packing held in between is a third of the weights
  give_memory_back();
}

at::Tensor DecoderLayers::step(
    const at::Tensor& inputs, std::vector<at::Tensor> keys, std::vector<at::Tensor> values,
    const std::vector<at::Tensor>& memory_keys, const std::vector<at::Tensor>& memory_values,
    const at::Tensor& memory_lengths, const at::Tensor& ancestors, const at::Tensor& lengths) const {
  const size_t count = layers_.size();
  TORCH_CHECK_VALUE(
      inputs.dim() == 2 && inputs.scalar_type() == at::kLong && lengths.dim() == 2 && lengths.size(1) == inputs.size(1) &&
          (lengths.size(0) == inputs.size(0) || lengths.size(0) == 2 * inputs.size(0)) && keys.size() == count &&
          values.size() == count && memory_keys.size() == count && memory_values.size() == count,
      "DecoderLayers: the shapes of the arguments do not fit each other");
  const int64_t utterances = inputs.size(0), beams = inputs.size(1), dim = embedding_.size(1);
  const int64_t rows = lengths.size(0) * beams, sourced = utterances * beams;
  const at::Tensor dense_inputs = inputs.contiguous();
  const auto* p_inputs = dense_inputs.const_data_ptr<int64_t>();
  at::Tensor x = at::empty({rows, dim}, embedding_.options());
  const auto* p_embedding = embedding_.const_data_ptr<float>();
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t id = p_inputs[row % sourced];
    TORCH_CHECK_VALUE(
        id >= 0 && id < embedding_.size(0), "DecoderLayers: inputs must lie in 0..", embedding_.size(0) - 1, ", got ", id);
    std::memcpy(x.data_ptr<float>() + row * dim, p_embedding + id * dim, dim * sizeof(float));
  }
  const at::Tensor positions = lengths.reshape({rows});
  const at::Tensor written = lengths.add(1);
  const at::IntArrayRef sizes = layers_.front().null_key.sizes();
  const int64_t size = sizes[1];
  for (size_t i = 0; i < count; ++i) {
    const Layer& layer = layers_[i];
    const at::Tensor projected = layer.query_key_value->forward(unit(x)).view({rows, 1, heads_ + 2 * kv_heads_, size});
    const at::Tensor query = projected.narrow(2, 0, heads_).view({lengths.size(0), beams, 1, heads_, size});
    recorded("spear_fast::append_kv", [&] {
      append_kv_cpu(
          projected.narrow(2, heads_, kv_heads_), projected.narrow(2, heads_ + kv_heads_, kv_heads_), layer.freqs, positions,
          keys[i], values[i]);
    });
    const at::Tensor attended = recorded("spear_fast::decode_self_attention", [&] {
      return decode_self_attention_cpu(query, layer.freqs, keys[i], values[i], ancestors, written);
    });
    x = layer.self_output->added(attended.view({rows, heads_ * size}), x);

    at::Tensor sighted = x.narrow(0, 0, sourced);
    const at::Tensor asked = layer.cross_query->forward(unit(sighted)).view({utterances, beams, heads_, size});
    const at::Tensor seen = recorded("spear_fast::decode_cross_attention", [&] {
      return std::get<0>(decode_cross_attention_cpu(
          asked, memory_keys[i], memory_values[i], layer.null_key, layer.null_value, memory_lengths, false));
    });
    sighted = layer.cross_output->added(seen.view({sourced, heads_ * size}), sighted);
    if (rows > sourced) {
      // without its source the other half sees the null key alone, which needs no query
      at::Tensor blind = x.narrow(0, sourced, rows - sourced);
      add_row(blind, layer.null_output);
      x = sighted.data_ptr() == x.data_ptr() ? x : at::cat({sighted, blind});
    } else {
      x = sighted;
    }
    const at::Tensor both = layer.both->forward(unit(x));
    const at::Tensor inner = recorded(
        "spear_fast::geglu", [&] { return geglu_cpu(both, layer.bias, layer.last->features()); });
    x = layer.last->added(inner, x);
  }
  return logits_->forward(unit(x));
}

}  // namespace spear_fast
