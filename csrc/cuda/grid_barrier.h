// a barrier of all blocks of a cooperative launch
#pragma once

#include "device.h"

namespace spear_fast {

#ifdef SPEAR_FAST_EMULATE
inline unsigned load_acquired(const unsigned* at) {
  emulated_look_again();
  return *at;
}
#else
__device__ inline unsigned load_acquired(const unsigned* at) {
  unsigned found;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(at) : "memory");
  return found;
}
#endif

// counters: of arrivals and of exits, zero before the launch, and zero again after all blocks have left
struct GridBarrier {
  unsigned* counters;
  unsigned wanted = 0;

  // what any thread wrote before is there for all threads of the grid after it
  __device__ inline void wait() {
    __syncthreads();
    wanted += gridDim.x;
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counters, 1u);
      while (load_acquired(counters) < wanted) {
      }
      __threadfence();
    }
    __syncthreads();
  }

  // after the last wait: nobody looks at the arrivals any more once all have come here
  __device__ inline void leave() {
    if (threadIdx.x == 0 && atomicAdd(counters + 1, 1u) == gridDim.x - 1) {
      counters[0] = 0;
      counters[1] = 0;
    }
  }
};

}  // namespace spear_fast
