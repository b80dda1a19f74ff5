// Runs CUDA kernels on the host, thread by thread, for tests: what the language offers, without its
// speed. Each thread of a block is a fiber. Which fiber runs next is random, and so is the order of
// the blocks: a missing barrier shows as a wrong result on some seed. Copies that PTX makes
// asynchronously happen as late as the program allows.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

struct Index {
  unsigned x, y, z;
};

// Threads that wait for each other. Ends when all have arrived; arrivals of the next round may
// come before every thread has seen the end of this one.
struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t round = 0;
};

struct Warp {
  Barrier barrier;
  // What the lanes show each other; two, since a lane may be one exchange ahead.
  uint32_t exchange[2][32][8];
  uint64_t exchanges[32] = {};
};

struct Copy {
  uint32_t destination;
  const void* source;  // null: zeros
};

struct Block;

struct Thread {
  Index thread_idx{};
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  bool done = false, paused = false;
  const Barrier* waits_for = nullptr;
  uint64_t waits_round = 0;
  std::deque<std::vector<Copy>> copies{{}};  // committed groups, then the open one
  std::deque<std::vector<std::function<void()>>> products{{}};  // of wgmma, likewise
  Barrier stores;  // to global memory, by the tensor memory accelerator: counts those made
  uint64_t stores_begun = 0, stores_committed = 0;
  jmp_buf at;
};

// An mbarrier: a phase ends when its arrivals and the bytes that they expect have come.
struct Phases {
  int expected = 0, arrived = 0;
  int64_t bytes = 0;
  Barrier completed;  // counts the phases
};

constexpr size_t kSharedBytes = 228 << 10, kStackBytes = 64 << 10;

struct alignas(1024) Block {
  char shared[kSharedBytes];
  Index index{};
  unsigned threads = 0, alive = 0;
  Barrier barrier;    // of __syncthreads
  Barrier named[16];  // of other groups of warps
  Barrier* cluster = nullptr;
};

// Blocks that run at the same time.
struct Wave {
  std::deque<Block> blocks;
  Index grid{};
  int alive = 0;                 // threads that have not ended
  std::deque<Barrier> clusters;  // of so many consecutive blocks each
  unsigned cluster = 1;
  std::map<const void*, Phases> phases;
  std::vector<std::function<void()>> copies;  // by the tensor memory accelerator, not made yet
};

inline Thread* current = nullptr;
inline Wave wave;
inline jmp_buf scheduler;
inline size_t shared_bytes = 0;  // that the running kernel asked for
inline const std::function<void()>* body = nullptr;
inline std::mt19937 random_numbers{1};
inline uint64_t shared_version = 0;  // changes with the tiles in shared memory

inline char* dynamic_shared() { return current->block->shared; }

inline char* at_shared(uint32_t address, size_t bytes) {
  if (address + bytes > shared_bytes) fail("shared memory address out of bounds");
  return current->block->shared + address;
}

// Other threads run until the barrier's round is no longer the one that it is in.
inline void wait_for_next_round(const Barrier& barrier) {
  current->waits_for = &barrier;
  current->waits_round = barrier.round;
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  wait_for_next_round(barrier);
}

inline void end_phase_if_complete(Phases& phases) {
  if (phases.arrived < phases.expected || phases.bytes != 0) return;
  phases.arrived = 0;
  ++phases.completed.round;
}

// Waits until the phase of that parity is complete.
inline void wait(const Phases& phases, int parity) {
  while (phases.completed.round % 2 == static_cast<uint64_t>(parity))
    wait_for_next_round(phases.completed);
}

// Goes on when nothing else can, or at once: what the hardware does meanwhile is not known.
inline void pause() {
  if (random_numbers() % 4) return;
  current->paused = true;
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

// Copies that nobody waits for yet come in any order, at any time.
inline void make_a_copy() {
  auto& copies = wave.copies;
  std::swap(copies[random_numbers() % copies.size()], copies.back());
  const auto copy = std::move(copies.back());
  copies.pop_back();
  copy();
  ++shared_version;
}

// Every lane shows `mine`, and sees what the others show.
template <typename T>
inline const T* exchange(const T& mine) {
  static_assert(sizeof(T) == sizeof(uint32_t[8]));
  Warp& warp = *current->warp;
  auto& slots = warp.exchange[warp.exchanges[current->lane]++ % 2];
  std::memcpy(slots[current->lane], &mine, sizeof(T));
  wait(warp.barrier);
  return reinterpret_cast<const T*>(slots);
}

struct Words {
  uint32_t word[8];
};

template <typename T>
inline T shuffle(T value, int from) {
  static_assert(sizeof(T) <= 8);
  Words mine{};
  std::memcpy(&mine, &value, sizeof(T));
  const Words* all = exchange(mine);
  std::memcpy(&value, &all[from], sizeof(T));
  return value;
}

inline void run_fiber() {
  (*body)();
  current->done = true;
  _longjmp(scheduler, 1);
}

inline void start(size_t thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;  // kept: launches are many and small
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStackBytes]);
  static ucontext_t returns, context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks[thread].get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  swapcontext(&returns, &context);  // comes back through `scheduler`
}

