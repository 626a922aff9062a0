// the attentions of fused_step.cu: positions are cut into parts, the last block that has done a part of a tile of
// queries joins them
#pragma once

#include "fused_parts.h"

namespace spear_fast {

// positions of a part of the history; fixed, as the source's parts are, so that bits hang on no other hypothesis
inline constexpr int kHistoryPart = 64;
// queries that share what a block reads: heads of a key head, or beams of an utterance
inline constexpr int kQueries = 4;
// floats of a warp's sums for a query: size of them, the largest score, the sum of weights
inline constexpr int kSums = kFusedSize + 2;

// what a block shares while it attends
template <typename scalar_t>
struct AttentionMemory {
  alignas(16) float queries[kQueries][kFusedSize];
  // of the newest position, which is not read from the caches
  alignas(16) scalar_t key[kFusedSize];
  alignas(16) scalar_t value[kFusedSize];
  float sums[kFusedWarps][kQueries][kSums];
  bool last;
};

// a thread's sums over the positions that it has seen, for each query
struct OnlineSums {
  float top[kQueries], total[kQueries], sums[kQueries][8];

  __device__ inline void add(int query, float score, const float* value) {
    const float higher = fmaxf(top[query], score);
    // where nothing but minus infinity was seen, a difference would be NaN
    const float base = higher == minus_infinity() ? 0.0f : higher;
    const float before = expf(top[query] - base), weight = expf(score - base);
    top[query] = higher;
    total[query] = total[query] * before + weight;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sums[query][i] = sums[query][i] * before + weight * value[i];
    }
  }

  // joins what lanes `offset` apart have seen
  __device__ inline void join(int query, int offset) {
    const float other = __shfl_xor_sync(0xffffffffu, top[query], offset);
    const float higher = fmaxf(top[query], other);
    const float base = higher == minus_infinity() ? 0.0f : higher;
    const float share = expf(top[query] - base);
    top[query] = higher;
    total[query] *= share;
    total[query] += __shfl_xor_sync(0xffffffffu, total[query], offset);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sums[query][i] *= share;
      sums[query][i] += __shfl_xor_sync(0xffffffffu, sums[query][i], offset);
    }
  }
};

// attends from `count` queries of the shared memory to positions begin..end; the warps' sums come to lie there as well
//
// locate(i, key, value): sets where position i lies
template <typename scalar_t, typename Locate>
__device__ inline void attend(
    AttentionMemory<scalar_t>& shared, int count, int size, int begin, int end, const Locate& locate) {
  constexpr int kSteps = 2;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  // lanes that share a position, eight numbers each
  int lanes = 1;
  while (lanes * 8 < size) {
    lanes *= 2;
  }
  const int lane = thread % lanes, stripe = thread / lanes, stripes = kFusedThreads / lanes;
  const bool reads = lane * 8 < size;
  OnlineSums seen;
#pragma unroll
  for (int i_query = 0; i_query < kQueries; ++i_query) {
    seen.top[i_query] = minus_infinity();
    seen.total[i_query] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      seen.sums[i_query][i] = 0;
    }
  }
  for (int step = begin; step < end; step += kSteps * stripes) {
    uint4 keys[kSteps], values[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      keys[j] = values[j] = {0, 0, 0, 0};
      const int position = step + j * stripes + stripe;
      if (position < end && reads) {
        const scalar_t *key, *value;
        locate(position, key, value);
        keys[j] = *reinterpret_cast<const uint4*>(key + lane * 8);
        values[j] = *reinterpret_cast<const uint4*>(value + lane * 8);
      }
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      float key[8], value[8];
      unpack(scalar_t{}, keys[j], key);
      unpack(scalar_t{}, values[j], value);
#pragma unroll
      for (int i_query = 0; i_query < kQueries; ++i_query) {
        if (i_query < count) {
          // from shared memory each time: registers are for what is under way. Lanes past the size have zeros as keys
          const float* query = shared.queries[i_query] + (reads ? lane * 8 : 0);
          float score = 0;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            score += query[i] * key[i];
          }
          for (int offset = lanes / 2; offset > 0; offset /= 2) {
            score += __shfl_xor_sync(0xffffffffu, score, offset);
          }
          if (step + j * stripes + stripe < end) {
            seen.add(i_query, score, value);
          }
        }
      }
    }
  }
#pragma unroll
  for (int i_query = 0; i_query < kQueries; ++i_query) {
    if (i_query < count) {
      for (int offset = lanes; offset < kWarp; offset *= 2) {
        seen.join(i_query, offset);
      }
      float* sums = shared.sums[warp][i_query];
      if (thread % kWarp < lanes && reads) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          sums[lane * 8 + i] = seen.sums[i_query][i];
        }
      }
      if (thread % kWarp == 0) {
        sums[size] = seen.top[i_query];
        sums[size + 1] = seen.total[i_query];
      }
    }
  }
  __syncthreads();
}

