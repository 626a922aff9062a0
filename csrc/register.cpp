// every C++ implementation is registered here; the schemas are defined by the families in spear_fast/ops
#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY_IMPL(spear_fast, CPU, library) {
  library.impl("append_kv.cpu", TORCH_FN(spear_fast::append_kv_cpu));
  library.impl("decode_self_attention.cpu", TORCH_FN(spear_fast::decode_self_attention_cpu));
  library.impl("decode_cross_attention.cpu", TORCH_FN(spear_fast::decode_cross_attention_cpu));
}
