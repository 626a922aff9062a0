// the scheduler of cuda_emulation.h
#include "cuda_emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStack = 64 * 1024;
enum class Waits { kNothing, kWarp, kBlock, kEnded };

struct Fiber {
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  ucontext_t entry;
  jmp_buf place;
  Waits waits = Waits::kNothing;
  bool entered = false;
  int exchanges = 0;
  unsigned word[2];
};

std::vector<Fiber> fibers;
int current;
ucontext_t scheduler_entry;
jmp_buf scheduler_place;
void (*body)(const void*);
const void* arguments;

// jumps, not swapcontext: that asks the kernel for the signal mask each time
void leave() {
  if (_setjmp(fibers[current].place) == 0) {
    _longjmp(scheduler_place, 1);
  }
}

void start() {
  body(arguments);
  fibers[current].waits = Waits::kEnded;
  _longjmp(scheduler_place, 1);
}

void enter(int thread) {
  current = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler_place) != 0) {
    return;
  }
  if (fiber.entered) {
    _longjmp(fiber.place, 1);
  }
  fiber.entered = true;
  swapcontext(&scheduler_entry, &fiber.entry);
}

void prepare() {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStack;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, start, 0);
    fiber.waits = Waits::kNothing;
    fiber.entered = false;
  }
}

template <typename Range>
void release(Range begin, Range end, Waits what) {
  for (; begin != end; ++begin) {
    if (begin->waits == what) {
      begin->waits = Waits::kNothing;
    }
  }
}

// a warp goes on when all of its lanes wait for each other, a block when all threads that have not ended do
void release() {
  for (size_t warp = 0; warp < fibers.size(); warp += 32) {
    const auto begin = fibers.begin() + warp, end = fibers.begin() + std::min(warp + 32, fibers.size());
    if (std::all_of(begin, end, [](const Fiber& fiber) { return fiber.waits == Waits::kWarp; })) {
      release(begin, end, Waits::kWarp);
    }
  }
  if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) {
        return fiber.waits == Waits::kBlock || fiber.waits == Waits::kEnded;
      })) {
    release(fibers.begin(), fibers.end(), Waits::kBlock);
  }
}

void run_block(std::mt19937& random, std::vector<int>& order) {
  prepare();
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    bool moved = false, ended = true;
    for (const int thread : order) {
      if (fibers[thread].waits == Waits::kNothing) {
        moved = true;
        enter(thread);
      }
      ended = ended && fibers[thread].waits == Waits::kEnded;
    }
    if (ended) {
      return;
    }
    if (!moved) {
      emulated_failure("a barrier or an exchange in a warp is not reached by all of its threads");
    }
    release();
  }
}

}  // namespace

void emulated_failure(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

void emulated_barrier(bool whole_block) {
  fibers[current].waits = whole_block ? Waits::kBlock : Waits::kWarp;
  leave();
}

// two words in turn, so that no lane overwrites what another has yet to read
unsigned emulated_exchange(unsigned bits, int source) {
  const int side = fibers[current].exchanges++ % 2;
  fibers[current].word[side] = bits;
  emulated_barrier(false);
  return fibers[current / 32 * 32 + source].word[side];
}

// calls body(arguments) as each thread of each block
void emulate(long long blocks, int threads, unsigned seed, void (*called)(const void*), const void* with) {
  body = called;
  arguments = with;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  fibers = std::vector<Fiber>(threads);
  std::mt19937 random(seed);
  std::vector<int> order(threads), block_order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::iota(block_order.begin(), block_order.end(), 0);
  std::shuffle(block_order.begin(), block_order.end(), random);
  for (const int block : block_order) {
    blockIdx = {static_cast<unsigned>(block), 0, 0};
    run_block(random, order);
  }
}
