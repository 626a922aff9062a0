#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>

#include "../ops.h"
#include "rows.h"

namespace spear_fast {
namespace {

// numbers that are worth a thread of their own
constexpr int64_t kGrain = 1 << 14;
// the reference's, through torch.nn.functional.normalize
constexpr double kSmallestNorm = 1e-12;

template <typename scalar_t>
void normalise(
    const at::Tensor& x, const at::Tensor& gamma, const at::Tensor& residual, at::Tensor& normed, at::Tensor& sum,
    at::Tensor& inverse) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t size = x.size(-1), rows = inverse.numel();
  const acc_t root = std::sqrt(static_cast<acc_t>(size));
  const auto* p_x = x.const_data_ptr<scalar_t>();
  const auto* p_gamma = gamma.const_data_ptr<scalar_t>();
  const auto* p_residual = pointer<scalar_t>(residual);
  auto* p_normed = normed.data_ptr<scalar_t>();
  auto* p_sum = sum.data_ptr<scalar_t>();
  auto* p_inverse = inverse.data_ptr<acc_t>();

  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const scalar_t* source = p_x + row * size;
      if (p_residual != nullptr) {
        scalar_t* target = p_sum + row * size;
        for_steps<acc_t>(size, [&](int64_t offset, auto count) {
          const auto [x_low, x_high] = load<acc_t>(source + offset, count);
          const auto [low, high] = load<acc_t>(p_residual + row * size + offset, count);
          store<acc_t>(target + offset, x_low + low, x_high + high, count);
        });
        // the norm is of the sum as it is handed on, rounded
        source = target;
      }
      Lanes<acc_t> squares_low(0), squares_high(0);
      for_steps<acc_t>(size, [&](int64_t offset, auto count) {
        const auto [low, high] = load<acc_t>(source + offset, count);
        squares_low = at::vec::fmadd(low, low, squares_low);
        squares_high = at::vec::fmadd(high, high, squares_high);
      });
      const acc_t norm = std::sqrt(sum_of<acc_t>(squares_low + squares_high));
      // in this order a norm that is no number stays none
      const acc_t scale = root / (norm < static_cast<acc_t>(kSmallestNorm) ? static_cast<acc_t>(kSmallestNorm) : norm);
      p_inverse[row] = scale;
      const Lanes<acc_t> scales(scale);
      for_steps<acc_t>(size, [&](int64_t offset, auto count) {
        const auto [low, high] = load<acc_t>(source + offset, count);
        const auto [gamma_low, gamma_high] = load<acc_t>(p_gamma + offset, count);
        store<acc_t>(p_normed + row * size + offset, low * scales * gamma_low, high * scales * gamma_high, count);
      });
    }
  });
}

