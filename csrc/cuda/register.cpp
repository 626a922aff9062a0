// the CUDA ops for torch: arguments from tensors, the launch on the current stream
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <type_traits>

#include "decode_self_attention.h"
#include "launch.h"
#include "tensors.h"

namespace spear_fast {
namespace {

at::Tensor decode_self_attention_cuda(
    const at::Tensor& query, const at::Tensor& freqs, const at::Tensor& cache_key, const at::Tensor& cache_value,
    const at::Tensor& ancestors, const at::Tensor& lengths) {
  constexpr const char* op = "decode_self_attention";
  // the caller's mistakes are explained in Python; these keep a direct caller inside the buffers
  TORCH_CHECK(
      query.dim() == 5 && query.size(4) % 2 == 0 && freqs.dim() == 1 && freqs.size(0) * 2 == query.size(4) &&
          cache_key.dim() == 4 && cache_key.sizes() == cache_value.sizes() &&
          cache_key.size(0) == query.size(0) * query.size(1) && cache_key.size(1) > 0 &&
          query.size(3) % cache_key.size(1) == 0 && cache_key.size(3) == query.size(4) && ancestors.dim() == 3 &&
          ancestors.size(0) == query.size(0) && ancestors.size(1) == query.size(1) &&
          ancestors.size(2) == cache_key.size(2) && lengths.sizes() == query.sizes().slice(0, 2),
      op, ": the shapes of the arguments do not fit each other");
  TORCH_CHECK(
      cache_key.scalar_type() == query.scalar_type() && cache_value.scalar_type() == query.scalar_type() &&
          freqs.scalar_type() == at::kFloat && ancestors.scalar_type() == at::kByte &&
          lengths.scalar_type() == at::kLong,
      op, ": the dtypes of the arguments do not fit each other");
  for (const at::Tensor* each : {&freqs, &cache_key, &cache_value, &ancestors, &lengths}) {
    TORCH_CHECK(each->device() == query.device(), op, ": all arguments must be on ", query.device());
  }
  TORCH_CHECK_VALUE(
      cache_key.stride(3) == 1 && cache_value.stride(3) == 1, op,
      ": the caches must be contiguous in their last dimension; call .contiguous() when they are made");
  TORCH_CHECK_VALUE(
      query.size(4) * static_cast<int64_t>(query.element_size()) <= 512, op,
      ": heads must take at most 512 bytes, got ", query.size(4), " numbers; use another provider");
  const c10::DeviceGuard guard(query.device());
  auto out = at::empty(query.sizes(), query.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) {
    return out;
  }
  const int64_t size = query.size(4), buffer = cache_key.size(2);
  const bool aligned = is_aligned(cache_key, size) && is_aligned(cache_value, size);
  const SelfAttentionPlan plan = plan_self_attention(
      query.size(0), query.size(1), query.size(2), query.size(3), cache_key.size(1), size, buffer,
      static_cast<int64_t>(query.element_size()), aligned);
  TORCH_CHECK_VALUE(plan.blocks < 1LL << 31, op, ": the batch needs too many blocks (", plan.blocks, "); split it");
  const auto partial = at::empty({plan.partial}, query.options().dtype(at::kFloat));

  SelfAttention a{};
  a.query = query.const_data_ptr();
  a.freqs = freqs.const_data_ptr<float>();
  a.cache_key = cache_key.const_data_ptr();
  a.cache_value = cache_value.const_data_ptr();
  a.ancestors = ancestors.const_data_ptr<uint8_t>();
  a.lengths = reinterpret_cast<const long long*>(lengths.const_data_ptr<int64_t>());
  a.out = out.mutable_data_ptr();
  a.partial = partial.mutable_data_ptr<float>();
  a.utterances = query.size(0);
  a.beams = query.size(1);
  a.tokens = query.size(2);
  a.heads = query.size(3);
  a.groups = cache_key.size(1);
  a.size = size;
  a.buffer = buffer;
  a.splits = plan.splits;
  a.tiles = plan.tiles;
  a.query_utterance = query.stride(0);
  a.query_beam = query.stride(1);
  a.query_token = query.stride(2);
  a.query_head = query.stride(3);
  a.query_element = query.stride(4);
  a.freqs_element = freqs.stride(0);
  a.key_row = cache_key.stride(0);
  a.key_group = cache_key.stride(1);
  a.key_position = cache_key.stride(2);
  a.value_row = cache_value.stride(0);
  a.value_group = cache_value.stride(1);
  a.value_position = cache_value.stride(2);
  a.ancestors_utterance = ancestors.stride(0);
  a.ancestors_beam = ancestors.stride(1);
  a.ancestors_position = ancestors.stride(2);
  a.lengths_utterance = lengths.stride(0);
  a.lengths_beam = lengths.stride(1);
  check_launch(op, for_scalar(op, query, [&](auto* scalar) {
                 return launch_self_attention<std::remove_pointer_t<decltype(scalar)>>(
                     a, aligned, plan, current_stream(query));
               }));
  return out;
}

}  // namespace
}  // namespace spear_fast

TORCH_LIBRARY_IMPL(spear_fast, CUDA, library) {
  library.impl("decode_self_attention.cuda", TORCH_FN(spear_fast::decode_self_attention_cuda));
}
