// matmuls of few rows with a matrix that is read from memory each time: its columns in panels, one asked for ahead
//
// A panel holds all of the depth for one to three vectors of outputs, in the order in which they are read. While the
// rows pass over one panel in the second cache, the next one is fetched into it: so the matmuls run at the speed of
// whichever is slower, arithmetic or memory, and not at the sum of both. Every output is one sum in one order, whatever
// rows there are beside it: a row's bits depend on nothing but the row and the weights.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "lanes.h"

namespace spear_fast {

// vectors of outputs in a panel and rows in a block, at most: their sums, a panel's vectors and a factor fill the
// registers
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
inline constexpr int kPanelVectors = 3, kPanelRows = 8;
#else
inline constexpr int kPanelVectors = 2, kPanelRows = 6;
#endif
// rows that pass over a panel before the next: they stay in the second cache beside it
inline constexpr int64_t kPanelGroup = 24 * kPanelRows;
// multiplications that are worth a thread of their own, where to read a weight counts as four
inline constexpr int64_t kPanelGrain = 1 << 18, kReading = 4;
// panels come in such numbers, so that threads have equal shares
inline constexpr int64_t kShares = 4;

// how a matrix [outputs, depth] of units of 32 bits lies: a float, or four numbers of 8 bits
struct Panels {
  static constexpr int64_t kLanes = Lanes<float>::size();

  int64_t outputs = 0, depth = 0, vectors = 0, count = 0;

  Panels() = default;

  Panels(int64_t outputs, int64_t depth) : outputs(outputs), depth(depth), vectors((outputs + kLanes - 1) / kLanes) {
    const int64_t least = (vectors + kPanelVectors - 1) / kPanelVectors;
    count = least > kShares ? std::min(vectors, (least + kShares - 1) / kShares * kShares) : least;
  }

  // the vector that a panel begins with; widths differ by one at most
  int64_t begin(int64_t panel) const { return vectors * panel / count; }

  int64_t units() const { return vectors * kLanes * depth; }

  // lays units out, zeros after the last output: unit_of(output, position in the depth)
  template <typename unit_t, typename UnitOf>
  void fill(unit_t* target, const UnitOf& unit_of) const {
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t from = begin(panel) * kLanes, width = begin(panel + 1) * kLanes - from;
        unit_t* rows = target + from * depth;
        for (int64_t i = 0; i < depth; ++i) {
          for (int64_t j = 0; j < width; ++j) {
            rows[i * width + j] = from + j < outputs ? unit_of(from + j, i) : unit_t(0);
          }
        }
      }
    });
  }
};

// what is asked for while a block is computed: its share of the next panel, some lines with each step in the depth
template <typename unit_t>
struct Ahead {
  static constexpr int64_t kLine = 64 / sizeof(unit_t);

  const unit_t* next;
  const unit_t* end;
  int64_t lines;

  void fetch() {
    if (next < end) {
      __builtin_prefetch(next, 0, 2);
      if (lines > 1) {
        __builtin_prefetch(next + kLine, 0, 2);
      }
      if (lines > 2) {
        __builtin_prefetch(next + 2 * kLine, 0, 2);
      }
      next += lines * kLine;
    }
  }
};

// sums[row, output] = sum over i of a[row, i] * panel[i, output]; the rows are written out by the compiler, see
// matmul.h
template <typename Arithmetic, int WIDTH, int... ROW>
[[gnu::noinline]] void panel_block(
    std::integer_sequence<int, ROW...>, const typename Arithmetic::unit_t* a, int64_t a_row,
    const typename Arithmetic::unit_t* panel, int64_t depth, Ahead<typename Arithmetic::unit_t> ahead,
    typename Arithmetic::unit_t* sums) {
  using Vector = typename Arithmetic::Vector;
  constexpr int64_t lanes = Panels::kLanes;
  Vector first[] = {(void(ROW), Vector(0))...}, second[] = {(void(ROW), Vector(0))...},
         third[] = {(void(ROW), Vector(0))...};
  for (int64_t i = 0; i < depth; ++i) {
    const auto* here = panel + i * WIDTH * lanes;
    ahead.fetch();
    const Vector b_first = Vector::loadu(here);
    const Vector b_second = WIDTH > 1 ? Vector::loadu(here + lanes) : b_first;
    const Vector b_third = WIDTH > 2 ? Vector::loadu(here + 2 * lanes) : b_first;
    const auto add = [&](int row, const Vector& factor) {
      first[row] = Arithmetic::add(factor, b_first, first[row]);
      if constexpr (WIDTH > 1) {
        second[row] = Arithmetic::add(factor, b_second, second[row]);
      }
      if constexpr (WIDTH > 2) {
        third[row] = Arithmetic::add(factor, b_third, third[row]);
      }
    };
    (add(ROW, Vector(a[ROW * a_row + i])), ...);
  }
  (first[ROW].store(sums + ROW * WIDTH * lanes), ...);
  if constexpr (WIDTH > 1) {
    (second[ROW].store(sums + ROW * WIDTH * lanes + lanes), ...);
  }
  if constexpr (WIDTH > 2) {
    (third[ROW].store(sums + ROW * WIDTH * lanes + 2 * lanes), ...);
  }
}

