#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>

#include "../ops.h"
#include "exponential.h"
#include "rows.h"

namespace spear_fast {
namespace {

// logits that are held at once: enough rows for a product at full speed
constexpr int64_t kLogits = 1 << 20;
// logits that are worth a thread of their own
constexpr int64_t kGrain = 1 << 13;

void check_labels(const at::Tensor& labels, int64_t vocabulary, int64_t ignore_index) {
  const auto* p_labels = labels.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < labels.numel(); ++row) {
    const int64_t label = p_labels[row];
    TORCH_CHECK_VALUE(
        label == ignore_index || (label >= 0 && label < vocabulary), "cross_entropy: labels must lie in 0..",
        vocabulary - 1, ", got ", label, " in row ", row, "; pass ids of the vocabulary, or ", ignore_index,
        " for what is ignored");
  }
}

int64_t rows_at_once(int64_t vocabulary) { return std::max<int64_t>(1, kLogits / vocabulary); }

template <typename acc_t>
acc_t largest_of(const acc_t* logits, int64_t count) {
  constexpr int64_t width = Lanes<acc_t>::size();
  const int64_t whole = count / width * width;
  Lanes<acc_t> lanes(-std::numeric_limits<acc_t>::infinity());
  for (int64_t i = 0; i < whole; i += width) {
    lanes = at::vec::maximum(lanes, Lanes<acc_t>::loadu(logits + i));
  }
  alignas(64) acc_t each[width];
  lanes.store(each);
  acc_t largest = each[0];
  // written so that a logit that is no number is kept
  for (const acc_t lane : each) {
    largest = lane > largest || lane != lane ? lane : largest;
  }
  for (int64_t i = whole; i < count; ++i) {
    largest = logits[i] > largest || logits[i] != logits[i] ? logits[i] : largest;
  }
  return largest;
}

template <typename acc_t>
acc_t sum_of_exponentials(const acc_t* logits, int64_t count, acc_t largest) {
  constexpr int64_t width = Lanes<acc_t>::size();
  const int64_t whole = count / width * width;
  Lanes<acc_t> sums(0);
  for (int64_t i = 0; i < whole; i += width) {
    sums = sums + exponential(Lanes<acc_t>::loadu(logits + i) - Lanes<acc_t>(largest));
  }
  acc_t sum = sum_of<acc_t>(sums);
  for (int64_t i = whole; i < count; ++i) {
    sum += std::exp(logits[i] - largest);
  }
  return sum;
}

// calls body(first row, rows, hidden [rows, dim], logits [rows, vocabulary]) for chunks of rows
template <typename acc_t, typename Body>
void for_chunks(const at::Tensor& hidden, const at::Tensor& matrix, const Body& body) {
  const int64_t most = rows_at_once(matrix.size(0));
  auto buffer = at::empty({std::min(most, hidden.size(0)), matrix.size(0)}, matrix.options());
  const auto transposed = matrix.t();
  for (int64_t start = 0; start < hidden.size(0); start += most) {
    const int64_t count = std::min(most, hidden.size(0) - start);
    const auto rows = hidden.narrow(0, start, count).to(matrix.scalar_type());
    auto logits = buffer.narrow(0, 0, count);
    at::mm_out(logits, rows, transposed);
    body(start, count, rows, logits);
  }
}

template <typename acc_t>
void compute(
    const at::Tensor& hidden, const at::Tensor& matrix, const int64_t* labels, int64_t ignore_index, at::Tensor& losses,
    at::Tensor& lse) {
  const int64_t vocabulary = matrix.size(0);
  auto* p_losses = losses.data_ptr<acc_t>();
  auto* p_lse = lse.data_ptr<acc_t>();
  for_chunks<acc_t>(hidden, matrix, [&](int64_t start, int64_t count, const at::Tensor&, const at::Tensor& logits) {
    const auto* p_logits = logits.const_data_ptr<acc_t>();
    at::parallel_for(0, count, std::max<int64_t>(1, kGrain / vocabulary), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const acc_t* row_logits = p_logits + row * vocabulary;
        const acc_t largest = largest_of(row_logits, vocabulary);
        const acc_t rest = std::log(sum_of_exponentials(row_logits, vocabulary, largest));
        const int64_t label = labels[start + row];
        p_lse[start + row] = largest + rest;
        // large logits cancel before the small rest is added
        p_losses[start + row] = label == ignore_index ? acc_t(0) : largest - row_logits[label] + rest;
      }
    });
  });
}

