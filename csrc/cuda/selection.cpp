// the CUDA ops of selection for torch: arguments from tensors, the launch on the current stream
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <type_traits>

#include "../select/params.h"
#include "beam_step.h"
#include "launch.h"
#include "sample_step.h"
#include "tensors.h"

namespace spear_fast {
namespace {

using Shape = std::initializer_list<int64_t>;

// an argument's memory: contiguous, of this shape, type and device; ranges are looked at in Python's debug mode
template <typename T>
T* memory_of(
    const char* op, const at::Tensor& tensor, const char* name, Shape shape, at::ScalarType type,
    const at::Tensor& like) {
  TORCH_CHECK(
      tensor.sizes() == at::IntArrayRef(shape) && tensor.is_contiguous() && tensor.scalar_type() == type &&
          tensor.device() == like.device(),
      op, ": ", name, " must be contiguous, ", type, " and ", at::IntArrayRef(shape), " on ", like.device(), ", got ",
      tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device(), "; see the op's docstring");
  return static_cast<T*>(tensor.data_ptr());
}

// memory and strides of logits that may be missing
void fill_logits(
    const char* op, const std::optional<at::Tensor>& rows, const at::Tensor& like, const void*& memory,
    long long& utterance, long long& beam, long long& token) {
  TORCH_CHECK(
      !rows ||
          (rows->sizes() == like.sizes() && rows->device() == like.device() &&
           rows->scalar_type() == like.scalar_type()),
      op, ": the shapes of the arguments do not fit each other");
  memory = rows ? rows->const_data_ptr() : nullptr;
  utterance = rows ? rows->stride(0) : 0;
  beam = rows ? rows->stride(1) : 0;
  token = rows ? rows->stride(2) : 0;
}

// what the two ops have in common; the caller's mistakes are explained in Python: this keeps a direct caller inside the
// buffers
template <typename Arguments>
void fill_common(
    const char* op, Arguments& a, const at::Tensor& logits, const std::optional<at::Tensor>& null_logits,
    const at::Tensor& float_params, const at::Tensor& int_params, const at::Tensor& prefix, at::Tensor& inputs,
    at::Tensor& scores, at::Tensor& lengths, at::Tensor& ancestors, at::Tensor& tokens, at::Tensor& parents,
    at::Tensor& logprobs, at::Tensor& done) {
  TORCH_CHECK(
      logits.dim() == 3 && logits.size(1) >= 1 && logits.size(1) <= 256 && logits.size(2) >= 1 && prefix.dim() == 2 &&
          tokens.dim() == 3 && lengths.dim() == 2,
      op, ": the shapes of the arguments do not fit each other");
  const int64_t utterances = logits.size(0), beams = logits.size(1), capacity = tokens.size(1);
  const int64_t halves = lengths.size(0) == utterances ? 1 : 2;
  const Shape pair = {utterances, beams}, history = {utterances, capacity, beams};
  fill_logits(op, logits, logits, a.logits, a.logits_utterance, a.logits_beam, a.logits_token);
  fill_logits(op, null_logits, logits, a.null_logits, a.null_utterance, a.null_beam, a.null_token);
  a.float_params = memory_of<float>(op, float_params, "float_params", {utterances, kFloatParams}, at::kFloat, logits);
  a.int_params = memory_of<int>(op, int_params, "int_params", {utterances, kIntParams}, at::kInt, logits);
  a.prefix = memory_of<int>(op, prefix, "prefix", {utterances, prefix.size(1)}, at::kInt, logits);
  a.inputs = memory_of<long long>(op, inputs, "inputs", pair, at::kLong, logits);
  a.scores = memory_of<float>(op, scores, "scores", pair, at::kFloat, logits);
  a.lengths = memory_of<long long>(op, lengths, "lengths", {halves * utterances, beams}, at::kLong, logits);
  a.ancestors =
      memory_of<unsigned char>(op, ancestors, "ancestors", {halves * utterances, beams, capacity}, at::kByte, logits);
  a.tokens = memory_of<int>(op, tokens, "tokens", history, at::kInt, logits);
  a.parents = memory_of<unsigned char>(op, parents, "parents", history, at::kByte, logits);
  a.logprobs = memory_of<float>(op, logprobs, "logprobs", history, at::kFloat, logits);
  a.done = memory_of<bool>(op, done, "done", {utterances}, at::kBool, logits);
  a.utterances = utterances;
  a.beams = beams;
  a.vocab = logits.size(2);
  a.capacity = capacity;
  a.halves = halves;
  a.prefix_width = prefix.size(1);
}

void beam_step_cuda(
    const at::Tensor& logits, const std::optional<at::Tensor>& null_logits, const at::Tensor& float_params,
    const at::Tensor& int_params, const at::Tensor& prefix, at::Tensor& inputs, at::Tensor& scores, at::Tensor& lengths,
    at::Tensor& ancestors, at::Tensor& tokens, at::Tensor& parents, at::Tensor& logprobs, at::Tensor& pool_scores,
    at::Tensor& pool_beams, at::Tensor& pool_ends, at::Tensor& pool_finished, at::Tensor& pool_last_logprobs,
    at::Tensor& ended, at::Tensor& done) {
  constexpr const char* op = "beam_step";
  const c10::DeviceGuard guard(logits.device());
  BeamStep a{};
  fill_common(
      op, a, logits, null_logits, float_params, int_params, prefix, inputs, scores, lengths, ancestors, tokens, parents,
      logprobs, done);
  const Shape pair = {a.utterances, a.beams};
  a.pool_scores = memory_of<float>(op, pool_scores, "pool_scores", pair, at::kFloat, logits);
  a.pool_beams = memory_of<long long>(op, pool_beams, "pool_beams", pair, at::kLong, logits);
  a.pool_ends = memory_of<long long>(op, pool_ends, "pool_ends", pair, at::kLong, logits);
  a.pool_finished = memory_of<bool>(op, pool_finished, "pool_finished", pair, at::kBool, logits);
  a.pool_last_logprobs = memory_of<float>(op, pool_last_logprobs, "pool_last_logprobs", pair, at::kFloat, logits);
  a.ended = memory_of<long long>(op, ended, "ended", {a.utterances}, at::kLong, logits);
  const auto values = at::empty({a.utterances * 2 * a.beams * a.vocab}, logits.options().dtype(at::kFloat));
  a.values = values.mutable_data_ptr<float>();
  check_launch(op, for_scalar(op, logits, [&](auto* scalar) {
                 return launch_beam_step<std::remove_pointer_t<decltype(scalar)>>(a, current_stream(logits));
               }));
}

void sample_step_cuda(
    const at::Tensor& logits, const std::optional<at::Tensor>& null_logits, const std::optional<at::Tensor>& filtered,
    const at::Tensor& float_params, const at::Tensor& int_params, const at::Tensor& prefix, const at::Tensor& seeds,
    at::Tensor& inputs, at::Tensor& scores, at::Tensor& lengths, at::Tensor& ancestors, at::Tensor& tokens,
    at::Tensor& parents, at::Tensor& logprobs, at::Tensor& finished, at::Tensor& done) {
  constexpr const char* op = "sample_step";
  const c10::DeviceGuard guard(logits.device());
  SampleStep a{};
  fill_common(
      op, a, logits, null_logits, float_params, int_params, prefix, inputs, scores, lengths, ancestors, tokens, parents,
      logprobs, done);
  fill_logits(op, filtered, logits, a.filtered, a.filtered_utterance, a.filtered_beam, a.filtered_token);
  a.seeds = memory_of<long long>(op, seeds, "seeds", {a.utterances}, at::kLong, logits);
  a.finished = memory_of<bool>(op, finished, "finished", {a.utterances, a.beams}, at::kBool, logits);
  const auto values = at::empty({a.utterances * 2 * a.beams * a.vocab}, logits.options().dtype(at::kFloat));
  a.values = values.mutable_data_ptr<float>();
  check_launch(op, for_scalar(op, logits, [&](auto* scalar) {
                 return launch_sample_step<std::remove_pointer_t<decltype(scalar)>>(a, current_stream(logits));
               }));
}

}  // namespace
}  // namespace spear_fast

TORCH_LIBRARY_IMPL(spear_fast, CUDA, library) {
  library.impl("beam_step.cuda", TORCH_FN(spear_fast::beam_step_cuda));
  library.impl("sample_step.cuda", TORCH_FN(spear_fast::sample_step_cuda));
}