// joins `parts` sums that lie `apart` floats from each other; returns the one of `element`
__device__ inline float joined(
    const float* sums, int parts, int apart, int size, int element, float& top, float& total) {
  top = minus_infinity();
  for (int i = 0; i < parts; ++i) {
    top = fmaxf(top, sums[i * apart + size]);
  }
  const float base = top == minus_infinity() ? 0.0f : top;
  float sum = 0;
  total = 0;
  for (int i = 0; i < parts; ++i) {
    const float share = expf(sums[i * apart + size] - base);
    sum += sums[i * apart + element] * share;
    total += sums[i * apart + size + 1] * share;
  }
  return sum;
}

// where the queries of a tile go, and which of its parts this is
struct Part {
  // of the first query among rows times heads, and from one query to the next
  long long query, stride;
  int count, part, parts;
  // of the buffer, which the length of a hypothesis does not change
  int most_parts;
  unsigned* arrivals;
};

// writes what `attend` left, or where there are several parts joins them all, if this is the last one to arrive
template <typename scalar_t>
__device__ inline void finish(const FusedStep& a, AttentionMemory<scalar_t>& shared, const Part& p) {
  const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(a.size);
  scalar_t* attended = static_cast<scalar_t*>(a.attended);
  for (int i = thread; i < p.count * size; i += kFusedThreads) {
    const int query = i / size, element = i % size;
    const long long row = p.query + query * p.stride;
    float top, total;
    const float sum = joined(shared.sums[0][query], kFusedWarps, kQueries * kSums, size, element, top, total);
    if (p.parts == 1) {
      narrow(sum / total, attended + row * size + element);
      continue;
    }
    float* partial = a.partial + (row * p.most_parts + p.part) * (size + 2);
    partial[element] = sum;
    if (element == 0) {
      partial[size] = top;
      partial[size + 1] = total;
    }
  }
  if (p.parts == 1) {
    return;
  }
  __syncthreads();
  if (thread == 0) {
    __threadfence();
    shared.last = atomicAdd(p.arrivals, 1u) == static_cast<unsigned>(p.parts) - 1;
    __threadfence();
    if (shared.last) {
      *p.arrivals = 0;
    }
  }
  __syncthreads();
  if (!shared.last) {
    return;
  }
  for (int i = thread; i < p.count * size; i += kFusedThreads) {
    const int query = i / size, element = i % size;
    const long long row = p.query + query * p.stride;
    float top, total;
    const float sum = joined(a.partial + row * p.most_parts * (size + 2), p.parts, size + 2, size, element, top, total);
    narrow(sum / total, attended + row * size + element);
  }
}

// rotates a pair as the newest position of a hypothesis
__device__ inline void rotate_pair(float& even, float& odd, int position, float frequency) {
  float sine, cosine;
  sincosf(static_cast<float>(position) * frequency, &sine, &cosine);
  const float turned = even * cosine - odd * sine;
  odd = odd * cosine + even * sine;
  even = turned;
}

