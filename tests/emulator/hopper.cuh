// csrc/common/hopper.cuh for the host.
#pragma once
#include <cuda.h>

#include "ptx.cuh"

namespace emulator {

// What the host's cuTensorMapEncodeTiled puts into a CUtensorMap.
struct TensorMap {
  char* data;
  uint64_t strides[4];
  uint32_t sizes[5], element_bytes, row_bytes;  // the last of a box
  uint16_t box[5];

  int64_t box_rows() const { return int64_t{box[1]} * box[2] * box[3] * box[4]; }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

}  // namespace emulator

namespace sparsek {

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulator::wave.phases[barrier] = {.expected = arrivals};
}
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  auto& phases = emulator::wave.phases.at(barrier);
  phases.bytes += bytes;
  if (++phases.arrived > phases.expected) emulator::fail("too many arrivals at an mbarrier");
  emulator::end_phase_if_complete(phases);
}
inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive_expect(barrier, 0); }
inline void mbarrier_wait(uint64_t* barrier, int parity) {
  emulator::wait(emulator::wave.phases.at(barrier), parity);
}

inline void mbarrier_wait_cluster(uint64_t* barrier, int parity) { mbarrier_wait(barrier, parity); }

inline void cluster_arrive() {
  emulator::Barrier& barrier = *emulator::current->block->cluster;
  if (++barrier.arrived == barrier.expected) ++barrier.round;
}
inline void cluster_wait() {
  emulator::Barrier& barrier = *emulator::current->block->cluster;
  if (barrier.round == 0) emulator::wait_for_next_round(barrier);  // (once a launch)
}
template <typename T>
inline void store_async(int rank, T* to, T x, uint64_t* barrier) {
  const unsigned own = emulator::current->block->index.x, size = emulator::wave.cluster;
  if (rank < 0 || rank >= static_cast<int>(size)) emulator::fail("no such block in a cluster");
  auto& block = emulator::wave.blocks[own / size * size + rank];
  if (block.cluster->round == 0) emulator::fail("a block of the cluster may not have begun");
  char* target = block.shared + shared_address(to);
  auto& phases = emulator::wave.phases.at(block.shared + shared_address(barrier));
  emulator::wave.copies.push_back([=, &phases, &block] {
    if (block.alive == 0) emulator::fail("a block of the cluster has ended");
    std::memcpy(target, &x, sizeof(x));
    phases.bytes -= sizeof(x);
    emulator::end_phase_if_complete(phases);
  });
}

// Calls f with each 16 bytes of a box: where they lie behind the box's place in shared memory, and
// in the tensor, or null outside of that. Rows of 128 or 64 bytes lie one behind the other; the
// swizzle is of the address.
template <typename F>
void for_pieces(const emulator::TensorMap& tensor, const int64_t (&at)[5], const F& f) {
  const int64_t row_begin = at[0] * tensor.element_bytes;
  const int64_t row_end = int64_t{tensor.sizes[0]} * tensor.element_bytes;
  for (int64_t row = 0; row < tensor.box_rows(); ++row) {
    bool inside = true;
    char* start = tensor.data;
    int64_t rest = row;
    for (int i = 1; i < 5; ++i) {
      const int64_t index = at[i] + rest % tensor.box[i];
      rest /= tensor.box[i];
      inside &= index >= 0 && index < tensor.sizes[i];
      start += index * static_cast<int64_t>(tensor.strides[i - 1]);
    }
    for (uint32_t piece = 0; piece < tensor.row_bytes / 16; ++piece) {
      const int64_t offset = row * tensor.row_bytes + 16 * piece;
      const int64_t from = row_begin + 16 * piece;
      f(offset ^ (offset >> 3 & (tensor.row_bytes == 64 ? 0x30 : 0x70)),
        inside && from >= 0 && from < row_end ? start + from : nullptr);
    }
  }
}

// The place of a box in shared memory, and how many bytes it has.
inline char* box_place(const emulator::TensorMap& tensor, const void* place, int64_t& bytes) {
  bytes = tensor.row_bytes * tensor.box_rows();
  const uint32_t base = shared_address(place);
  if (base % 1024) emulator::fail("a swizzled box is not aligned to 1024 bytes");
  return emulator::at_shared(base, static_cast<size_t>(bytes));
}

inline void tensor_copy(void* destination, const CUtensorMap* map, uint64_t* barrier, int c0,
                        int c1, int c2, int c3, int c4) {
  emulator::TensorMap tensor;
  std::memcpy(&tensor, map, sizeof(tensor));
  auto& phases = emulator::wave.phases.at(barrier);
  int64_t bytes;
  char* to = box_place(tensor, destination, bytes);
  emulator::wave.copies.push_back([=, &phases] {
    for_pieces(tensor, {c0, c1, c2, c3, c4}, [&](int64_t offset, const char* from) {
      from ? std::memcpy(to + offset, from, 16) : std::memset(to + offset, 0, 16);
    });
    phases.bytes -= bytes;
    emulator::end_phase_if_complete(phases);
  });
}

inline void tensor_store(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3,
                         int c4) {
  emulator::TensorMap tensor;
  std::memcpy(&tensor, map, sizeof(tensor));
  int64_t bytes;
  const char* from = box_place(tensor, source, bytes);
  emulator::Thread& thread = *emulator::current;
  ++thread.stores_begun;
  emulator::wave.copies.push_back([=, &thread] {
    for_pieces(tensor, {c0, c1, c2, c3, c4}, [&](int64_t offset, char* to) {
      if (to) std::memcpy(to, from + offset, 16);
    });
    ++thread.stores.round;
  });
}
inline void tensor_store_commit() {
  emulator::current->stores_committed = emulator::current->stores_begun;
}
inline void tensor_store_wait() {
  emulator::Thread& thread = *emulator::current;
  while (thread.stores.round < thread.stores_committed)
    emulator::wait_for_next_round(thread.stores);
}
inline void tensor_store_wait_read() { tensor_store_wait(); }
inline void prefetch_tensor_map(const CUtensorMap*) {}

inline void wait_for_previous_kernel() {}
inline void acquire_writes() {}
inline void allow_next_kernel() {}

template <typename Parameters>
struct Launch {
  void (*kernel)(Parameters);
  int blocks, threads, shared_bytes;
  int cluster = 1;
};
template <typename Parameters>
int most_clusters(const Launch<Parameters>& launch) {
  return EMULATED_MULTIPROCESSORS / launch.cluster;
}
// One block a multiprocessor: all run at the same time.
template <typename Parameters>
cudaError_t launch_overlapping(const Launch<Parameters>& launch, const Parameters& parameters,
                               cudaStream_t) {
  emulator::launch_in_waves(launch.kernel, dim3(launch.blocks), launch.threads, launch.shared_bytes,
                            launch.blocks, parameters, launch.cluster);
  return cudaSuccess;
}

}  // namespace sparsek