// calls body with a count of 1 to MOST as a constant
template <int MOST, typename Body>
inline void with_constant(int64_t count, const Body& body) {
  if constexpr (MOST > 1) {
    if (count < MOST) {
      return with_constant<MOST - 1>(count, body);
    }
  }
  body(std::integral_constant<int, MOST>{});
}

// calls finish(row, output, vector of sums over the depth from `start`, start) for all rows and outputs
//
// a: rows of units, `a_row` apart. panels: as Panels lays them out. chunk: units of the depth that are summed at a
// time, so that a panel's part stays in the second cache.
template <typename Arithmetic, typename Finish>
inline void multiply_panels(
    const Panels& shape, const typename Arithmetic::unit_t* a, int64_t a_row, int64_t rows,
    const typename Arithmetic::unit_t* panels, int64_t chunk, const Finish& finish) {
  if (rows == 0 || shape.outputs == 0) {
    return;
  }
  const int64_t parts = (shape.depth + chunk - 1) / chunk;
  const int64_t part = (shape.depth + parts - 1) / parts;
  // few panels for many threads: these share the rows too
  const int64_t shares = (at::get_num_threads() + shape.count - 1) / shape.count;
  const int64_t group = std::clamp<int64_t>((rows + shares - 1) / shares, kPanelRows, kPanelGroup);
  const int64_t groups = (rows + group - 1) / group;
  const int64_t work = (std::min(rows, group) + kReading) * shape.depth * kPanelVectors * Panels::kLanes;
  at::parallel_for(
      0, groups * shape.count, std::max<int64_t>(1, kPanelGrain / work), [&](int64_t first_task, int64_t last_task) {
        alignas(64) typename Arithmetic::unit_t sums[kPanelRows * kPanelVectors * Panels::kLanes];
        for (int64_t task = first_task; task < last_task; ++task) {
          const int64_t panel = task % shape.count, first_row = task / shape.count * group;
          const int64_t count = std::min(group, rows - first_row);
          const int64_t vector = shape.begin(panel), lanes = Panels::kLanes;
          with_constant<kPanelVectors>(shape.begin(panel + 1) - vector, [&](auto width) {
            constexpr int WIDTH = decltype(width)::value;
            for (int64_t start = 0; start < shape.depth; start += part) {
              const int64_t depth = std::min(part, shape.depth - start);
              const auto* here = panels + vector * lanes * shape.depth + start * WIDTH * lanes;
              const auto* next = here + depth * WIDTH * lanes;
              const bool goes_on = start + depth < shape.depth || task + 1 < last_task;
              const int64_t blocks = (count + kPanelRows - 1) / kPanelRows;
              // evenly: as many at once as memory answers would make the matmuls wait
              const int64_t size_ahead = goes_on ? depth * WIDTH * lanes : 0,
                            lines = (WIDTH * lanes / 16 + blocks - 1) / blocks;
              for (int64_t block = 0; block < blocks; ++block) {
                const int64_t row = count * block / blocks, size = count * (block + 1) / blocks - row;
                const Ahead<typename Arithmetic::unit_t> ahead{
                    next + size_ahead * block / blocks, next + size_ahead * (block + 1) / blocks, lines};
                with_constant<kPanelRows>(size, [&](auto each) {
                  panel_block<Arithmetic, WIDTH>(
                      std::make_integer_sequence<int, decltype(each)::value>(), a + (first_row + row) * a_row + start,
                      a_row, here, depth, ahead, sums);
                });
                for (int64_t i = 0; i < size; ++i) {
                  for (int64_t j = 0; j < WIDTH; ++j) {
                    finish(
                        first_row + row + i, (vector + j) * lanes,
                        Arithmetic::Vector::loadu(sums + (i * WIDTH + j) * lanes), start);
                  }
                }
              }
            }
          });
        }
      });
}

}  // namespace spear_fast