template <typename scalar_t>
void differentiate(
    const at::Tensor& grad_normed, const at::Tensor& grad_sum, const at::Tensor& x, const at::Tensor& gamma,
    const at::Tensor& inverse, at::Tensor& grad_x, at::Tensor& grad_gamma) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t size = x.size(-1), rows = inverse.numel();
  // slightly below, so that another provider's rounding of the inverse does not matter
  const acc_t constant = std::sqrt(static_cast<acc_t>(size)) / static_cast<acc_t>(kSmallestNorm) * acc_t(1 - 1e-6);
  const auto* p_grad = grad_normed.const_data_ptr<scalar_t>();
  const auto* p_grad_sum = pointer<scalar_t>(grad_sum);
  const auto* p_x = x.const_data_ptr<scalar_t>();
  const auto* p_gamma = gamma.const_data_ptr<scalar_t>();
  const auto* p_inverse = inverse.const_data_ptr<acc_t>();
  auto* p_grad_x = grad_x.data_ptr<scalar_t>();

  const auto rows_of_a_part = [&](int64_t begin, int64_t end, ColumnSums<acc_t>& grad_gammas) {
    for (int64_t row = begin; row < end; ++row) {
      const scalar_t* source = p_x + row * size;
      const scalar_t* grad = p_grad + row * size;
      const Lanes<acc_t> scale(p_inverse[row]);
      Lanes<acc_t> along_low(0), along_high(0);
      for_steps<acc_t>(size, [&](int64_t offset, auto count) {
        const auto [x_low, x_high] = load<acc_t>(source + offset, count);
        const auto [grad_low, grad_high] = load<acc_t>(grad + offset, count);
        const auto [gamma_low, gamma_high] = load<acc_t>(p_gamma + offset, count);
        const auto low = grad_low * (x_low * scale), high = grad_high * (x_high * scale);
        grad_gammas.add(offset, low, high);
        along_low = at::vec::fmadd(low, gamma_low, along_low);
        along_high = at::vec::fmadd(high, gamma_high, along_high);
      });
      grad_gammas.end_row();
      const acc_t mean = sum_of<acc_t>(along_low + along_high) / static_cast<acc_t>(size);
      // a norm below the smallest is a constant
      const Lanes<acc_t> share(p_inverse[row] >= constant ? acc_t(0) : mean);
      for_steps<acc_t>(size, [&](int64_t offset, auto count) {
        const auto [x_low, x_high] = load<acc_t>(source + offset, count);
        const auto [grad_low, grad_high] = load<acc_t>(grad + offset, count);
        const auto [gamma_low, gamma_high] = load<acc_t>(p_gamma + offset, count);
        auto low = (grad_low * gamma_low - x_low * scale * share) * scale;
        auto high = (grad_high * gamma_high - x_high * scale * share) * scale;
        if (p_grad_sum != nullptr) {
          const auto [sum_low, sum_high] = load<acc_t>(p_grad_sum + row * size + offset, count);
          low = low + sum_low;
          high = high + sum_high;
        }
        store<acc_t>(p_grad_x + row * size + offset, low, high, count);
      });
    }
  };
  sum_rows<acc_t>(rows, size, kGrain / size, grad_gamma.data_ptr<scalar_t>(), rows_of_a_part);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm_cpu(
    const at::Tensor& x, const at::Tensor& gamma, const std::optional<at::Tensor>& residual) {
  // the caller's mistakes are explained in Python; these keep a direct caller inside the buffers
  TORCH_CHECK(
      x.dim() > 0 && x.size(-1) > 0 && gamma.dim() == 1 && gamma.size(0) == x.size(-1) &&
          (!residual.has_value() || residual->sizes() == x.sizes()),
      "rms_norm: the shapes of the arguments do not fit each other");
  TORCH_CHECK(
      gamma.scalar_type() == x.scalar_type() && (!residual.has_value() || residual->scalar_type() == x.scalar_type()),
      "rms_norm: the dtypes of the arguments differ");
  auto normed = at::empty(x.sizes(), x.options());
  auto sum = residual.has_value() ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  auto inverse = at::empty({x.numel() / x.size(-1)}, x.options().dtype(accumulation_type(x.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "rms_norm", [&] {
    normalise<scalar_t>(packed(x), packed(gamma), packed(residual), normed, sum, inverse);
  });
  return {normed, sum, inverse};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward_cpu(
    const at::Tensor& grad_normed, const std::optional<at::Tensor>& grad_sum, const at::Tensor& x,
    const at::Tensor& gamma, const at::Tensor& inverse) {
  const auto type = x.scalar_type();
  TORCH_CHECK(
      x.dim() > 0 && x.size(-1) > 0 && gamma.dim() == 1 && gamma.size(0) == x.size(-1) &&
          grad_normed.sizes() == x.sizes() && (!grad_sum.has_value() || grad_sum->sizes() == x.sizes()) &&
          inverse.numel() == x.numel() / x.size(-1),
      "rms_norm_backward: the shapes of the arguments do not fit each other");
  TORCH_CHECK(
      gamma.scalar_type() == type && grad_normed.scalar_type() == type &&
          (!grad_sum.has_value() || grad_sum->scalar_type() == type) &&
          inverse.scalar_type() == accumulation_type(type),
      "rms_norm_backward: the dtypes of the arguments differ");
  auto grad_x = at::empty(x.sizes(), x.options());
  auto grad_gamma = at::empty(gamma.sizes(), gamma.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "rms_norm_backward", [&] {
    differentiate<scalar_t>(
        packed(grad_normed), packed(grad_sum), packed(x), packed(gamma), packed(inverse), grad_x, grad_gamma);
  });
  return {grad_x, grad_gamma};
}

}  // namespace spear_fast