// of all rows; appends the newest keys and values to the caches
template <typename scalar_t>
__device__ inline void attend_history(
    const FusedStep& a, AttentionMemory<scalar_t>& shared, long long layer, const float* freqs) {
  const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(a.size);
  const int members = static_cast<int>(a.heads / a.groups), tiles = (members + kQueries - 1) / kQueries;
  const int most_parts = static_cast<int>((a.capacity + kHistoryPart - 1) / kHistoryPart);
  const long long of_a_part = a.rows * a.groups * tiles;
  const float scale = 1.0f / sqrtf(static_cast<float>(size));
  scalar_t* keys = static_cast<scalar_t*>(a.keys[layer]);
  scalar_t* values = static_cast<scalar_t*>(a.values[layer]);
  for (long long item = blockIdx.x; item < of_a_part * most_parts; item += gridDim.x) {
    const int part = static_cast<int>(item / of_a_part), tile = static_cast<int>(item % tiles);
    const long long row = item % of_a_part / tiles / a.groups, group = item % of_a_part / tiles % a.groups;
    long long newest = a.lengths[row];
    // lengths and a table that are wrong must not lead outside the caches
    newest = newest < 0 ? 0 : newest < a.capacity ? newest : a.capacity - 1;
    const int parts = static_cast<int>(newest / kHistoryPart) + 1;
    if (part >= parts) {
      continue;
    }
    const int count = members - tile * kQueries < kQueries ? members - tile * kQueries : kQueries;
    const long long head = group * members + tile * kQueries;
    const float* projected = a.projected + row * (a.heads + 2 * a.groups) * size;
    const int position = static_cast<int>(newest);
    // what the block did before may still read its shared memory
    __syncthreads();
    for (int i = thread; i < (count + 1) * (size / 2); i += kFusedThreads) {
      const int query = i / (size / 2), pair = i % (size / 2);
      const float* from = projected + (query < count ? head + query : a.heads + group) * size + 2 * pair;
      float even = from[0], odd = from[1];
      rotate_pair(even, odd, position, freqs[pair]);
      if (query < count) {
        shared.queries[query][2 * pair] = even * scale;
        shared.queries[query][2 * pair + 1] = odd * scale;
      } else {
        narrow(even, shared.key + 2 * pair);
        narrow(odd, shared.key + 2 * pair + 1);
      }
    }
    for (int i = thread; i < size; i += kFusedThreads) {
      narrow(projected[(a.heads + a.groups + group) * size + i], shared.value + i);
    }
    __syncthreads();
    const long long own = (row * a.groups + group) * a.capacity + newest;
    if (part == parts - 1 && tile == 0) {
      for (int i = thread; i < size; i += kFusedThreads) {
        keys[own * size + i] = shared.key[i];
        values[own * size + i] = shared.value[i];
      }
    }
    const unsigned char* ancestors = a.ancestors + row * a.capacity;
    const long long first_row = row / a.beams * a.beams;
    const int end = part == parts - 1 ? position + 1 : (part + 1) * kHistoryPart;
    attend(shared, count, size, part * kHistoryPart, end, [&](int i, const scalar_t*& key, const scalar_t*& value) {
      if (i == position) {
        key = shared.key;
        value = shared.value;
        return;
      }
      const long long beam = ancestors[i] < a.beams ? ancestors[i] : a.beams - 1;
      const long long offset = (((first_row + beam) * a.groups + group) * a.capacity + i) * size;
      key = keys + offset;
      value = values + offset;
    });
    const Part done = {row * a.heads + head, 1, count, part, parts, most_parts, a.counters + 2 + item % of_a_part};
    finish(a, shared, done);
  }
}

// of the rows that have a source; position 0 is the null key, position i + 1 the source's i
template <typename scalar_t>
__device__ inline void attend_source(
    const FusedStep& a, AttentionMemory<scalar_t>& shared, long long layer, const scalar_t* null_key,
    const scalar_t* null_value) {
  const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(a.size), beams = static_cast<int>(a.beams);
  const int tiles = (beams + kQueries - 1) / kQueries;
  const int most_parts = static_cast<int>((a.source + a.split) / a.split);
  const long long of_a_part = a.sourced / beams * a.heads * tiles;
  const float scale = 1.0f / sqrtf(static_cast<float>(size));
  for (long long item = blockIdx.x; item < of_a_part * most_parts; item += gridDim.x) {
    const int part = static_cast<int>(item / of_a_part), tile = static_cast<int>(item % tiles);
    const long long utterance = item % of_a_part / tiles / a.heads, head = item % of_a_part / tiles % a.heads;
    long long length = a.memory_lengths[utterance];
    length = length < 0 ? 0 : length < a.source ? length : a.source;
    const int parts = static_cast<int>(length / a.split) + 1;
    if (part >= parts) {
      continue;
    }
    const int count = beams - tile * kQueries < kQueries ? beams - tile * kQueries : kQueries;
    const long long row = utterance * beams + tile * kQueries;
    __syncthreads();
    for (int i = thread; i < count * size; i += kFusedThreads) {
      const float* projected = a.projected + (row + i / size) * (a.heads + 2 * a.groups) * size;
      shared.queries[i / size][i % size] = projected[head * size + i % size] * scale;
    }
    __syncthreads();
    const scalar_t* keys = static_cast<const scalar_t*>(a.memory) + layer * a.memory_layer +
        utterance * a.memory_utterance + head * a.memory_head;
    const int begin = part * static_cast<int>(a.split);
    const int end = part == parts - 1 ? static_cast<int>(length) + 1 : begin + static_cast<int>(a.split);
    attend(shared, count, size, begin, end, [&](int i, const scalar_t*& key, const scalar_t*& value) {
      key = i == 0 ? null_key + head * size : keys + (i - 1) * a.memory_position;
      value = i == 0 ? null_value + head * size : keys + a.memory_value + (i - 1) * a.memory_position;
    });
    const Part done = {
        row * a.heads + head, a.heads, count, part, parts, most_parts, a.counters + 2 + item % of_a_part};
    finish(a, shared, done);
  }
}

}  // namespace spear_fast
