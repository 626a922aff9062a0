#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <vector>

#include "../ops.h"
#include "../select/beam.h"
#include "../select/restrict.h"
#include "selection.h"

namespace spear_fast {
namespace {

// logits that are worth a thread of their own
constexpr int64_t kGrain = 4096;

// offers a row's candidates; whole vectors of those that cannot enter are passed over at once
template <typename acc_t>
void offer_row(Best<acc_t>& best, const acc_t* row, int vocab, acc_t score, int first) {
  constexpr int64_t step = Lanes<acc_t>::size();
  int token = 0;
  for (; token < vocab && !best.full(); ++token) {
    best.offer({score + row[token], first + token});
  }
  const Lanes<acc_t> scores(score);
  for (; token + step <= vocab; token += step) {
    const Lanes<acc_t> values = scores + Lanes<acc_t>::loadu(row + token);
    // true of NaN too
    if ((values <= Lanes<acc_t>(best.threshold())).zero_mask() == 0) {
      continue;
    }
    for (int64_t i = 0; i < step; ++i) {
      best.offer({score + row[token + i], first + token + static_cast<int>(i)});
    }
  }
  for (; token < vocab; ++token) {
    best.offer({score + row[token], first + token});
  }
}

template <typename scalar_t, typename acc_t>
void search(const at::Tensor& logits, const std::optional<at::Tensor>& null_logits, const BeamBuffers<acc_t>& b) {
  const auto* p_logits = logits.const_data_ptr<scalar_t>();
  const scalar_t* p_null = null_logits ? null_logits->const_data_ptr<scalar_t>() : nullptr;
  const int64_t grain = std::max<int64_t>(1, kGrain / (int64_t(b.beams) * b.vocab));
  at::parallel_for(0, b.utterances, grain, [&](int64_t begin, int64_t end) {
    const OneThread group;
    std::vector<acc_t> likely(int64_t(b.beams) * b.vocab), ranked(b.vocab);
    std::vector<Candidate<acc_t>> candidates(2 * b.beams);
    std::vector<Next<acc_t>> next(b.beams);
    std::vector<uint8_t> bytes(b.beams * b.capacity);
    for (int64_t u = begin; u < end; ++u) {
      if (!is_live<acc_t>(b, u, kBeam)) {
        continue;
      }
      const int size = b.size_of(u);
      const int64_t steps = b.lengths[u * b.beams];
      const acc_t guidance = b.float_param(u, kGuidance);
      const acc_t temperature = std::max(b.float_param(u, kTemperature), acc_t(kColdest));
      const bool restricted = is_restricted<acc_t>(b, u, steps);
      Best<acc_t> best(candidates.data(), 2 * size);
      for (int beam = 0; beam < size; ++beam) {
        acc_t* row = likely.data() + int64_t(beam) * b.vocab;
        const int64_t unconditional =
            p_null == nullptr ? 0 : u * null_logits->stride(0) + beam * null_logits->stride(1);
        mix_row(
            p_logits + u * logits.stride(0) + beam * logits.stride(1),
            p_null == nullptr ? nullptr : p_null + unconditional, b.vocab, guidance, temperature, row);
        log_softmax_row(row, b.vocab);
        if (restricted) {
          restrict_values<OneThread, acc_t>(group, b, u, beam, steps, true, row, ranked.data());
          row = ranked.data();
        }
        offer_row(best, row, b.vocab, b.scores[u * b.beams + beam], beam * b.vocab);
      }
      best.fill_up();
      const bool over = sort_out(b, u, steps, candidates.data(), likely.data(), next.data());
      move_ancestors(group, b, u, steps, next.data(), bytes.data(), b.capacity);
      write_next(group, b, u, steps, next.data(), over);
    }
  });
}

}  // namespace

void beam_step_cpu(
    const at::Tensor& logits, const std::optional<at::Tensor>& null_logits, const at::Tensor& float_params,
    const at::Tensor& int_params, const at::Tensor& prefix, at::Tensor& inputs, at::Tensor& scores, at::Tensor& lengths,
    at::Tensor& ancestors, at::Tensor& tokens, at::Tensor& parents, at::Tensor& logprobs, at::Tensor& pool_scores,
    at::Tensor& pool_beams, at::Tensor& pool_ends, at::Tensor& pool_finished, at::Tensor& pool_last_logprobs,
    at::Tensor& ended, at::Tensor& done) {
  const char* op = "beam_step";
  check_selection(op, logits, float_params, int_params, prefix, scores, lengths, ancestors, tokens, done);
  check_same(
      op, scores, {&inputs, &scores, &pool_scores, &pool_beams, &pool_ends, &pool_finished, &pool_last_logprobs});
  check_same(op, tokens, {&tokens, &parents, &logprobs});
  check_same(op, done, {&done, &ended});
  check_same(op, lengths, {&lengths});
  check_same(op, ancestors, {&ancestors});
  check_same(op, float_params, {&float_params});
  check_same(op, int_params, {&int_params});
  check_same(op, prefix, {&prefix});
  TORCH_CHECK(
      !null_logits || (null_logits->sizes() == logits.sizes() && null_logits->scalar_type() == logits.scalar_type()),
      "beam_step: the shapes of the arguments do not fit each other");
  const auto rows = dense_logits(logits);
  const auto null_rows = null_logits ? std::optional(dense_logits(*null_logits)) : std::nullopt;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "beam_step", [&] {
    using acc_t = accumulate_t<scalar_t>;
    BeamBuffers<acc_t> b;
    fill_buffers<acc_t>(
        b, logits, float_params, int_params, prefix, inputs, scores, lengths, ancestors, tokens, parents, logprobs,
        done);
    b.pool_scores = pool_scores.data_ptr<acc_t>();
    b.pool_beams = pool_beams.data_ptr<int64_t>();
    b.pool_ends = pool_ends.data_ptr<int64_t>();
    b.pool_finished = pool_finished.data_ptr<bool>();
    b.pool_last_logprobs = pool_last_logprobs.data_ptr<acc_t>();
    b.ended = ended.data_ptr<int64_t>();
    for (int64_t u = 0; u < b.utterances; ++u) {
      if (is_live<acc_t>(b, u, kBeam)) {
        check_utterance<acc_t>(op, b, u);
        check_steps(op, b.lengths[u * b.beams], b.capacity);
      }
    }
    search<scalar_t, acc_t>(rows, null_rows, b);
  });
}

}  // namespace spear_fast
