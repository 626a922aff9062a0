#include "packed_linear.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "checks.h"
#include "pages.h"
#include "panels.h"
#include "rows.h"

#if defined(CPU_CAPABILITY_AVX2)
#include <cpuid.h>
#endif

namespace spear_fast {
namespace {

// units of the depth whose part of a panel stays in the second cache
constexpr int64_t kDepth = 512;
// numbers that are worth a thread of their own
constexpr int64_t kGrain = 1 << 14;
// int8 values are stored as unsigned numbers around it
constexpr int64_t kMiddle = 128;
constexpr float kLargest = 127.0F;
// sums of 8 bits times 8 bits stay within 32
constexpr int64_t kMostFeatures = 1 << 16;

PackedLinear::Kind kind_of(const std::string& name) {
  TORCH_CHECK_VALUE(name == "float32" || name == "int8", "PackedLinear: kind must be float32 or int8, got ", name);
  return name == "float32" ? PackedLinear::Kind::kFloat : PackedLinear::Kind::kInt8;
}

struct Float {
  using unit_t = float;
  using Vector = Lanes<float>;

  static Vector add(const Vector& a, const Vector& b, const Vector& sum) { return at::vec::fmadd(a, b, sum); }
};

// whether the processor multiplies 8 bits by 8 bits and adds to sums of 32 in one instruction
bool has_dot_products() {
#if defined(CPU_CAPABILITY_AVX512)
  return __builtin_cpu_supports("avx512vnni");
#elif defined(CPU_CAPABILITY_AVX2)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAvxVnni = 1 << 4;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kAvxVnni) != 0;
#else
  return false;
#endif
}

// an unsigned times a signed number of 8 bits, four of them added to a sum of 32 bits; DOT: as has_dot_products says
//
// That instruction is written out: compiled for all processors that have such vectors, the code around it must not use
// it.
template <bool DOT>
struct Int8 {
  using unit_t = int32_t;
  using Vector = Lanes<int32_t>;