template <typename acc_t>
void differentiate(
    const at::Tensor& grad_losses, const at::Tensor& hidden, const at::Tensor& matrix, const int64_t* labels,
    const at::Tensor& lse, int64_t ignore_index, at::Tensor& grad_hidden, at::Tensor& grad_matrix) {
  constexpr int64_t width = Lanes<acc_t>::size();
  const int64_t vocabulary = matrix.size(0), whole = vocabulary / width * width;
  const auto* p_grads = grad_losses.const_data_ptr<acc_t>();
  const auto* p_lse = lse.const_data_ptr<acc_t>();
  for_chunks<acc_t>(hidden, matrix, [&](int64_t start, int64_t count, const at::Tensor& rows, at::Tensor& logits) {
    auto* p_logits = logits.data_ptr<acc_t>();
    at::parallel_for(0, count, std::max<int64_t>(1, kGrain / vocabulary), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        // the logits become their gradients in place
        acc_t* row_logits = p_logits + row * vocabulary;
        const int64_t label = labels[start + row];
        if (label == ignore_index) {
          std::fill_n(row_logits, vocabulary, acc_t(0));
          continue;
        }
        const acc_t grad = p_grads[start + row], sum = p_lse[start + row];
        for (int64_t i = 0; i < whole; i += width) {
          const auto share = exponential(Lanes<acc_t>::loadu(row_logits + i) - Lanes<acc_t>(sum));
          (share * Lanes<acc_t>(grad)).store(row_logits + i);
        }
        for (int64_t i = whole; i < vocabulary; ++i) {
          row_logits[i] = std::exp(row_logits[i] - sum) * grad;
        }
        row_logits[label] -= grad;
      }
    });
    auto target = grad_hidden.narrow(0, start, count);
    if (target.scalar_type() == matrix.scalar_type()) {
      at::mm_out(target, logits, matrix);
    } else {
      target.copy_(at::mm(logits, matrix));
    }
    grad_matrix.addmm_(logits.t(), rows);
  });
}

void check(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels, const char* op) {
  TORCH_CHECK(
      hidden.dim() == 2 && weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == hidden.size(1) &&
          labels.dim() == 1 && labels.size(0) == hidden.size(0),
      op, ": the shapes of the arguments do not fit each other");
  TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(), op, ": the dtypes of the arguments differ");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> cross_entropy_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels, int64_t ignore_index) {
  // the caller's mistakes are explained in Python; these keep a direct caller inside the buffers
  check(hidden, weight, labels, "cross_entropy");
  const auto ids = labels.contiguous();
  check_labels(ids, weight.size(0), ignore_index);
  const auto type = accumulation_type(hidden.scalar_type());
  auto losses = at::empty({hidden.size(0)}, hidden.options().dtype(type));
  auto lse = at::empty({hidden.size(0)}, hidden.options().dtype(type));
  AT_DISPATCH_FLOATING_TYPES(type, "cross_entropy", [&] {
    compute<scalar_t>(hidden, weight.to(type), ids.const_data_ptr<int64_t>(), ignore_index, losses, lse);
  });
  return {losses, lse};
}

std::tuple<at::Tensor, at::Tensor> cross_entropy_backward_cpu(
    const at::Tensor& grad_losses, const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
    const at::Tensor& lse, int64_t ignore_index) {
  check(hidden, weight, labels, "cross_entropy_backward");
  const auto type = accumulation_type(hidden.scalar_type());
  TORCH_CHECK(
      grad_losses.sizes() == labels.sizes() && lse.sizes() == labels.sizes(),
      "cross_entropy_backward: the shapes of the arguments do not fit each other");
  TORCH_CHECK(
      grad_losses.scalar_type() == type && lse.scalar_type() == type,
      "cross_entropy_backward: the dtypes of the arguments differ");
  const auto ids = labels.contiguous();
  check_labels(ids, weight.size(0), ignore_index);
  auto grad_hidden = at::empty(hidden.sizes(), hidden.options());
  auto grad_matrix = at::zeros(weight.sizes(), weight.options().dtype(type));
  AT_DISPATCH_FLOATING_TYPES(type, "cross_entropy_backward", [&] {
    differentiate<scalar_t>(
        packed(grad_losses), hidden, weight.to(type), ids.const_data_ptr<int64_t>(), packed(lse), ignore_index,
        grad_hidden, grad_matrix);
  });
  return {grad_hidden, grad_matrix.to(weight.scalar_type())};
}

}  // namespace spear_fast
