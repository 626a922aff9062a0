// the shared memory of beam_step.cu, and what is kept there: candidates as keys, entries of the pool, ancestors
#pragma once

#include "../select/beam.h"
#include "selecting.h"

namespace spear_fast {

// beams that the ops take at most, so that a thread has each; values and bytes of ancestors that a block has room for:
// 5 beams of 1600 tokens or 8 of 1024, 5 of 1024 positions; more are in global memory
inline constexpr int kMostBeams = kSelectThreads;
inline constexpr int kHeldValues = 8224, kHeldAncestors = 5120;
// candidates that are ranked by counting
inline constexpr int kListed = 2 * kMostBeams;
// beams of which a hypothesis' lanes are as many as the candidates that are wanted; what they then put forward
inline constexpr int kFewBeams = kWarp / 2, kMostLanes = kFewBeams * kWarp;

__device__ inline bool fits(int size, int vocab) { return static_cast<long long>(size) * vocab <= kHeldValues; }

// a candidate as one number: the larger comes before, and no two are the same
__device__ inline unsigned long long key_of(unsigned order, int index) {
  return static_cast<unsigned long long>(order) << 32 | ~static_cast<unsigned>(index);
}

__device__ inline int index_of(unsigned long long key) { return static_cast<int>(~static_cast<unsigned>(key)); }

// what becomes of a candidate: it ends and enters the pool, ends without, goes on
enum Ending : unsigned char { kGoesOn, kEnds, kEnters };

struct BeamMemory {
  float values[kHeldValues];
  // the best of the lanes' best; then the candidates in the running; when they are ranked, the hypotheses that go on
  union {
    unsigned tops[kMostLanes];
    unsigned long long keys[kListed];
    Next<float> next[kMostBeams];
  };
  // the order of the scores of the pool before, of what ended at that rank, of what reached the limit
  unsigned pool[3 * kMostBeams];
  // each lane's best value, by its warp's turn; later the best candidates, as indices
  union {
    unsigned orders[kSelectThreads];
    int best[kListed];
  };
  unsigned char ends[kListed];
  float scores[kMostBeams];
  unsigned char ancestors[kHeldAncestors];
  float float_params[kFloatParams];
  int int_params[kIntParams];
  // the best candidates are among those with this order or more
  unsigned least;
  int count;
  long long ended;
  // the last score in the pool
  float worst;
};
static_assert(sizeof(BeamMemory) <= 48 * 1024, "a launch would have to ask for it");

// narrower than in memory, where registers are not
struct PoolEntry {
  float score, last_logprob;
  int beam, end;
  bool finished;
};

__device__ inline void put(BeamMemory& m, const BeamBuffers<float>& b, int size, int place, const PoolEntry& entry) {
  if (place >= size) {
    return;
  }
  b.pool_scores[place] = entry.score;
  b.pool_beams[place] = entry.beam;
  b.pool_ends[place] = entry.end;
  b.pool_finished[place] = entry.finished;
  b.pool_last_logprobs[place] = entry.last_logprob;
  if (place == size - 1) {
    m.worst = entry.score;
  }
}

// an utterance's rows of the ancestor table, which arrive while the logits are worked on; for a warp each
struct AncestorRows {
  int size, steps, words;
  // whether they fit, in whole words
  bool held;

  __device__ AncestorRows(const BeamBuffers<float>& b, int size, long long steps)
      : size(size), steps(static_cast<int>(steps)), words((this->steps + 3) / 4) {
    const bool aligned = b.capacity % 4 == 0 && reinterpret_cast<uint64_t>(b.ancestors) % 4 == 0;
    held = aligned && 4ll * b.halves * size * words <= kHeldAncestors;
  }

  __device__ uint8_t* table(const BeamBuffers<float>& b, int half) const {
    return b.ancestors + half * b.utterances * b.beams * b.capacity;
  }

  __device__ void fetch(BeamMemory& m, const BeamBuffers<float>& b, int beam) const {
    for (int half = 0; half < b.halves; ++half) {
      const uint8_t* row = table(b, half) + beam * b.capacity;
      for (int word = static_cast<int>(threadIdx.x % kWarp); word < words; word += kWarp) {
        copy_word(m.ancestors + 4 * ((half * size + beam) * words + word), row + 4 * word);
      }
    }
  }

  __device__ void store(const BeamMemory& m, const BeamBuffers<float>& b) const {
    for (int beam = static_cast<int>(threadIdx.x) / kWarp; beam < size; beam += kSelectThreads / kWarp) {
      const int origin = m.next[beam].origin;
      for (int half = 0; half < b.halves && origin != beam; ++half) {
        uint8_t* row = table(b, half) + beam * b.capacity;
        const uint8_t* source = m.ancestors + 4 * (half * size + origin) * words;
        for (int word = static_cast<int>(threadIdx.x % kWarp); word < words; word += kWarp) {
          if (4 * word + 4 <= steps) {
            *reinterpret_cast<uint32_t*>(row + 4 * word) = *reinterpret_cast<const uint32_t*>(source + 4 * word);
          } else {
            // what comes after this step is not the origin's
            for (int i = 4 * word; i < steps; ++i) {
              row[i] = source[i];
            }
          }
        }
      }
    }
  }
};

}  // namespace spear_fast