  static Vector add(const Vector& a, const Vector& b, const Vector& sum) {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (DOT) {
      __m512i total = sum;
      __asm__("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(__m512i(a)), "v"(__m512i(b)));
      return total;
    }
    const __m512i even =
        _mm512_madd_epi16(_mm512_and_si512(a, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
#elif defined(CPU_CAPABILITY_AVX2)
    if constexpr (DOT) {
      __m256i total = sum;
      __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(total) : "x"(__m256i(a)), "x"(__m256i(b)));
      return total;
    }
    const __m256i even =
        _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
#else
    constexpr int64_t lanes = Vector::size();
    alignas(64) int32_t sums[lanes];
    alignas(64) uint8_t factors[4 * lanes];
    alignas(64) int8_t weights[4 * lanes];
    a.store(factors), b.store(weights), sum.store(sums);
    for (int64_t i = 0; i < 4 * lanes; ++i) {
      sums[i / 4] += static_cast<int32_t>(factors[i]) * weights[i];
    }
    return Vector::loadu(sums);
#endif
  }
};

// a target for a vector of sums, of which only so many may be touched
struct Target {
  float* at;
  int64_t count;

  Lanes<float> load() const {
    return count == Panels::kLanes ? Lanes<float>::loadu(at) : Lanes<float>::loadu(at, count);
  }

  void store(const Lanes<float>& values) const { count == Panels::kLanes ? values.store(at) : values.store(at, count); }
};

// returns the largest magnitude of a row, not a number where one of them is none
float largest_of(const float* row, int64_t size) {
  Lanes<float> largest(0);
  for_steps<float>(size, [&](int64_t offset, auto count) {
    const auto [low, high] = load<float>(row + offset, count);
    largest = at::vec::maximum(largest, at::vec::maximum(low.abs(), high.abs()));
  });
  alignas(64) float each[Lanes<float>::size()];
  largest.store(each);
  float found = 0;
  for (const float lane : each) {
    found = found >= lane || std::isnan(found) ? found : lane;
  }
  return found;
}

}  // namespace

PackedLinear::PackedLinear(const at::Tensor& weight, const std::optional<at::Tensor>& bias, const std::string& kind)
    : kind_(kind_of(kind)) {
  TORCH_CHECK_VALUE(
      is_plain(weight, at::kFloat) && weight.dim() == 2,
      "PackedLinear: weight must be float32 [outputs, features] on the CPU, strided, got ", described(weight));
  outputs_ = weight.size(0), features_ = weight.size(1);
  TORCH_CHECK_VALUE(features_ > 0, "PackedLinear: weight must have features, got ", weight.sizes());
  if (bias) {
    check_tensor("PackedLinear", "bias", *bias, at::kFloat, {outputs_});
  }
  const at::Tensor dense = weight.contiguous();
  const auto* p_dense = dense.const_data_ptr<float>();
  // vectors are read whole
  const int64_t padded = (outputs_ + Panels::kLanes - 1) / Panels::kLanes * Panels::kLanes;
  if (bias) {
    bias_ = at::zeros({padded}, weight.options());
    bias_->narrow(0, 0, outputs_).copy_(*bias);
  }
  if (kind_ == Kind::kFloat) {
    panels_ = Panels(outputs_, features_);
    weight_ = whole_pages(bytes()).view(at::kFloat);
    panels_.fill(weight_.data_ptr<float>(), [&](int64_t output, int64_t i) { return p_dense[output * features_ + i]; });
    return;
  }
  TORCH_CHECK_VALUE(features_ <= kMostFeatures, "PackedLinear: int8 takes at most ", kMostFeatures, " features");
  const at::Tensor largest = std::get<0>(dense.abs().max(1)).clamp_min(1e-30);
  scales_ = at::zeros({padded}, weight.options());
  scales_.narrow(0, 0, outputs_).copy_(largest.div(kLargest));
  const at::Tensor whole =
      dense.div(largest.div(kLargest).unsqueeze(1)).round().clamp(-kLargest, kLargest).to(at::kChar);
  panels_ = Panels(outputs_, (features_ + 3) / 4);
  weight_ = whole_pages(bytes()).view(at::kInt);
  const auto* p_whole = whole.const_data_ptr<int8_t>();
  panels_.fill(weight_.data_ptr<int32_t>(), [&](int64_t output, int64_t i) {
    int8_t four[4] = {};
    std::copy_n(p_whole + output * features_ + 4 * i, std::min<int64_t>(4, features_ - 4 * i), four);
    int32_t unit;
    std::memcpy(&unit, four, sizeof(unit));
    return unit;
  });
  middles_ = at::zeros({padded}, weight.options().dtype(at::kInt));
  middles_.narrow(0, 0, outputs_).copy_(whole.sum(1).mul(kMiddle));
}

void PackedLinear::check(const at::Tensor& x) const {
  TORCH_CHECK_VALUE(
      is_plain(x, at::kFloat) && x.dim() == 2 && x.size(1) == features_, "PackedLinear: x must be float32 [rows, ",
      features_, "] on the CPU, strided, got ", described(x));
}

at::Tensor PackedLinear::forward(const at::Tensor& x) const {
  RECORD_FUNCTION("spear_fast::PackedLinear", c10::ArrayRef<const c10::IValue>{});
  check(x);
  at::Tensor out = at::empty({x.size(0), outputs_}, x.options());
  multiply(x, out, false);
  return out;
}

at::Tensor PackedLinear::added(const at::Tensor& x, const at::Tensor& to) const {
  RECORD_FUNCTION("spear_fast::PackedLinear", c10::ArrayRef<const c10::IValue>{});
  check(x);
  const std::array<int64_t, 2> sizes{x.size(0), outputs_};
  TORCH_CHECK_VALUE(
      is_plain(to, at::kFloat) && to.sizes() == at::IntArrayRef(sizes) && to.is_contiguous(),
      "PackedLinear: what the product is added to must be dense float32 ", at::IntArrayRef(sizes), " on the CPU, got ",
      described(to), "; call .contiguous()");
  // rows of x are still read when those of the result are written
  at::assert_no_overlap(to, x);
  at::Tensor out = to;
  multiply(x, out, true);
  return out;
}

void PackedLinear::multiply(const at::Tensor& x, at::Tensor& out, bool add) const {
  const at::Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
  kind_ == Kind::kFloat ? by_floats(rows, out, add) : by_int8(rows, out, add);
}

void PackedLinear::by_floats(const at::Tensor& rows, at::Tensor& out, bool add) const {
  const int64_t n = outputs_;
  const auto* p_bias = bias_ ? bias_->const_data_ptr<float>() : nullptr;
  auto* p_out = out.data_ptr<float>();
  multiply_panels<Float>(
      panels_, rows.const_data_ptr<float>(), rows.stride(0), rows.size(0), weight_.const_data_ptr<float>(), kDepth,
      [&](int64_t row, int64_t output, Lanes<float> sum, int64_t start) {
        const Target target{p_out + row * n + output, std::min(Panels::kLanes, n - output)};
        if (start == 0 && p_bias != nullptr) {
          sum = sum + Lanes<float>::loadu(p_bias + output);
        }
        target.store(start > 0 || add ? target.load() + sum : sum);
      });
}

void PackedLinear::by_int8(const at::Tensor& rows, at::Tensor& out, bool add) const {
  const int64_t count = rows.size(0), stride = rows.stride(0), n = outputs_;
  if (count == 0) {
    return;
  }
  const int64_t width = 4 * panels_.depth;
  at::Tensor whole = at::empty({count, width}, rows.options().dtype(at::kByte));
  at::Tensor scales_of_rows = at::empty({count}, rows.options());
  const auto* p_rows = rows.const_data_ptr<float>();
  auto* p_whole = whole.data_ptr<uint8_t>();
  auto* p_scales_of_rows = scales_of_rows.data_ptr<float>();
  // each row has a scale of its own, so that nothing depends on the others
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / features_), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* source = p_rows + row * stride;
      uint8_t* target = p_whole + row * width;
      const float largest = largest_of(source, features_);
      // not a number in, not a number out
      const bool finite = std::isfinite(largest);
      p_scales_of_rows[row] = finite ? largest / kLargest : std::numeric_limits<float>::quiet_NaN();
      const float inverse = finite && largest > 0 ? kLargest / largest : 0.0F;
      if (!finite) {
        std::fill(target, target + width, static_cast<uint8_t>(kMiddle));
        continue;
      }
      for (int64_t i = 0; i < features_; ++i) {
        // cutting off what is above zero rounds halves up
        target[i] = static_cast<uint8_t>(static_cast<int32_t>(source[i] * inverse + (kMiddle + 0.5F)));
      }
      // what they are multiplied with is zero
      std::fill(target + features_, target + width, static_cast<uint8_t>(kMiddle));
    }
  });
  const auto* p_bias = bias_ ? bias_->const_data_ptr<float>() : nullptr;
  auto* p_out = out.data_ptr<float>();
  const auto* p_scales = scales_.const_data_ptr<float>();
  const auto* p_middles = middles_.const_data_ptr<int32_t>();
  const auto finish = [&](int64_t row, int64_t output, const Lanes<int32_t>& sum, int64_t) {
    const Target target{p_out + row * n + output, std::min(Panels::kLanes, n - output)};
    const auto exact = at::vec::convert<float>(sum - Lanes<int32_t>::loadu(p_middles + output));
    auto value = exact * Lanes<float>(p_scales_of_rows[row]) * Lanes<float>::loadu(p_scales + output);
    if (p_bias != nullptr) {
      value = value + Lanes<float>::loadu(p_bias + output);
    }
    target.store(add ? target.load() + value : value);
  };
  const auto* factors = reinterpret_cast<const int32_t*>(p_whole);
  const auto* weights = weight_.const_data_ptr<int32_t>();
  static const bool dot = has_dot_products();
  if (dot) {
    multiply_panels<Int8<true>>(panels_, factors, panels_.depth, count, weights, panels_.depth, finish);
  } else {
    multiply_panels<Int8<false>>(panels_, factors, panels_.depth, count, weights, panels_.depth, finish);
  }
}

std::string PackedLinear::kind() const { return kind_ == Kind::kFloat ? "float32" : "int8"; }

int64_t PackedLinear::bytes() const { return panels_.units() * 4; }

void PackedLinear::move_to(const at::Tensor& memory) { weight_ = memory.view(weight_.scalar_type()).copy_(weight_); }

}  // namespace spear_fast
