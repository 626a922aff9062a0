// the matmuls of fused_step.cu: all rows times weights that are read once
//
// A tile is kTile rows of the weights, worked on by the warps of a block that share a row of weights; a lane multiplies
// packs of eight weights with those of all rows of x, which lie in shared memory. How a sum is cut up hangs on the
// number of features alone: a row gets the same bits whatever rows, and however many, are beside it.
#pragma once

#include "fused_parts.h"

namespace spear_fast {

// rows of the weights that a warp works on at once
inline constexpr int kTile = 4;
// packs of x that a block holds, of all rows together, and packs of a normed row that a lane holds: 1024 numbers a row
inline constexpr int kStagedPacks = 2048;
inline constexpr int kNormedPacks = 4;

enum class Into { kProjected, kHidden, kActivations, kLogits };

// into = weight @ x for each row; x: where hidden states are added to, `with` `[rows, features]`, else the hidden
// states, normed by the gamma `with`
template <typename scalar_t>
struct Product {
  const scalar_t* weight;
  int outputs, features, rows;
  const scalar_t* with;
  Into into;
  long long layer;

  __device__ inline bool gated() const { return into == Into::kActivations; }

  // a tile of the activations is half of values and half of gates
  __device__ inline int columns() const { return gated() ? kTile / 2 : kTile; }

  __device__ inline int distinct() const { return gated() ? outputs / 2 : outputs; }

  __device__ inline int tiles() const { return (distinct() + columns() - 1) / columns(); }

  // which row of the weights is number j of a tile; those past the last column are as the last one, and not stored
  __device__ inline int row(int tile, int j) const {
    const int output = tile * columns() + j % columns();
    return (output < distinct() ? output : distinct() - 1) + (j >= columns() ? distinct() : 0);
  }
};

template <typename scalar_t>
__device__ inline const scalar_t* weight_of(const FusedStep& a, long long layer, FusedWeight which) {
  return reinterpret_cast<const scalar_t*>(a.weights[layer * kFusedWeights + which]);
}

template <int ROWS>
struct ProductMemory {
  uint4 x[ROWS][kStagedPacks / ROWS];
  float sums[kFusedWarps][kTile * ROWS];
};

// returns eight numbers as they lie in memory
template <typename scalar_t>
__device__ inline uint4 packed(const float* x) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scalar_t low, high;
    narrow(x[2 * i], &low);
    narrow(x[2 * i + 1], &high);
    words[i] = static_cast<unsigned>(low.bits) | static_cast<unsigned>(high.bits) << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

// leaves each lane with its share of N numbers that are added up over a warp; returns the first of the share, which has
// N / 32 numbers, one at least. The order of additions does not hang on N
template <int N>
__device__ inline int scatter_sums(float (&x)[N]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int first = 0;
  if constexpr (N >= 64) {
    float half[N / 2];
    const bool upper = lane & 16;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float sent = upper ? x[i] : x[i + N / 2];
      half[i] = (upper ? x[i + N / 2] : x[i]) + __shfl_xor_sync(0xffffffffu, sent, 16);
    }
    first += upper ? N / 2 : 0;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      x[i] = half[i];
    }
  }
  constexpr int kFirstOffset = N >= 64 ? 8 : 16;
  int left = N >= 64 ? N / 2 : N;
#pragma unroll
  for (int offset = kFirstOffset; offset > 0; offset /= 2) {
    if (left > 1) {
      left /= 2;
      const bool upper = lane & offset;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        if (i < left) {
          const float sent = upper ? x[i] : x[i + left];
          x[i] = (upper ? x[i + left] : x[i]) + __shfl_xor_sync(0xffffffffu, sent, offset);
        }
      }
      first += upper ? left : 0;
    } else {
      x[0] += __shfl_xor_sync(0xffffffffu, x[0], offset);
    }
  }
  return first;
}

// the hidden states of all rows, each over its norm, times gamma
template <int ROWS, typename scalar_t>
__device__ inline void stage_normed(const FusedStep& a, ProductMemory<ROWS>& shared, const Product<scalar_t>& p) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int row = warp; row < p.rows; row += kFusedWarps) {
    const float* hidden = a.hidden + static_cast<long long>(row) * p.features;
    float x[kNormedPacks][8] = {};
    float squares = 0;
#pragma unroll
    for (int j = 0; j < kNormedPacks; ++j) {
      const int first = (j * kWarp + lane) * 8;
      if (first < p.features) {
        unpack(0.0f, *reinterpret_cast<const uint4*>(hidden + first), x[j]);
        unpack(0.0f, *reinterpret_cast<const uint4*>(hidden + first + 4), x[j] + 4);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        squares += x[j][i] * x[j][i];
      }
    }
    // as RMSNorm and torch.nn.functional.normalize have it; where gamma is folded into the weights, so is the root
    const float root = p.with == nullptr ? 1.0f : sqrtf(static_cast<float>(p.features));
    const float inverse = root / fmaxf(sqrtf(sum_lanes<kWarp>(squares)), 1e-12f);
#pragma unroll
    for (int j = 0; j < kNormedPacks; ++j) {
      const int pack = j * kWarp + lane;
      if (pack * 8 < p.features) {
        float gamma[8] = {1, 1, 1, 1, 1, 1, 1, 1};
        if (p.with != nullptr) {
          unpack(scalar_t{}, load_pack<true>(p.with, pack * 8, p.features), gamma);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          gamma[i] *= x[j][i] * inverse;
        }
        shared.x[row][pack] = packed<scalar_t>(gamma);
      }
    }
  }
}

