// the scheduler of cuda_emulation.h
#include "cuda_emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

__thread Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStack = 64 * 1024;
enum class Waits { kNothing, kWarp, kBlock, kGrid, kEnded };

struct Fiber {
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  ucontext_t entry;
  jmp_buf place;
  Waits waits = Waits::kNothing;
  bool entered = false;
  int exchanges = 0;
  unsigned word[2];
  std::vector<std::pair<void*, const void*>> copies;
};

// of the block that this host thread plays
thread_local std::vector<Fiber> fibers;
thread_local int current;
thread_local ucontext_t scheduler_entry;
thread_local jmp_buf scheduler_place;
void (*body)(const void*);
const void* arguments;

// whose turn it is among blocks that run together
std::mutex turns;
std::condition_variable turn_changed;
int turn;
std::vector<int> unfinished;
// rounds one after the other in which all that ran looked in vain for what other blocks write
long long idle_rounds;

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

// a warp goes on when all of its lanes wait for each other, a block when all threads that have not ended do; whoever
// waits for other blocks looks again
void release() {
  release(fibers.begin(), fibers.end(), Waits::kGrid);
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

// gives the turn to any block that has not ended, this one included, and waits until it comes back
void give_turn(std::mt19937& random, int block) {
  std::unique_lock<std::mutex> lock(turns);
  if (unfinished.empty()) {
    return;
  }
  turn = unfinished[random() % unfinished.size()];
  turn_changed.notify_all();
  const bool ended = std::find(unfinished.begin(), unfinished.end(), block) == unfinished.end();
  turn_changed.wait(lock, [&] { return ended || turn == block; });
}

void run_block(std::mt19937& random, int threads, int block, bool together) {
  blockIdx = {static_cast<unsigned>(block), 0, 0};
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  prepare();
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    bool moved = false, ended = true, idle = true;
    for (const int thread : order) {
      if (fibers[thread].waits == Waits::kNothing) {
        moved = true;
        enter(thread);
        idle = idle && fibers[thread].waits == Waits::kGrid;
      }
      ended = ended && fibers[thread].waits == Waits::kEnded;
    }
    if (ended) {
      return;
    }
    if (!moved) {
      emulated_failure("a barrier or an exchange in a warp is not reached by all of its threads");
    }
    idle_rounds = idle ? idle_rounds + 1 : 0;
    if (idle_rounds > 1000 * static_cast<long long>(gridDim.x)) {
      emulated_failure("a barrier of the grid is not reached by all of its blocks");
    }
    release();
    if (together && (idle || random() % 2)) {
      give_turn(random, block);
    }
  }
}

// as a cooperative launch: all blocks are there at once. Each has a host thread, and so its own __shared__ memory, but
// only the one whose turn it is runs
void run_together(std::mt19937& random, int threads, const std::vector<int>& order) {
  unfinished = order;
  turn = order.front();
  const Index block_size = blockDim, grid_size = gridDim;
  std::vector<std::thread> hosts;
  for (const int block : order) {
    hosts.emplace_back([&, block] {
      blockDim = block_size;
      gridDim = grid_size;
      fibers = std::vector<Fiber>(threads);
      {
        std::unique_lock<std::mutex> lock(turns);
        turn_changed.wait(lock, [&] { return turn == block; });
      }
      run_block(random, threads, block, true);
      idle_rounds = 0;
      unfinished.erase(std::find(unfinished.begin(), unfinished.end(), block));
      give_turn(random, block);
    });
  }
  for (std::thread& host : hosts) {
    host.join();
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

void emulated_look_again() {
  fibers[current].waits = Waits::kGrid;
  leave();
}

// two words in turn, so that no lane overwrites what another has yet to read
unsigned emulated_exchange(unsigned bits, int source) {
  const int side = fibers[current].exchanges++ % 2;
  fibers[current].word[side] = bits;
  emulated_barrier(false);
  return fibers[current / 32 * 32 + source].word[side];
}

// four bytes arrive when they are waited for, and not before
void emulated_copy(void* to, const void* from) {
  if (reinterpret_cast<size_t>(to) % 4 || reinterpret_cast<size_t>(from) % 4) {
    emulated_failure("a copy of a word is not aligned");
  }
  memset(to, 0xaa, 4);
  fibers[current].copies.emplace_back(to, from);
}

void emulated_arrival() {
  for (const auto& [to, from] : fibers[current].copies) {
    memcpy(to, from, 4);
  }
  fibers[current].copies.clear();
}

// calls body(arguments) as each thread of each block; together: blocks may wait for each other
void emulate(
    long long blocks, int threads, unsigned seed, bool together, void (*called)(const void*), const void* with) {
  body = called;
  arguments = with;
  idle_rounds = 0;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  std::mt19937 random(seed);
  std::vector<int> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  if (together) {
    run_together(random, threads, order);
    return;
  }
  fibers = std::vector<Fiber>(threads);
  for (const int block : order) {
    run_block(random, threads, block, false);
  }
}
