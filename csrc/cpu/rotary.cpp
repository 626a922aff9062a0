#include "rotary.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/accumulate.h>

#include <optional>

#include "../ops.h"

namespace spear_fast {
namespace {

// numbers that are worth a thread of their own
constexpr int64_t kGrain = 1 << 14;

// x: [outer, length, heads, size]; positions: null for 0..length - 1, else [length] or, with own, [outer, length]
template <typename scalar_t>
void rotate(
    const at::Tensor& x, const at::Tensor& freqs, const int64_t* positions, bool own, bool inverse, at::Tensor& out) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t outer = x.size(0), length = x.size(1), heads = x.size(2), size = x.size(3);
  const at::Tensor frequencies = (inverse ? -freqs : freqs).to(c10::CppTypeToScalarType<acc_t>::value).contiguous();
  const auto* p_freqs = frequencies.const_data_ptr<acc_t>();
  const auto* p_x = x.const_data_ptr<scalar_t>();
  auto* p_out = out.data_ptr<scalar_t>();
  const auto strides = x.strides();

  // rows of one position follow each other, so that its sines and cosines are computed once
  const int64_t grain = std::max<int64_t>(1, kGrain / (heads * size));
  at::parallel_for(0, length * outer, grain, [&](int64_t begin, int64_t end) {
    Rotary<acc_t> rotary(p_freqs, size / 2);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / outer, row = item % outer;
      rotary.move_to(positions == nullptr ? i : positions[own ? row * length + i : i]);
      for (int64_t head = 0; head < heads; ++head) {
        rotary.rotate(
            p_x + row * strides[0] + i * strides[1] + head * strides[2], acc_t(1),
            p_out + ((row * length + i) * heads + head) * size);
      }
    }
  });
}

}  // namespace

at::Tensor rotary_cpu(
    const at::Tensor& x, const at::Tensor& freqs, const std::optional<at::Tensor>& positions, bool inverse) {
  // the caller's mistakes are explained in Python; these keep a direct caller inside the buffers
  TORCH_CHECK(
      x.dim() >= 3 && x.size(-1) % 2 == 0 && freqs.dim() == 1 && freqs.size(0) * 2 == x.size(-1) &&
          (!positions.has_value() || positions->sizes() == x.sizes().slice(x.dim() - 3, 1) ||
           positions->sizes() == x.sizes().slice(0, x.dim() - 2)),
      "rotary: the shapes of the arguments do not fit each other");
  auto out = at::empty(x.sizes(), x.options());
  if (out.numel() == 0) {
    return out;
  }
  const int64_t outer = c10::multiply_integers(x.sizes().slice(0, x.dim() - 3));
  auto rows = x.reshape({outer, x.size(-3), x.size(-2), x.size(-1)});
  rows = rows.stride(3) == 1 ? rows : rows.contiguous();
  const auto where = positions.has_value() ? positions->contiguous() : at::Tensor();
  const auto* p_where = where.defined() ? where.const_data_ptr<int64_t>() : nullptr;
  const bool own = where.defined() && where.numel() != x.size(-3);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "rotary", [&] {
    rotate<scalar_t>(rows, freqs, p_where, own, inverse, out);
  });
  return out;
}

}  // namespace spear_fast
