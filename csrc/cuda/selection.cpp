// the CUDA ops of selection for torch: arguments from tensors, the launch on the current stream
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <type_traits>

#include "../select/settings.h"
#include "beam_step.h"
#include "launch.h"
#include "tensors.h"

namespace spear_fast {
namespace {

using Shape = std::initializer_list<int64_t>;

// an argument's memory: contiguous, of this shape, type and device; ranges are looked at in Python's debug mode
template <typename T>
T* memory_of(const at::Tensor& tensor, const char* name, Shape shape, at::ScalarType type, const at::Tensor& like) {
  TORCH_CHECK(
      tensor.sizes() == at::IntArrayRef(shape) && tensor.is_contiguous() && tensor.scalar_type() == type &&
          tensor.device() == like.device(),
      "beam_step: ", name, " must be contiguous, ", type, " and ", at::IntArrayRef(shape), " on ", like.device(), ", got ",
      tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device(), "; see the op's docstring");
  return static_cast<T*>(tensor.data_ptr());
}

void beam_step_cuda(
    const at::Tensor& logits, const std::optional<at::Tensor>& null_logits, const at::Tensor& real_settings,
    const at::Tensor& whole_settings, const at::Tensor& prefix, at::Tensor& inputs, at::Tensor& scores,
    at::Tensor& lengths, at::Tensor& ancestors, at::Tensor& tokens, at::Tensor& parents, at::Tensor& logprobs,
    at::Tensor& pool_scores, at::Tensor& pool_slots, at::Tensor& pool_ends, at::Tensor& pool_finished,
    at::Tensor& pool_last_logprobs, at::Tensor& ended, at::Tensor& done) {
  // the caller's mistakes are explained in Python; these keep a direct caller inside the buffers
  TORCH_CHECK(
      logits.dim() == 3 && logits.size(1) >= 1 && logits.size(1) <= 256 && logits.size(2) >= 1 && prefix.dim() == 2 &&
          tokens.dim() == 3 && lengths.dim() == 2 &&
          (!null_logits || (null_logits->sizes() == logits.sizes() && null_logits->device() == logits.device() &&
                            null_logits->scalar_type() == logits.scalar_type())),
      "beam_step: the shapes of the arguments do not fit each other");
  const int64_t utterances = logits.size(0), beams = logits.size(1), vocab = logits.size(2);
  const int64_t capacity = tokens.size(1), halves = lengths.size(0) == utterances ? 1 : 2;
  const Shape pair = {utterances, beams}, history = {utterances, capacity, beams};
  const at::Tensor &blind = null_logits ? *null_logits : logits;
  const c10::DeviceGuard guard(logits.device());
  BeamStep a{};
  a.logits = logits.const_data_ptr();
  a.null_logits = null_logits ? null_logits->const_data_ptr() : nullptr;
  a.real_settings = memory_of<float>(real_settings, "real_settings", {utterances, kReals}, at::kFloat, logits);
  a.whole_settings = memory_of<int>(whole_settings, "whole_settings", {utterances, kWholes}, at::kInt, logits);
  a.prefix = memory_of<int>(prefix, "prefix", {utterances, prefix.size(1)}, at::kInt, logits);
  a.inputs = memory_of<long long>(inputs, "inputs", pair, at::kLong, logits);
  a.scores = memory_of<float>(scores, "scores", pair, at::kFloat, logits);
  a.lengths = memory_of<long long>(lengths, "lengths", {halves * utterances, beams}, at::kLong, logits);
  a.ancestors =
      memory_of<unsigned char>(ancestors, "ancestors", {halves * utterances, beams, capacity}, at::kByte, logits);
  a.tokens = memory_of<int>(tokens, "tokens", history, at::kInt, logits);
  a.parents = memory_of<unsigned char>(parents, "parents", history, at::kByte, logits);
  a.logprobs = memory_of<float>(logprobs, "logprobs", history, at::kFloat, logits);
  a.pool_scores = memory_of<float>(pool_scores, "pool_scores", pair, at::kFloat, logits);
  a.pool_slots = memory_of<long long>(pool_slots, "pool_slots", pair, at::kLong, logits);
  a.pool_ends = memory_of<long long>(pool_ends, "pool_ends", pair, at::kLong, logits);
  a.pool_finished = memory_of<bool>(pool_finished, "pool_finished", pair, at::kBool, logits);
  a.pool_last_logprobs = memory_of<float>(pool_last_logprobs, "pool_last_logprobs", pair, at::kFloat, logits);
  a.ended = memory_of<long long>(ended, "ended", {utterances}, at::kLong, logits);
  a.done = memory_of<bool>(done, "done", {utterances}, at::kBool, logits);
  // eight bytes a candidate, sixteen a hypothesis
  const auto values = at::empty({utterances * 2 * beams * vocab}, logits.options().dtype(at::kFloat));
  const auto candidates = at::empty({utterances * (beams + 1) * 2 * beams}, logits.options().dtype(at::kLong));
  const auto next = at::empty({utterances * beams * 2}, logits.options().dtype(at::kLong));
  a.values = values.mutable_data_ptr<float>();
  a.candidates = candidates.mutable_data_ptr();
  a.next = next.mutable_data_ptr();
  a.utterances = utterances;
  a.beams = beams;
  a.vocab = vocab;
  a.capacity = capacity;
  a.halves = halves;
  a.prefix_width = prefix.size(1);
  a.logits_utterance = logits.stride(0);
  a.logits_beam = logits.stride(1);
  a.logits_token = logits.stride(2);
  a.null_utterance = blind.stride(0);
  a.null_beam = blind.stride(1);
  a.null_token = blind.stride(2);
  check_launch("beam_step", for_scalar("beam_step", logits, [&](auto* scalar) {
    return launch_beam_step<std::remove_pointer_t<decltype(scalar)>>(a, current_stream(logits));
  }));
}

}  // namespace
}  // namespace spear_fast

TORCH_LIBRARY_IMPL(spear_fast, CUDA, library) {
  library.impl("beam_step.cuda", TORCH_FN(spear_fast::beam_step_cuda));
}
