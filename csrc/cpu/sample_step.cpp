#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <vector>

#include "../ops.h"
#include "../select/restrict.h"
#include "../select/sample.h"
#include "selection.h"

namespace spear_fast {
namespace {

// logits that are worth a thread of their own
constexpr int64_t kGrain = 4096;

// the first of the largest, NaN above all
template <typename acc_t>
int likeliest(const acc_t* values, int vocab) {
  int best = 0;
  for (int token = 1; token < vocab; ++token) {
    best = is_better(values[token], values[best]) ? token : best;
  }
  return best;
}

// weights = exp(values - the largest) of the tokens that top-k and top-p leave, zero of the others; returns their sum
template <typename acc_t>
double weigh(
    const acc_t* values, int vocab, acc_t most, int top_k, acc_t top_p, acc_t* weights,
    std::vector<Candidate<acc_t>>& heap) {
  double total = 0;
  const bool some = top_k > 0 && top_k < vocab;
  if (!some && !(top_p < 1)) {
    for (int token = 0; token < vocab; ++token) {
      weights[token] = std::exp(values[token] - most);
      total += weights[token];
    }
    return total;
  }
  heap.resize(vocab);
  for (int token = 0; token < vocab; ++token) {
    heap[token] = {values[token], token};
    weights[token] = 0;
  }
  // best first
  const auto order = [](const Candidate<acc_t>& a, const Candidate<acc_t>& b) { return comes_before(a, b); };
  const int count = some ? top_k : vocab;
  std::partial_sort(heap.begin(), heap.begin() + count, heap.end(), order);
  for (int rank = 0; rank < count; ++rank) {
    heap[rank].value = std::exp(heap[rank].value - most);
    total += heap[rank].value;
  }
  double before = 0, left = 0;
  for (int rank = 0; rank < count; ++rank) {
    // what comes before a token must not hold the share already; the first always stays
    if (top_p < 1 && rank > 0 && before >= top_p * total) {
      break;
    }
    weights[heap[rank].index] = heap[rank].value;
    left += heap[rank].value;
    before += heap[rank].value;
  }
  return left;
}

template <typename scalar_t>
const scalar_t* row_of(const std::optional<at::Tensor>& logits, int64_t utterance, int64_t beam) {
  return logits ? logits->const_data_ptr<scalar_t>() + utterance * logits->stride(0) + beam * logits->stride(1)
                : nullptr;
}

template <typename scalar_t, typename acc_t>
void sample(
    const std::optional<at::Tensor>& logits, const std::optional<at::Tensor>& null_logits,
    const std::optional<at::Tensor>& filtered, const SampleBuffers<acc_t>& b) {
  const int64_t grain = std::max<int64_t>(1, kGrain / (int64_t(b.beams) * b.vocab));
  at::parallel_for(0, b.utterances, grain, [&](int64_t begin, int64_t end) {
    const OneThread group;
    std::vector<acc_t> exact(b.vocab), source(b.vocab), allowed(b.vocab), weights(b.vocab);
    std::vector<Candidate<acc_t>> heap;
    for (int64_t u = begin; u < end; ++u) {
      if (!is_live<acc_t>(b, u, kSample)) {
        continue;
      }
      const acc_t temperature = b.float_param(u, kTemperature);
      for (int beam = 0; beam < b.size_of(u); ++beam) {
        if (b.finished[u * b.beams + beam]) {
          continue;
        }
        const int64_t steps = b.lengths[u * b.beams + beam];
        mix_row(
            row_of<scalar_t>(logits, u, beam), row_of<scalar_t>(null_logits, u, beam), b.vocab,
            b.float_param(u, kGuidance), acc_t(1), exact.data());
        const acc_t* values = exact.data();
        if (filtered) {
          mix_row<scalar_t, acc_t>(row_of<scalar_t>(filtered, u, beam), nullptr, b.vocab, 1, 1, source.data());
          values = source.data();
        }
        restrict_values<OneThread, acc_t>(group, b, u, beam, steps, false, values, allowed.data());
        int token = likeliest(allowed.data(), b.vocab);
        const bool nothing_left = allowed[token] == minus_infinite<acc_t>();
        if (temperature > acc_t(kColdest) && !nothing_left) {
          mix_row<acc_t, acc_t>(allowed.data(), nullptr, b.vocab, 1, temperature, source.data());
          const double total = weigh(
              source.data(), b.vocab, source[token], b.int_param(u, kTopK), b.float_param(u, kTopP), weights.data(),
              heap);
          // not of NaN
          if (total > 0) {
            token = draw_token(weights.data(), 0, b.vocab, 0.0, uniform_number(b.seeds[u], steps, beam) * total);
          }
        }
        const acc_t most = largest(exact.data(), b.vocab);
        const acc_t logprob = (exact[token] - most) - std::log(sum_exponentials(exact.data(), b.vocab, most));
        append_token<acc_t>(b, u, beam, steps, token, nothing_left ? minus_infinite<acc_t>() : logprob);
      }
      b.done[u] = all_ended(b, u);
    }
  });
}

}  // namespace

void sample_step_cpu(
    const at::Tensor& logits, const std::optional<at::Tensor>& null_logits, const std::optional<at::Tensor>& filtered,
    const at::Tensor& float_params, const at::Tensor& int_params, const at::Tensor& prefix, const at::Tensor& seeds,
    at::Tensor& inputs, at::Tensor& scores, at::Tensor& lengths, at::Tensor& ancestors, at::Tensor& tokens,
    at::Tensor& parents, at::Tensor& logprobs, at::Tensor& finished, at::Tensor& done) {
  const char* op = "sample_step";
  check_selection(op, logits, float_params, int_params, prefix, scores, lengths, ancestors, tokens, done);
  check_same(op, scores, {&inputs, &scores, &finished});
  check_same(op, tokens, {&tokens, &parents, &logprobs});
  check_same(op, done, {&done, &seeds});
  check_same(op, lengths, {&lengths});
  check_same(op, ancestors, {&ancestors});
  check_same(op, float_params, {&float_params});
  check_same(op, int_params, {&int_params});
  check_same(op, prefix, {&prefix});
  std::optional<at::Tensor> rows[3] = {logits, null_logits, filtered};
  for (auto& row : rows) {
    TORCH_CHECK(
        !row || (row->sizes() == logits.sizes() && row->scalar_type() == logits.scalar_type()),
        "sample_step: the shapes of the arguments do not fit each other");
    row = row ? std::optional(dense_logits(*row)) : std::nullopt;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "sample_step", [&] {
    using acc_t = accumulate_t<scalar_t>;
    SampleBuffers<acc_t> b;
    fill_buffers<acc_t>(
        b, logits, float_params, int_params, prefix, inputs, scores, lengths, ancestors, tokens, parents, logprobs,
        done);
    b.seeds = seeds.const_data_ptr<int64_t>();
    b.finished = finished.data_ptr<bool>();
    for (int64_t u = 0; u < b.utterances; ++u) {
      if (!is_live<acc_t>(b, u, kSample)) {
        continue;
      }
      check_utterance<acc_t>(op, b, u);
      for (int beam = 0; beam < b.size_of(u); ++beam) {
        if (!b.finished[u * b.beams + beam]) {
          check_steps(op, b.lengths[u * b.beams + beam], b.capacity);
        }
      }
    }
    sample<scalar_t, acc_t>(rows[0], rows[1], rows[2], b);
  });
}

}  // namespace spear_fast