inline void run_wave(std::vector<Thread>& threads, std::vector<Warp>& warps) {
  const int count = static_cast<int>(threads.size());
  for (Block& block : wave.blocks) {
    std::memset(block.shared, 0xff, sizeof(block.shared));  // NaN in every format
    block.barrier = {static_cast<int>(block.threads)};
    block.alive = block.threads;
    for (Barrier& named : block.named) named = {};
  }
  ++shared_version;
  wave.clusters.assign(wave.blocks.size() / wave.cluster, {});
  for (size_t i = 0; i < wave.blocks.size(); ++i) {
    wave.blocks[i].cluster = &wave.clusters[i / wave.cluster];
    wave.blocks[i].cluster->expected += static_cast<int>(wave.blocks[i].threads);
  }
  wave.phases.clear();
  wave.alive = count;
  for (auto& warp : warps) warp = {.barrier = {32}};
  std::vector<char> started(count, 0);
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.block = &wave.blocks[i / wave.blocks[0].threads];
    thread.thread_idx = {static_cast<unsigned>(i) % thread.block->threads, 0, 0};
    thread.warp = &warps[i / 32];
    thread.lane = i % 32;
    thread.done = thread.paused = false;
    thread.waits_for = nullptr;
    thread.copies.assign(1, {});
    thread.products.assign(1, {});
    thread.stores = {};
    thread.stores_begun = thread.stores_committed = 0;
  }
  std::vector<int> ready, alive(count);
  std::iota(alive.begin(), alive.end(), 0);
  while (wave.alive > 0) {
    ready.clear();
    std::erase_if(alive, [&](int i) { return threads[i].done; });
    for (const int i : alive) {
      const Thread& t = threads[i];
      const bool blocked = t.waits_for && t.waits_for->round == t.waits_round;
      if (!t.paused && !blocked) ready.push_back(i);
    }
    if (!wave.copies.empty() && (ready.empty() || random_numbers() % 64 == 0)) {
      make_a_copy();
      continue;
    }
    if (ready.empty()) {
      for (const int i : alive)
        if (threads[i].paused) ready.push_back(i);
      if (ready.empty()) fail("deadlock: all threads wait");
      ready = {ready[random_numbers() % ready.size()]};
    }
    std::shuffle(ready.begin(), ready.end(), random_numbers);
    for (const int i : ready) {
      current = &threads[i];
      if (!_setjmp(scheduler)) {
        current->waits_for = nullptr;
        current->paused = false;
        if (started[i]) _longjmp(current->at, 1);
        started[i] = 1;
        start(static_cast<size_t>(i));
      }
      if (current->done) {
        --wave.alive;
        --current->block->alive;
      }
    }
  }
  if (!wave.copies.empty()) fail("a block ends before its copies have come");
}

template <typename Kernel, typename Parameters>
inline void launch_in_waves(Kernel kernel, dim3 grid, unsigned count, size_t bytes, unsigned size,
                            const Parameters& parameters, unsigned cluster = 1) {
  const unsigned blocks = grid.x * grid.y * grid.z;
  if (count % 32 || bytes > kSharedBytes || blocks % size || size % cluster) fail("bad launch");
  wave.cluster = cluster;
  std::vector<Thread> threads(count * size);
  std::vector<Warp> warps(count * size / 32);
  const std::function<void()> call = [&] { kernel(parameters); };
  body = &call;
  shared_bytes = bytes;
  wave.grid = {grid.x, grid.y, grid.z};
  while (wave.blocks.size() < size) wave.blocks.emplace_back();
  while (wave.blocks.size() > size) wave.blocks.pop_back();
  std::vector<unsigned> order(blocks / size);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_numbers);
  for (const unsigned first : order) {
    for (unsigned rank = 0; rank < size; ++rank) {
      const unsigned i = first * size + rank;
      wave.blocks[rank].threads = count;
      wave.blocks[rank].index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    }
    run_wave(threads, warps);
  }
}

template <typename Kernel, typename Parameters>
inline void launch(Kernel kernel, dim3 grid, unsigned count, size_t bytes, cudaStream_t,
                   const Parameters& parameters) {
  launch_in_waves(kernel, grid, count, bytes, 1, parameters);
}

}  // namespace emulator

#define threadIdx (emulator::current->thread_idx)
#define blockIdx (emulator::current->block->index)
#define gridDim (emulator::wave.grid)
#define blockDim (emulator::Index{emulator::current->block->threads, 1, 1})

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline void __syncthreads() { emulator::wait(emulator::current->block->barrier); }
inline void __syncwarp() { emulator::wait(emulator::current->warp->barrier); }
inline void __threadfence() {}
template <typename T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, emulator::current->lane ^ mask);
}
template <typename T>
inline T __shfl_sync(unsigned, T value, int from) {
  return emulator::shuffle(value, from % 32);
}
template <typename T>
inline T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = emulator::current->lane;
  return emulator::shuffle(value, lane >= delta ? lane - delta : lane);
}
inline bool __any_sync(unsigned, bool value) {
  const auto* all = emulator::exchange(emulator::Words{{value}});
  return std::any_of(all, all + 32, [](const auto& lane) { return lane.word[0] != 0; });
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const auto* all = emulator::exchange(emulator::Words{{value}});
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned{all[lane].word[0] != 0} << lane;
  return bits;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address += value;
  return old;
}
template <typename T>
inline T __ldcg(const T* address) {
  return *address;
}
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdiv_rn(float x, float y) { return x / y; }
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a > b ? a : b;
}
