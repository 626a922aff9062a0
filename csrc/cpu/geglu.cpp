#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../ops.h"
#include "gelu.h"
#include "inverse_rms.h"
#include "rows.h"

namespace spear_fast {
namespace {

// numbers that are worth a thread of their own
constexpr int64_t kGrain = 1 << 13;

// values and gates of one row, two vectors of each at a time
template <typename scalar_t>
struct Halves {
  using acc_t = accumulate_t<scalar_t>;
  const scalar_t* row;
  const scalar_t* bias;
  int64_t inner;
  // of the row before the bias
  acc_t scale = 1;

  template <typename Count>
  std::tuple<Lanes<acc_t>, Lanes<acc_t>> part(int64_t offset, Count count) const {
    auto [low, high] = load<acc_t>(row + offset, count);
    low = low * Lanes<acc_t>(scale);
    high = high * Lanes<acc_t>(scale);
    if (bias != nullptr) {
      const auto [bias_low, bias_high] = load<acc_t>(bias + offset, count);
      low = low + bias_low;
      high = high + bias_high;
    }
    return {low, high};
  }

  template <typename Count>
  auto values(int64_t offset, Count count) const {
    return part(offset, count);
  }

  template <typename Count>
  auto gates(int64_t offset, Count count) const {
    return part(inner + offset, count);
  }
};

template <typename scalar_t>
void activate(
    const at::Tensor& x, const at::Tensor& bias, int64_t rows, const std::optional<at::Tensor>& residual,
    at::Tensor& out) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t inner = x.size(-1) / 2, width = out.size(-1);
  const auto* p_x = x.const_data_ptr<scalar_t>();
  const auto* p_bias = pointer<scalar_t>(bias);
  auto* p_out = out.data_ptr<scalar_t>();
  const std::vector<acc_t> norms = inverse_rms<scalar_t>(residual);

  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Halves<scalar_t> halves{p_x + row * 2 * inner, p_bias, inner, norms.empty() ? acc_t(1) : norms[row]};
      scalar_t* target = p_out + row * width;
      for_steps<acc_t>(inner, [&](int64_t offset, auto count) {
        const auto [gate_low, gate_high] = halves.gates(offset, count);
        const auto [value_low, value_high] = halves.values(offset, count);
        const auto below_low = normal_distribution<acc_t>(gate_low).first;
        const auto below_high = normal_distribution<acc_t>(gate_high).first;
        store<acc_t>(target + offset, value_low * (gate_low * below_low), value_high * (gate_high * below_high), count);
      });
      std::fill(target + inner, target + width, scalar_t(0));
    }
  });
}

template <typename scalar_t>
void differentiate(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& bias, int64_t rows, at::Tensor& grad_x,
    at::Tensor& grad_bias) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t inner = x.size(-1) / 2, width = grad.size(-1);
  const auto* p_grad = grad.const_data_ptr<scalar_t>();
  const auto* p_x = x.const_data_ptr<scalar_t>();
  const auto* p_bias = pointer<scalar_t>(bias);
  auto* p_grad_x = grad_x.data_ptr<scalar_t>();
  // after the values' columns, so that both halves may be added in whole steps
  const int64_t gate_column = round_up<acc_t>(inner);

  const auto rows_of_a_part = [&](int64_t begin, int64_t end, ColumnSums<acc_t>* sums) {
    for (int64_t row = begin; row < end; ++row) {
      const Halves<scalar_t> halves{p_x + row * 2 * inner, p_bias, inner};
      scalar_t* target = p_grad_x + row * 2 * inner;
      for_steps<acc_t>(inner, [&](int64_t offset, auto count) {
        const auto [gate_low, gate_high] = halves.gates(offset, count);
        const auto [value_low, value_high] = halves.values(offset, count);
        const auto [grad_low, grad_high] = load<acc_t>(p_grad + row * width + offset, count);
        const auto [below_low, density_low] = normal_distribution<acc_t>(gate_low);
        const auto [below_high, density_high] = normal_distribution<acc_t>(gate_high);
        const auto to_value_low = grad_low * (gate_low * below_low);
        const auto to_value_high = grad_high * (gate_high * below_high);
        const auto to_gate_low = grad_low * value_low * at::vec::fmadd(gate_low, density_low, below_low);
        const auto to_gate_high = grad_high * value_high * at::vec::fmadd(gate_high, density_high, below_high);
        store<acc_t>(target + offset, to_value_low, to_value_high, count);
        store<acc_t>(target + inner + offset, to_gate_low, to_gate_high, count);
        if (sums != nullptr) {
          sums->add(offset, to_value_low, to_value_high);
          sums->add(gate_column + offset, to_gate_low, to_gate_high);
        }
      });
      if (sums != nullptr) {
        sums->end_row();
      }
    }
  };
  const int64_t grain = kGrain / std::max<int64_t>(inner, 1);
  if (p_bias == nullptr) {
    at::parallel_for(
        0, rows, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) { rows_of_a_part(begin, end, nullptr); });
    return;
  }
  std::vector<acc_t> columns(2 * gate_column);
  sum_rows<acc_t>(rows, 2 * gate_column, grain, columns.data(), [&](int64_t begin, int64_t end, auto& sums) {
    rows_of_a_part(begin, end, &sums);
  });
  auto* p_grad_bias = grad_bias.data_ptr<scalar_t>();
  for (int64_t i = 0; i < inner; ++i) {
    p_grad_bias[i] = static_cast<scalar_t>(columns[i]);
    p_grad_bias[inner + i] = static_cast<scalar_t>(columns[gate_column + i]);
  }
}

int64_t rows_of(const at::Tensor& x) { return c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)); }

}  // namespace

at::Tensor geglu_cpu(
    const at::Tensor& x, const std::optional<at::Tensor>& bias, int64_t width,
    const std::optional<at::Tensor>& residual) {
  // the caller's mistakes are explained in Python; these keep a direct caller inside the buffers
  TORCH_CHECK(
      x.dim() > 0 && x.size(-1) % 2 == 0 && width >= x.size(-1) / 2 &&
          (!bias.has_value() || (bias->dim() == 1 && bias->size(0) == x.size(-1))) &&
          fits_residual(residual, rows_of(x), x),
      "geglu: the shapes of the arguments do not fit each other");
  TORCH_CHECK(!bias.has_value() || bias->scalar_type() == x.scalar_type(), "geglu: the dtypes of the arguments differ");
  auto shape = x.sizes().vec();
  shape.back() = width;
  auto out = at::empty(shape, x.options());
  if (out.numel() == 0) {
    return out;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "geglu", [&] {
    activate<scalar_t>(packed(x), packed(bias), rows_of(x), residual, out);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> geglu_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(
      x.dim() > 0 && x.size(-1) % 2 == 0 && grad.dim() == x.dim() && grad.size(-1) >= x.size(-1) / 2 &&
          grad.sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1) &&
          (!bias.has_value() || (bias->dim() == 1 && bias->size(0) == x.size(-1))),
      "geglu_backward: the shapes of the arguments do not fit each other");
  TORCH_CHECK(
      grad.scalar_type() == x.scalar_type() && (!bias.has_value() || bias->scalar_type() == x.scalar_type()),
      "geglu_backward: the dtypes of the arguments differ");
  auto grad_x = at::empty(x.sizes(), x.options());
  auto grad_bias = bias.has_value() ? at::empty(bias->sizes(), x.options()) : at::empty({0}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "geglu_backward", [&] {
    differentiate<scalar_t>(packed(grad), packed(x), packed(bias), rows_of(x), grad_x, grad_bias);
  });
  return {grad_x, grad_bias};
}

}  // namespace spear_fast
