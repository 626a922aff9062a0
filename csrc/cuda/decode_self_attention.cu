// attention of the newest tokens over their own history, on caches that are never moved: the ancestor table is followed
// in place
//
// A block takes kChunk positions of one utterance and one key head for up to ROWS query rows, ordered (beam, token,
// member of the head's group). A row of the cache is loaded once for neighbouring query rows that read the same beam,
// so what beams share is read once. Scores of the chunk stay in shared memory between the passes over keys and over
// values. The chunks' borders depend on the buffer alone: a hypothesis gets the same bits whatever else is in the
// batch.
#include "decode_self_attention.h"
#include "device.h"

namespace spear_fast {

inline constexpr int kThreads = 128;
inline constexpr int kWarps = kThreads / kWarp;
// positions of a block
inline constexpr int kChunk = 128;

// positions that token `token` of a hypothesis reads, its own included; never more than the buffer has
__device__ inline int self_attention_limit(const SelfAttention& a, long long utterance, int beam, int token) {
  long long length = a.lengths[utterance * a.lengths_utterance + beam * a.lengths_beam];
  length = length < a.buffer ? length : a.buffer;
  const long long limit = length - a.tokens + token + 1;
  return limit > 0 ? static_cast<int>(limit) : 0;
}

// where a chunk's sums of a query row lie: `size` sums, the largest score, the sum of weights
__device__ inline float* self_attention_partial(const SelfAttention& a, long long row, long long split) {
  return a.partial + (row * a.splits + split) * (a.size + 2);
}

template <typename scalar_t, int LANES, int ROWS, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, ROWS > 5 ? 3 : 4) decode_self_attention(SelfAttention a) {
  constexpr int kElements = kPack<scalar_t>;
  constexpr int kWidth = LANES * kElements;
  // positions that the block takes at once, and how many of such steps are under way together
  constexpr int kPlaces = kThreads / LANES;
  constexpr int kSteps = ROWS > 1 ? 2 : 4;
  __shared__ float s_query[ROWS][kWidth];
  __shared__ float s_weights[ROWS][kChunk];
  __shared__ float s_sums[kWarps][ROWS][kWidth];
  __shared__ float s_top[ROWS], s_total[ROWS];
  __shared__ int s_limits[ROWS], s_beams[ROWS];
  __shared__ unsigned char s_cache_beams[ROWS][kChunk];

  const int size = static_cast<int>(a.size), thread = static_cast<int>(threadIdx.x);
  const int members = static_cast<int>(a.heads / a.groups), per_beam = static_cast<int>(a.tokens) * members;
  long long block = blockIdx.x;
  const int first_row = static_cast<int>(block % a.tiles) * ROWS;
  block /= a.tiles;
  const long long split = block % a.splits;
  block /= a.splits;
  const long long group = block % a.groups, utterance = block / a.groups;
  const int all_rows = static_cast<int>(a.beams) * per_beam;
  const int rows = all_rows - first_row < ROWS ? all_rows - first_row : ROWS;
  const int begin = static_cast<int>(split) * kChunk;
  const int first_beam = first_row / per_beam;

  if (thread < rows) {
    const int row = first_row + thread;
    s_limits[thread] = self_attention_limit(a, utterance, row / per_beam, row % per_beam / members);
    s_beams[thread] = row / per_beam - first_beam;
  }
  __syncthreads();
  int longest = 0;
  for (int row = 0; row < rows; ++row) {
    longest = s_limits[row] > longest ? s_limits[row] : longest;
  }
  // where there are several chunks, the merge knows which of them hold anything
  if (begin >= longest && a.splits > 1) {
    return;
  }
  const int count = longest - begin < kChunk ? longest - begin : kChunk;

  // beam indices in the cache of each beam of the tile: its last row reads furthest
  const int tile_beams = s_beams[rows - 1] + 1;
  for (int i = thread; i < tile_beams * kChunk; i += kThreads) {
    const int beam = i / kChunk, position = begin + i % kChunk;
    const int after = (first_beam + beam + 1) * per_beam - first_row;
    int cache_beam = 0;
    if (position < s_limits[(after < rows ? after : rows) - 1]) {
      cache_beam = a.ancestors
                       [utterance * a.ancestors_utterance + (first_beam + beam) * a.ancestors_beam +
                        position * a.ancestors_position];
      // a table that is wrong must not lead outside the caches
      cache_beam = cache_beam < a.beams ? cache_beam : static_cast<int>(a.beams) - 1;
    }
    s_cache_beams[beam][i % kChunk] = static_cast<unsigned char>(cache_beam);
  }
  const float scale = 1.0f / sqrtf(static_cast<float>(size));
  for (int i = thread; i < rows * (kWidth / 2); i += kThreads) {
    const int row = i / (kWidth / 2), pair = i % (kWidth / 2);
    float even = 0, odd = 0;
    if (2 * pair < size) {
      const int beam = (first_row + row) / per_beam, token = (first_row + row) % per_beam / members;
      const long long head = group * members + (first_row + row) % members;
      const scalar_t* query = static_cast<const scalar_t*>(a.query) + utterance * a.query_utterance +
          beam * a.query_beam + token * a.query_token + head * a.query_head;
      even = widen(query[2 * pair * a.query_element]);
      odd = widen(query[(2 * pair + 1) * a.query_element]);
      const float position = static_cast<float>(s_limits[row] > 0 ? s_limits[row] - 1 : 0);
      float sine, cosine;
      sincosf(position * a.freqs[pair * a.freqs_element], &sine, &cosine);
      const float turned = even * cosine - odd * sine;
      odd = (odd * cosine + even * sine) * scale;
      even = turned * scale;
    }
    s_query[row][2 * pair] = even;
    s_query[row][2 * pair + 1] = odd;
  }
  __syncthreads();

  const int lane = thread % LANES, place = thread / LANES;
  const long long first_beam_row = utterance * a.beams;
  const scalar_t* keys = static_cast<const scalar_t*>(a.cache_key) + first_beam_row * a.key_row + group * a.key_group;
  const scalar_t* values =
      static_cast<const scalar_t*>(a.cache_value) + first_beam_row * a.value_row + group * a.value_group;
  {
    float query[ROWS][kElements];
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        query[row][i] = row < rows ? s_query[row][lane * kElements + i] : 0.0f;
      }
    }
    for (int step = 0; step < count; step += kPlaces * kSteps) {
      float key[kSteps][kElements] = {};
      int held[kSteps];
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        held[j] = -1;
      }
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        if (row < rows) {
          const unsigned char* cache_beams = s_cache_beams[s_beams[row]];
          const int limit = s_limits[row] - begin;
          uint4 pack[kSteps];
          bool fresh[kSteps];
#pragma unroll
          for (int j = 0; j < kSteps; ++j) {
            const int i = step + j * kPlaces + place;
            const int cache_beam = i < limit ? cache_beams[i] : held[j];
            fresh[j] = cache_beam != held[j];
            if (fresh[j]) {
              held[j] = cache_beam;
              pack[j] = load_pack<ALIGNED>(
                  keys + cache_beam * a.key_row + (begin + i) * a.key_position, lane * kElements, size);
            }
          }
#pragma unroll
          for (int j = 0; j < kSteps; ++j) {
            if (fresh[j]) {
              unpack(scalar_t{}, pack[j], key[j]);
            }
            float sum = 0;
#pragma unroll
            for (int i = 0; i < kElements; ++i) {
              sum += query[row][i] * key[j][i];
            }
            sum = sum_lanes<LANES>(sum);
            const int i = step + j * kPlaces + place;
            if (lane == 0) {
              s_weights[row][i] = i < limit ? sum : minus_infinity();
            }
          }
        }
      }
    }
  }
  __syncthreads();

  for (int row = thread / kWarp; row < rows; row += kWarps) {
    float scores[kChunk / kWarp];
    float top = minus_infinity();
#pragma unroll
    for (int j = 0; j < kChunk / kWarp; ++j) {
      const int i = j * kWarp + thread % kWarp;
      scores[j] = i < count ? s_weights[row][i] : minus_infinity();
      top = fmaxf(top, scores[j]);
    }
    top = warp_max(top);
    float total = 0;
#pragma unroll
    for (int j = 0; j < kChunk / kWarp; ++j) {
      const float weight = top == minus_infinity() ? 0.0f : expf(scores[j] - top);
      s_weights[row][j * kWarp + thread % kWarp] = weight;
      total += weight;
    }
    total = sum_lanes<kWarp>(total);
    if (thread % kWarp == 0) {
      s_top[row] = top;
      s_total[row] = total;
    }
  }
  __syncthreads();

  {
    float sums[ROWS][kElements] = {};
    for (int step = 0; step < count; step += kPlaces * kSteps) {
      float value[kSteps][kElements] = {};
      int held[kSteps];
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        held[j] = -1;
      }
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        if (row < rows) {
          const unsigned char* cache_beams = s_cache_beams[s_beams[row]];
          const int limit = s_limits[row] - begin;
          uint4 pack[kSteps];
          bool fresh[kSteps];
#pragma unroll
          for (int j = 0; j < kSteps; ++j) {
            const int i = step + j * kPlaces + place;
            const int cache_beam = i < limit ? cache_beams[i] : held[j];
            fresh[j] = cache_beam != held[j];
            if (fresh[j]) {
              held[j] = cache_beam;
              pack[j] = load_pack<ALIGNED>(
                  values + cache_beam * a.value_row + (begin + i) * a.value_position, lane * kElements, size);
            }
          }
#pragma unroll
          for (int j = 0; j < kSteps; ++j) {
            if (fresh[j]) {
              unpack(scalar_t{}, pack[j], value[j]);
            }
            // what another row reads here must not reach this one, not even times zero
            const int i = step + j * kPlaces + place;
            if (i < limit) {
              const float weight = s_weights[row][i];
#pragma unroll
              for (int k = 0; k < kElements; ++k) {
                sums[row][k] += weight * value[j][k];
              }
            }
          }
        }
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      if (row < rows) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
#pragma unroll
          for (int offset = LANES; offset < kWarp; offset *= 2) {
            sums[row][i] += __shfl_xor_sync(0xffffffffu, sums[row][i], offset);
          }
          if (thread % kWarp < LANES) {
            s_sums[thread / kWarp][row][lane * kElements + i] = sums[row][i];
          }
        }
      }
    }
  }
  __syncthreads();

  for (int i = thread; i < rows * size; i += kThreads) {
    const int row = i / size, element = i % size;
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += s_sums[warp][row][element];
    }
    const long long beam = (first_row + row) / per_beam, token = (first_row + row) % per_beam / members;
    const long long head = group * members + (first_row + row) % members;
    const long long query_row = ((utterance * a.beams + beam) * a.tokens + token) * a.heads + head;
    if (a.splits == 1) {
      const float total = s_total[row];
      narrow(total > 0 ? sum / total : 0.0f, static_cast<scalar_t*>(a.out) + query_row * size + element);
    } else if (begin < s_limits[row]) {
      float* partial = self_attention_partial(a, query_row, split);
      partial[element] = sum;
      if (element == 0) {
        partial[size] = s_top[row];
        partial[size + 1] = s_total[row];
      }
    }
  }
}

