// every C++ implementation on the CPU is registered here, and the native classes; the schemas are defined by the
// families in spear_fast/ops, the CUDA implementations in cuda/selection.cpp
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <thread>

#include "cpu/decoder_layers.h"
#include "cpu/packed_linear.h"
#include "cpu/pages.h"
#include "ops.h"

TORCH_LIBRARY_FRAGMENT(spear_fast, library) {
  using spear_fast::DecoderLayers;
  using spear_fast::PackedLinear;
  library.class_<PackedLinear>("PackedLinear")
      .def(torch::init<at::Tensor, std::optional<at::Tensor>, std::string>())
      .def("forward", &PackedLinear::forward)
      .def("added", &PackedLinear::added)
      .def("kind", &PackedLinear::kind)
      .def("bytes", &PackedLinear::bytes);
  library.class_<DecoderLayers>("DecoderLayers")
      .def(torch::init<DecoderLayers::Linears, std::vector<at::Tensor>, at::Tensor, int64_t, int64_t>())
      .def("step", &DecoderLayers::step);
  library.def("give_memory_back() -> ()", &spear_fast::give_memory_back);
  // of the calling thread, which takes the number for all when a library first asks: torch's own, and this one
  library.def("set_num_threads(int count) -> ()", [](int64_t count) {
    // each thread takes a stack; OpenMP ends the process where it cannot have one
    const int64_t most = std::max<int64_t>(1024, std::thread::hardware_concurrency());
    TORCH_CHECK_VALUE(
        count >= 1 && count <= most, "set_num_threads: count must lie in 1..", most, ", got ", count,
        "; one for each core is best");
    at::internal::lazy_init_num_threads();
    at::get_num_threads();
    at::set_num_threads(static_cast<int>(count));
  });
}

TORCH_LIBRARY_IMPL(spear_fast, CPU, library) {
  library.impl("append_kv.cpu", TORCH_FN(spear_fast::append_kv_cpu));
  library.impl("attention.cpu", TORCH_FN(spear_fast::attention_cpu));
  library.impl("attention_backward.cpu", TORCH_FN(spear_fast::attention_backward_cpu));
  library.impl("beam_step.cpu", TORCH_FN(spear_fast::beam_step_cpu));
  library.impl("cross_entropy.cpu", TORCH_FN(spear_fast::cross_entropy_cpu));
  library.impl("cross_entropy_backward.cpu", TORCH_FN(spear_fast::cross_entropy_backward_cpu));
  library.impl("decode_self_attention.cpu", TORCH_FN(spear_fast::decode_self_attention_cpu));
  library.impl("decode_cross_attention.cpu", TORCH_FN(spear_fast::decode_cross_attention_cpu));
  library.impl("geglu.cpu", TORCH_FN(spear_fast::geglu_cpu));
  library.impl("geglu_backward.cpu", TORCH_FN(spear_fast::geglu_backward_cpu));
  library.impl("rms_norm.cpu", TORCH_FN(spear_fast::rms_norm_cpu));
  library.impl("rms_norm_backward.cpu", TORCH_FN(spear_fast::rms_norm_backward_cpu));
  library.impl("rotary.cpu", TORCH_FN(spear_fast::rotary_cpu));
  library.impl("sample_step.cpu", TORCH_FN(spear_fast::sample_step_cpu));
}
