// how the calls of the CUDA kernels are cut up; spear_fast/ops/cuda computes the same in Python, and a test compares
// the two
#pragma once

#include <cstdint>

namespace spear_fast {

struct SelfAttentionPlan {
  // lanes of a warp that share a row of the cache; query rows of a block; chunks; blocks for the query rows of a key
  // head
  int64_t lanes, rows, splits, tiles;
  // blocks of the grid; floats of memory that the chunks need
  int64_t blocks, partial;
};

inline SelfAttentionPlan plan_self_attention(
    int64_t utterances, int64_t beams, int64_t tokens, int64_t heads, int64_t groups, int64_t size, int64_t buffer,
    int64_t itemsize, bool aligned) {
  constexpr int64_t kPositions = 128;
  const int64_t all_rows = beams * tokens * (heads / groups);
  SelfAttentionPlan plan;
  plan.rows = all_rows <= 5 || !aligned ? 5 : 8;
  plan.rows = all_rows == 1 && aligned ? 1 : plan.rows;
  plan.splits = buffer > kPositions ? (buffer + kPositions - 1) / kPositions : 1;
  plan.tiles = (all_rows + plan.rows - 1) / plan.rows;
  plan.blocks = utterances * groups * plan.splits * plan.tiles;
  plan.partial = plan.splits > 1 ? utterances * all_rows * groups * plan.splits * (size + 2) : 0;
  plan.lanes = size * itemsize <= 128 ? 8 : size * itemsize <= 256 ? 16 : 32;
  return plan;
}

}  // namespace spear_fast
