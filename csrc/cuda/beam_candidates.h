// how beam_step.cu finds its best candidates: a bound from what each lane puts forward, what reaches it ranked by
// counting
#pragma once

#include "beam_memory.h"

namespace spear_fast {

// calls visit(order, index) for this thread's share of the candidates
template <typename Visit>
__device__ inline void visit_candidates(
    const BeamMemory& m, const float* ranked, int size, int vocab, const Visit& visit) {
  int beam = 0, end = vocab;
  for (int index = static_cast<int>(threadIdx.x); index < size * vocab; index += kSelectThreads) {
    for (; index >= end; end += vocab) {
      ++beam;
    }
    visit(order_of(m.scores[beam] + ranked[index]), index);
  }
}

__device__ inline void clear_count(BeamMemory& m) {
  __syncthreads();
  if (threadIdx.x == 0) {
    m.count = 0;
  }
  __syncthreads();
}

// the number of candidates whose key is at least one; for the block
__device__ inline int count_from(BeamMemory& m, const float* ranked, int size, int vocab, unsigned long long least) {
  clear_count(m);
  int mine = 0;
  visit_candidates(
      m, ranked, size, vocab, [&](unsigned order, int index) { mine += key_of(order, index) >= least ? 1 : 0; });
  atomicAdd(&m.count, mine);
  __syncthreads();
  return m.count;
}

// puts the candidates whose key is at least one into m.keys; returns how many there are, of which kListed are there
//
// m.count: 0, as all threads know.
__device__ inline int list_from(BeamMemory& m, const float* ranked, int size, int vocab, unsigned long long least) {
  const auto least_order = static_cast<unsigned>(least >> 32);
  visit_candidates(m, ranked, size, vocab, [&](unsigned order, int index) {
    if (order >= least_order && key_of(order, index) >= least) {
      const int place = atomicAdd(&m.count, 1);
      if (place < kListed) {
        m.keys[place] = key_of(order, index);
      }
    }
  });
  __syncthreads();
  return m.count;
}

// what a lane has seen of its candidates: the order of the best of them
struct BestValue {
  float best = minus_infinity();
  bool any = false, has_nan = false;

  __device__ void see(float value) {
    best = fmaxf(best, value);
    has_nan = has_nan || is_nan(value);
    any = true;
  }
  __device__ unsigned order() const { return has_nan ? 0xffffffffu : any ? order_of(best) : 0u; }
};

// puts the best 2 * size of a hypothesis' lanes forward, best first; for a warp. order: of the lane's best candidate.
//
// The lowest bits of an order make room for what makes it another than all others: it is a bound from below.
__device__ inline void put_forward(BeamMemory& m, int size, int beam, unsigned order) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const unsigned bound = order / kMostLanes * kMostLanes, own = bound + static_cast<unsigned>(lane);
  m.orders[thread] = own;
  __syncwarp();
  int before = 0;
#pragma unroll
  for (int other = 0; other < kWarp; ++other) {
    before += m.orders[thread - lane + other] > own ? 1 : 0;
  }
  if (before < 2 * size) {
    const int place = beam * 2 * size + before;
    m.tops[place] = bound + static_cast<unsigned>(place);
  }
  // the next hypothesis' are written there
  __syncwarp();
}

// sets m.least to the one of rank 2 * size among what was put forward; for the block
__device__ inline void find_least(BeamMemory& m, int size) {
  const int count = size * 2 * size;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kSelectThreads) {
    const unsigned own = m.tops[i];
    int before = 0;
    for (int other = 0; other < count; ++other) {
      before += m.tops[other] > own ? 1 : 0;
    }
    if (before == 2 * size - 1) {
      m.least = own / kMostLanes * kMostLanes;
    }
  }
  __syncthreads();
}

// fills m.best with the best 2 * size candidates, best first, -1 where there are too few; for the block
//
// m.least: what is known of their order. m.count: 0.
__device__ inline void choose(BeamMemory& m, const float* ranked, int size, int vocab) {
  const int thread = static_cast<int>(threadIdx.x), wanted = 2 * size;
  unsigned long long least = static_cast<unsigned long long>(m.least) << 32;
  int count = list_from(m, ranked, size, vocab, least);
  if (count > kListed) {
    // equals in great number, or many beams: no two keys are the same, so halving ends
    unsigned long long above = ~0ull;
    while (count > kListed) {
      const unsigned long long middle = least + (above - least) / 2;
      const int found = count_from(m, ranked, size, vocab, middle);
      if (found >= wanted) {
        least = middle;
        count = found;
      } else {
        above = middle;
      }
    }
    clear_count(m);
    count = list_from(m, ranked, size, vocab, least);
  }
  for (int rank = count + thread; rank < wanted; rank += kSelectThreads) {
    m.best[rank] = -1;
  }
  // a candidate's rank is the number of those that come before it
  for (int i = thread; i < count; i += kSelectThreads) {
    const unsigned long long key = m.keys[i];
    int rank = 0;
    for (int j = 0; j < count; ++j) {
      rank += m.keys[j] > key ? 1 : 0;
    }
    if (rank < wanted) {
      m.best[rank] = index_of(key);
    }
  }
  __syncthreads();
}

}  // namespace spear_fast
