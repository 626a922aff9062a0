#include "packed_linear.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "rows.h"

// those of the MKL that torch may be linked with; null where it is not
extern "C" {
__attribute__((weak)) size_t cblas_sgemm_pack_get_size(int identifier, int m, int n, int k);
__attribute__((weak)) void cblas_sgemm_pack(
    int layout, int identifier, int trans, int m, int n, int k, float alpha, const float* source, int ld, float* target);
__attribute__((weak)) void cblas_sgemm_compute(
    int layout, int trans_a, int trans_b, int m, int n, int k, const float* a, int lda, const float* b, int ldb, float beta,
    float* c, int ldc);
}

namespace spear_fast {
namespace {

constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112, kPacked = 151, kBMatrix = 162;
// rows that the layouts are made for; measured: good from 1 row to some thousands
constexpr int64_t kPackRows = 32;
// numbers that are worth a thread of their own
constexpr int64_t kGrain = 1 << 14;
// int8 values are stored as unsigned numbers around it
constexpr int64_t kMiddle = 128;
constexpr float kLargest = 127.0F;

// packed products of few rows are faster by MKL on Intel's own processors (2x at 4 rows), by oneDNN on others
bool prefers_mkl() {
#if defined(__x86_64__)
  return cblas_sgemm_pack_get_size != nullptr && cblas_sgemm_pack != nullptr && cblas_sgemm_compute != nullptr &&
         __builtin_cpu_is("intel");
#else
  return false;
#endif
}

PackedLinear::Kind kind_of(const std::string& name) {
  if (name == "float32") {
    return prefers_mkl() ? PackedLinear::Kind::kMkl : PackedLinear::Kind::kOneDnn;
  }
  if (name == "mkl") {
    TORCH_CHECK_VALUE(
        cblas_sgemm_compute != nullptr && cblas_sgemm_pack != nullptr && cblas_sgemm_pack_get_size != nullptr,
        "PackedLinear: this torch is not linked with MKL; use 'float32'");
    return PackedLinear::Kind::kMkl;
  }
  TORCH_CHECK_VALUE(
      name == "onednn" || name == "int8", "PackedLinear: kind must be float32, mkl, onednn or int8, got ", name);
  return name == "int8" ? PackedLinear::Kind::kInt8 : PackedLinear::Kind::kOneDnn;
}

// calls an operator of torch by its name: what it takes as the stack holds it
at::Tensor call(const char* name, const char* overload, torch::jit::Stack stack) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
  op.callBoxed(stack);
  return stack.front().toTensor();
}

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

c10::IValue no_scalars() {
  return c10::impl::GenericList(c10::OptionalType::create(c10::NumberType::get()));
}

}  // namespace

PackedLinear::PackedLinear(const at::Tensor& weight, const std::optional<at::Tensor>& bias, const std::string& kind)
    : kind_(kind_of(kind)) {
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && weight.scalar_type() == at::kFloat && weight.device().is_cpu(),
      "PackedLinear: weight must be float32 [outputs, features] on the CPU, got ", weight.scalar_type(), " ", weight.sizes());
  outputs_ = weight.size(0), features_ = weight.size(1);
  TORCH_CHECK_VALUE(
      !bias || (bias->dim() == 1 && bias->size(0) == outputs_ && bias->scalar_type() == at::kFloat),
      "PackedLinear: bias must be float32 [", outputs_, "]");
  const at::Tensor dense = weight.contiguous();
  if (bias) {
    bias_ = bias->contiguous();
  }
  if (kind_ == Kind::kMkl) {
    const int n = static_cast<int>(outputs_), k = static_cast<int>(features_), m = static_cast<int>(kPackRows);
    const size_t size = cblas_sgemm_pack_get_size(kBMatrix, m, n, k);
    weight_ = at::empty({static_cast<int64_t>(size)}, weight.options().dtype(at::kByte));
    cblas_sgemm_pack(
        kRowMajor, kBMatrix, kTrans, m, n, k, 1.0F, dense.const_data_ptr<float>(), k,
        reinterpret_cast<float*>(weight_.data_ptr<uint8_t>()));
  } else if (kind_ == Kind::kOneDnn) {
    weight_ = call("mkldnn::_reorder_linear_weight", "", {dense, kPackRows});
  } else {
    const at::Tensor largest = std::get<0>(dense.abs().max(1)).clamp_min(1e-30);
    scales_ = largest.div(kLargest);
    zero_points_ = at::zeros({outputs_}, weight.options().dtype(at::kLong));
    const at::Tensor whole = dense.div(scales_.unsqueeze(1)).round().clamp(-kLargest, kLargest).to(at::kChar);
    weight_ = call("onednn::qlinear_prepack", "", {whole, std::vector<int64_t>{kPackRows, features_}});
  }
}

void PackedLinear::check(const at::Tensor& x) const {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.size(1) == features_ && x.scalar_type() == at::kFloat && x.device().is_cpu(),
      "PackedLinear: x must be float32 [rows, ", features_, "] on the CPU, got ", x.scalar_type(), " ", x.sizes());
}