// joins the chunks of each query row; a warp a row
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) merge_self_attention(SelfAttention a) {
  const long long row = static_cast<long long>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= a.utterances * a.beams * a.tokens * a.heads) {
    return;
  }
  const long long hypothesis = row / a.heads / a.tokens;
  const int limit = self_attention_limit(
      a, hypothesis / a.beams, static_cast<int>(hypothesis % a.beams), static_cast<int>(row / a.heads % a.tokens));
  const int chunks = (limit + kChunk - 1) / kChunk, size = static_cast<int>(a.size);
  float top = minus_infinity();
  for (int i = 0; i < chunks; ++i) {
    top = fmaxf(top, self_attention_partial(a, row, i)[size]);
  }
  float total = 0;
  for (int i = 0; i < chunks; ++i) {
    const float* partial = self_attention_partial(a, row, i);
    total += partial[size + 1] * expf(partial[size] - top);
  }
  for (int element = threadIdx.x % kWarp; element < size; element += kWarp) {
    float sum = 0;
    for (int i = 0; i < chunks; ++i) {
      const float* partial = self_attention_partial(a, row, i);
      sum += partial[element] * expf(partial[size] - top);
    }
    narrow(total > 0 ? sum / total : 0.0f, static_cast<scalar_t*>(a.out) + row * size + element);
  }
}

}  // namespace spear_fast