// features first..last of all rows
template <int ROWS, typename scalar_t>
__device__ inline void stage_plain(ProductMemory<ROWS>& shared, const Product<scalar_t>& p, int first, int last) {
  const int packs = (last - first) / 8;
  for (int i = static_cast<int>(threadIdx.x); i < p.rows * packs; i += kFusedThreads) {
    const scalar_t* row = p.with + static_cast<long long>(i / packs) * p.features;
    shared.x[i / packs][i % packs] = *reinterpret_cast<const uint4*>(row + first + i % packs * 8);
  }
}

// what becomes of a tile's sums for one of its columns and a row; `gate`: of the activations
template <typename scalar_t>
__device__ inline void store(
    const FusedStep& a, const Product<scalar_t>& p, int output, int row, float sum, float gate) {
  if (p.into == Into::kProjected) {
    a.projected[row * (a.heads + 2 * a.groups) * a.size + output] = sum;
  } else if (p.into == Into::kHidden) {
    a.hidden[row * a.dim + output] += sum;
  } else if (p.into == Into::kLogits) {
    narrow(sum, static_cast<scalar_t*>(a.logits) + row * a.vocab + output);
  } else {
    const auto* bias = weight_of<scalar_t>(a, p.layer, kFeedBias);
    const float value = sum + widen(bias[output]), gated = gate + widen(bias[a.inner + output]);
    const float through = 0.5f * (1.0f + erff(gated * 0.70710678f));
    narrow(value * gated * through, static_cast<scalar_t*>(a.activations) + row * a.inner + output);
  }
}

// asks for the weights that this block will read, before it waits for the others: nothing else passes meanwhile
template <typename scalar_t>
__device__ inline void fetch_ahead(const Product<scalar_t>& p) {
  constexpr int kLine = 128 / sizeof(scalar_t);
  const int first = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x), tiles = p.tiles();
  const int lines = (p.features + kLine - 1) / kLine, own = first < tiles ? (tiles - first - 1) / blocks + 1 : 0;
  for (int i = static_cast<int>(threadIdx.x); i < own * kTile * lines; i += kFusedThreads) {
    const int row = p.row(first + i / (kTile * lines) * blocks, i / lines % kTile);
    prefetch(p.weight + static_cast<long long>(row) * p.features + i % lines * kLine);
  }
}

template <int ROWS, typename scalar_t>
__device__ inline void multiply(const FusedStep& a, ProductMemory<ROWS>& shared, const Product<scalar_t>& p) {
  constexpr int kChunk = kStagedPacks / ROWS * 8;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const bool gated = p.gated();
  const int columns = p.columns(), outputs = p.distinct(), tiles = p.tiles();
  // warps that share a row of weights: about a pack for each lane
  int sharing = 1;
  while (sharing < kFusedWarps && sharing * kWarp * 8 < p.features) {
    sharing *= 2;
  }
  const int together = kFusedWarps / sharing, blocks = static_cast<int>(gridDim.x);
  // what fits as a whole is staged once, by blocks that have a tile; what is normed does
  const bool whole = p.features <= kChunk;
  if (whole && static_cast<int>(blockIdx.x) < tiles) {
    if (p.into != Into::kHidden) {
      stage_normed<ROWS>(a, shared, p);
    } else {
      stage_plain<ROWS>(shared, p, 0, p.features);
    }
    __syncthreads();
  }
  for (int first = static_cast<int>(blockIdx.x); first < tiles; first += together * blocks) {
    const int tile = first + warp / sharing * blocks;
    int rows[kTile];
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      rows[j] = p.row(tile, j) * p.features;
    }
    float sums[kTile * ROWS] = {};
    for (int begin = 0; begin < p.features; begin += kChunk) {
      const int end = p.features - begin < kChunk ? p.features : begin + kChunk;
      if (!whole) {
        __syncthreads();
        stage_plain<ROWS>(shared, p, begin, end);
        __syncthreads();
      }
      // as many loads under way as the sums leave registers for
#pragma unroll(ROWS > 8 ? 1 : 2)
      for (int pack = warp % sharing * kWarp + lane; tile < tiles && begin + pack * 8 < end; pack += sharing * kWarp) {
        uint4 packs[kTile];
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
          packs[j] = __ldg(reinterpret_cast<const uint4*>(p.weight + rows[j] + begin + pack * 8));
        }
        float weights[kTile][8];
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
          unpack(scalar_t{}, packs[j], weights[j]);
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
          float x[8];
          unpack(scalar_t{}, shared.x[row][pack], x);
#pragma unroll
          for (int j = 0; j < kTile; ++j) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              sums[j * ROWS + row] += weights[j][i] * x[i];
            }
          }
        }
      }
    }
    constexpr int kShare = kTile * ROWS > kWarp ? kTile * ROWS / kWarp : 1;
    const int share = scatter_sums(sums);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      shared.sums[warp][share + i] = sums[i];
    }
    __syncthreads();
    for (int i = thread; i < together * columns * p.rows; i += kFusedThreads) {
      const int slot = i / (columns * p.rows), column = i / p.rows % columns, row = i % p.rows;
      const int output = (first + slot * blocks) * columns + column;
      if (output < outputs) {
        float sum = 0, gate = 0;
        for (int j = slot * sharing; j < (slot + 1) * sharing; ++j) {
          sum += shared.sums[j][column * ROWS + row];
          gate += shared.sums[j][(gated ? column + columns : column) * ROWS + row];
        }
        store(a, p, output, row, sum, gate);
      }
    }
    __syncthreads();
  }
}

}  // namespace spear_fast
