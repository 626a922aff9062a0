// memory of whole pages from the system, for what lives long
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spear_fast {

// returns [bytes] of bytes, on large pages where the system has them: the processor then finds their addresses, and
// reads ahead, without a stop every 4 KB
//
// Not from malloc, which after large blocks are freed keeps what is smaller, and hands it out in pieces, instead of
// giving it back to the system: temporary ones of a step then take half again as much.
inline at::Tensor whole_pages(int64_t bytes) {
#if defined(__linux__)
  if (bytes == 0) {
    return at::empty({0}, at::kByte);
  }
  constexpr size_t large = 2 << 20;
  const auto size = (static_cast<size_t>(bytes) + large - 1) / large * large;
  // one more, so that the beginning can be at a large page's; what nobody touches takes no memory
  void* whole = mmap(nullptr, size + large, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole != MAP_FAILED) {
    auto* first = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(whole) + large - 1) / large * large);
    // the last page is a small one where it would be mostly empty; refused is as well
    madvise(first, static_cast<size_t>(bytes) / large * large, MADV_HUGEPAGE);
    return at::from_blob(first, {bytes}, [whole, size](void*) { munmap(whole, size + large); }, at::kByte);
  }
#endif
  return at::empty({bytes}, at::kByte);
}

// gives free memory back to the system, which malloc keeps for allocations that may not come: takes milliseconds
inline void give_memory_back() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace spear_fast