at::Tensor PackedLinear::forward(const at::Tensor& x) const {
  RECORD_FUNCTION("spear_fast::PackedLinear", c10::ArrayRef<const c10::IValue>{});
  check(x);
  if (kind_ == Kind::kOneDnn) {
    return by_onednn(x, std::nullopt);
  }
  at::Tensor out = at::empty({x.size(0), outputs_}, x.options());
  kind_ == Kind::kMkl ? by_mkl(x, out, false) : by_int8(x, out, false);
  return out;
}

at::Tensor PackedLinear::added(const at::Tensor& x, const at::Tensor& to) const {
  RECORD_FUNCTION("spear_fast::PackedLinear", c10::ArrayRef<const c10::IValue>{});
  check(x);
  TORCH_CHECK_VALUE(
      to.dim() == 2 && to.size(0) == x.size(0) && to.size(1) == outputs_ && to.scalar_type() == at::kFloat &&
          to.is_contiguous(),
      "PackedLinear: what the product is added to must be dense float32 [", x.size(0), ", ", outputs_, "]");
  if (kind_ == Kind::kOneDnn) {
    return by_onednn(x, to);
  }
  at::Tensor out = to;
  kind_ == Kind::kMkl ? by_mkl(x, out, true) : by_int8(x, out, true);
  return out;
}

at::Tensor PackedLinear::by_onednn(const at::Tensor& x, const std::optional<at::Tensor>& to) const {
  if (!to) {
    return call("mkldnn::_linear_pointwise", "", {x, weight_, bias_, "none", no_scalars(), ""});
  }
  return call("mkldnn::_linear_pointwise", "binary", {x, *to, weight_, bias_, "add"});
}

void PackedLinear::by_mkl(const at::Tensor& x, at::Tensor& out, bool add) const {
  const at::Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
  const auto count = static_cast<int>(rows.size(0));
  const auto n = static_cast<int>(outputs_), k = static_cast<int>(features_);
  auto* p_out = out.data_ptr<float>();
  if (count == 0) {
    return;
  }
  if (bias_) {
    const auto* p_bias = bias_->const_data_ptr<float>();
    at::parallel_for(0, count, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        float* target = p_out + row * n;
        for (int64_t i = 0; i < n; ++i) {
          target[i] = add ? target[i] + p_bias[i] : p_bias[i];
        }
      }
    });
  }
  cblas_sgemm_compute(
      kRowMajor, kNoTrans, kPacked, count, n, k, rows.const_data_ptr<float>(), static_cast<int>(rows.stride(0)),
      reinterpret_cast<const float*>(weight_.const_data_ptr<uint8_t>()), k, add || bias_ ? 1.0F : 0.0F, p_out, n);
}

void PackedLinear::by_int8(const at::Tensor& x, at::Tensor& out, bool add) const {
  const at::Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
  const int64_t count = rows.size(0), stride = rows.stride(0), n = outputs_;
  if (count == 0) {
    return;
  }
  at::Tensor whole = at::empty({count, features_}, rows.options().dtype(at::kByte));
  at::Tensor units = at::empty({count}, rows.options());
  const auto* p_rows = rows.const_data_ptr<float>();
  auto* p_whole = whole.data_ptr<uint8_t>();
  auto* p_units = units.data_ptr<float>();
  // each row has a unit of its own, so that nothing depends on the others
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / features_), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* source = p_rows + row * stride;
      uint8_t* target = p_whole + row * features_;
      const float largest = largest_of(source, features_);
      // not a number in, not a number out
      const bool finite = std::isfinite(largest);
      p_units[row] = finite ? largest / kLargest : std::numeric_limits<float>::quiet_NaN();
      const float inverse = finite && largest > 0 ? kLargest / largest : 0.0F;
      if (!finite) {
        std::fill(target, target + features_, static_cast<uint8_t>(kMiddle));
        continue;
      }
      for (int64_t i = 0; i < features_; ++i) {
        // cutting off what is above zero rounds halves up
        target[i] = static_cast<uint8_t>(static_cast<int32_t>(source[i] * inverse + (kMiddle + 0.5F)));
      }
    }
  });
  const at::Tensor sums = call(
      "onednn::qlinear_pointwise", "",
      {whole, 1.0, kMiddle, weight_, scales_, zero_points_, c10::IValue(), 1.0, int64_t(0), at::kFloat, "none", no_scalars(), ""});
  const auto* p_sums = sums.const_data_ptr<float>();
  const auto* p_bias = bias_ ? bias_->const_data_ptr<float>() : nullptr;
  auto* p_out = out.data_ptr<float>();
  at::parallel_for(0, count, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float unit = p_units[row];
      const float* sum = p_sums + row * n;
      float* target = p_out + row * n;
      for (int64_t i = 0; i < n; ++i) {
        const float value = sum[i] * unit + (p_bias == nullptr ? 0.0F : p_bias[i]);
        target[i] = add ? target[i] + value : value;
      }
    }
  });
}

std::string PackedLinear::kind() const {
  return kind_ == Kind::kMkl ? "mkl" : kind_ == Kind::kOneDnn ? "onednn" : "int8";
}

int64_t PackedLinear::bytes() const {
  const int64_t size = kind_ == Kind::kInt8 ? 1 : kind_ == Kind::kMkl ? 0 : 4;
  return kind_ == Kind::kMkl ? weight_.numel() : outputs_ * features_ * size;
}

}  // namespace spear_fast
