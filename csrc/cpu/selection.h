// what the two selection ops share on the CPU: their buffers from tensors, and rows of logits
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>
#include <optional>

#include "../select/buffers.h"
#include "exponential.h"
#include "lanes.h"

namespace spear_fast {

inline void check_selection(
    const char* op, const at::Tensor& logits, const at::Tensor& float_params, const at::Tensor& int_params,
    const at::Tensor& prefix, const at::Tensor& scores, const at::Tensor& lengths, const at::Tensor& ancestors,
    const at::Tensor& tokens, const at::Tensor& done) {
  // the caller's mistakes are explained in Python; these keep a direct caller inside the buffers
  TORCH_CHECK(
      logits.dim() == 3 && logits.size(1) >= 1 && logits.size(1) <= 256 && logits.size(2) >= 1 &&
          float_params.dim() == 2 && float_params.size(0) == logits.size(0) && float_params.size(1) == kFloatParams &&
          int_params.dim() == 2 && int_params.size(0) == logits.size(0) && int_params.size(1) == kIntParams &&
          prefix.dim() == 2 && prefix.size(0) == logits.size(0) && lengths.dim() == 2 &&
          lengths.size(1) == logits.size(1) &&
          (lengths.size(0) == logits.size(0) || lengths.size(0) == 2 * logits.size(0)) && tokens.dim() == 3 &&
          tokens.size(0) == logits.size(0) && tokens.size(2) == logits.size(1) && ancestors.dim() == 3 &&
          ancestors.size(0) == lengths.size(0) && ancestors.size(1) == logits.size(1) &&
          ancestors.size(2) == tokens.size(1) && done.dim() == 1 && done.size(0) == logits.size(0) &&
          scores.dim() == 2 && scores.size(0) == logits.size(0) && scores.size(1) == logits.size(1),
      op, ": the shapes of the arguments do not fit each other");
}

inline void check_same(const char* op, const at::Tensor& like, std::initializer_list<const at::Tensor*> others) {
  for (const at::Tensor* other : others) {
    TORCH_CHECK(
        other->sizes() == like.sizes() && other->is_contiguous(), op,
        ": the shapes of the arguments do not fit each other");
  }
}

template <typename acc_t>
void fill_buffers(
    Buffers<acc_t>& b, const at::Tensor& logits, const at::Tensor& float_params, const at::Tensor& int_params,
    const at::Tensor& prefix, at::Tensor& inputs, at::Tensor& scores, at::Tensor& lengths, at::Tensor& ancestors,
    at::Tensor& tokens, at::Tensor& parents, at::Tensor& logprobs, at::Tensor& done) {
  b.utterances = logits.size(0);
  b.beams = static_cast<int>(logits.size(1));
  b.vocab = static_cast<int>(logits.size(2));
  b.capacity = tokens.size(1);
  b.halves = lengths.size(0) == 2 * logits.size(0) && logits.size(0) ? 2 : 1;
  b.prefix_width = static_cast<int>(prefix.size(1));
  b.float_params = float_params.const_data_ptr<acc_t>();
  b.int_params = int_params.const_data_ptr<int32_t>();
  b.prefix = prefix.const_data_ptr<int32_t>();
  b.inputs = inputs.data_ptr<int64_t>();
  b.scores = scores.data_ptr<acc_t>();
  b.lengths = lengths.data_ptr<int64_t>();
  b.ancestors = ancestors.data_ptr<uint8_t>();
  b.tokens = tokens.data_ptr<int32_t>();
  b.parents = parents.data_ptr<uint8_t>();
  b.logprobs = logprobs.data_ptr<acc_t>();
  b.done = done.data_ptr<bool>();
}

// raises where an utterance's settings, or its steps so far, lead out of the buffers
template <typename acc_t>
void check_utterance(const char* op, const Buffers<acc_t>& b, int64_t utterance) {
  const auto within = [&](const char* name, int64_t value, int64_t least, int64_t limit) {
    TORCH_CHECK_VALUE(
        least <= value && value <= limit, op, ": ", name, " must lie in ", least, "..", limit, ", got ", value,
        " for utterance ", utterance, "; correct the utterance's settings");
  };
  within("beam_size", b.int_param(utterance, kBeamSize), 1, b.beams);
  within("eos_id", b.int_param(utterance, kEosId), -1, b.vocab - 1);
  within("prefix_length", b.int_param(utterance, kPrefixLength), 0, b.prefix_width);
}

inline void check_steps(const char* op, int64_t steps, int64_t capacity) {
  TORCH_CHECK_VALUE(
      steps >= 0 && steps < capacity, op, ": lengths must lie in 0..", capacity - 1, ", got ", steps,
      "; make the histories longer");
}

inline at::Tensor dense_logits(const at::Tensor& logits) {
  return logits.stride(2) == 1 || logits.size(2) == 1 ? logits : logits.contiguous();
}

// target = (null + (logits - null) * guidance) / temperature, without a null row the logits alone
template <typename scalar_t, typename acc_t>
inline void mix_row(
    const scalar_t* logits, const scalar_t* null, int64_t size, acc_t guidance, acc_t temperature, acc_t* target) {
  if (null != nullptr && guidance != 1) {
    for (int64_t i = 0; i < size; ++i) {
      const acc_t unconditional = static_cast<acc_t>(null[i]);
      target[i] = unconditional + (static_cast<acc_t>(logits[i]) - unconditional) * guidance;
    }
  } else {
    for (int64_t i = 0; i < size; ++i) {
      target[i] = static_cast<acc_t>(logits[i]);
    }
  }
  if (temperature != 1) {
    for (int64_t i = 0; i < size; ++i) {
      target[i] /= temperature;
    }
  }
}

// the largest of a row; NaN where there is one
template <typename acc_t>
inline acc_t largest(const acc_t* row, int64_t size) {
  constexpr int64_t step = Lanes<acc_t>::size();
  acc_t most = row[0];
  int64_t i = 0;
  if (size >= step) {
    Lanes<acc_t> lanes = Lanes<acc_t>::loadu(row);
    for (i = step; i + step <= size; i += step) {
      lanes = at::vec::maximum(lanes, Lanes<acc_t>::loadu(row + i));
    }
    most =
        at::vec::vec_reduce_all<acc_t>([](Lanes<acc_t>& x, Lanes<acc_t>& y) { return at::vec::maximum(x, y); }, lanes);
  }
  for (; i < size; ++i) {
    most = row[i] > most || is_nan(row[i]) ? row[i] : most;
  }
  return most;
}

// the sum of exp(row - most)
template <typename acc_t>
inline acc_t sum_exponentials(const acc_t* row, int64_t size, acc_t most) {
  constexpr int64_t step = Lanes<acc_t>::size();
  const Lanes<acc_t> top(most);
  Lanes<acc_t> sums(0);
  int64_t i = 0;
  for (; i + step <= size; i += step) {
    sums = sums + exponential(Lanes<acc_t>::loadu(row + i) - top);
  }
  if (i < size) {
    const auto rest = exponential(Lanes<acc_t>::loadu(row + i, size - i) - top);
    sums = sums + Lanes<acc_t>::set(Lanes<acc_t>(0), rest, size - i);
  }
  const auto sum = [](Lanes<acc_t>& a, Lanes<acc_t>& b) { return a + b; };
  return at::vec::vec_reduce_all<acc_t>(sum, sums);
}

// row = log_softmax(row)
template <typename acc_t>
inline void log_softmax_row(acc_t* row, int64_t size) {
  const acc_t most = largest(row, size);
  const acc_t total = std::log(sum_exponentials(row, size, most));
  for (int64_t i = 0; i < size; ++i) {
    row[i] = (row[i] - most) - total;
  }
}

}  // namespace spear_fast
