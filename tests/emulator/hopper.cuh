// csrc/common/hopper.cuh for the host.
#pragma once
#include <cuda.h>

#include "ptx.cuh"

namespace emulator {

// What the host's cuTensorMapEncodeTiled puts into a CUtensorMap.
struct TensorMap {
  const char* data;
  uint64_t strides[4];
  uint32_t sizes[5], element_bytes, row_bytes;  // the last of a box
  uint16_t box[5];
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
  if (barrier.round > 0) return;  // (once a launch)
  emulator::current->waits_for = &barrier;
  emulator::current->waits_round = 0;
  if (!_setjmp(emulator::current->at)) _longjmp(emulator::scheduler, 1);
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

// Rows of 128 or 64 bytes, one behind the other; the swizzle is of the address.
inline void tensor_copy(void* destination, const CUtensorMap* map, uint64_t* barrier, int c0,
                        int c1, int c2, int c3, int c4) {
  emulator::TensorMap tensor;
  std::memcpy(&tensor, map, sizeof(tensor));
  auto& phases = emulator::wave.phases.at(barrier);
  const uint32_t base = shared_address(destination);
  char* to = emulator::at_shared(base, size_t{tensor.row_bytes} * tensor.box[1] * tensor.box[2]);
  emulator::wave.copies.push_back([=, &phases] {
    const int64_t at[5] = {c0, c1, c2, c3, c4};
    if (base % 1024) emulator::fail("a swizzled box is not aligned to 1024 bytes");
    const int64_t row_begin = int64_t{c0} * tensor.element_bytes;
    const int64_t row_end = int64_t{tensor.sizes[0]} * tensor.element_bytes;
    int64_t rows = 1;
    for (int i = 1; i < 5; ++i) rows *= tensor.box[i];
    for (int64_t row = 0; row < rows; ++row) {
      bool inside = true;
      const char* source = tensor.data;
      int64_t rest = row;
      for (int i = 1; i < 5; ++i) {
        const int64_t index = at[i] + rest % tensor.box[i];
        rest /= tensor.box[i];
        inside &= index >= 0 && index < tensor.sizes[i];
        source += index * static_cast<int64_t>(tensor.strides[i - 1]);
      }
      for (uint32_t piece = 0; piece < tensor.row_bytes / 16; ++piece) {
        const int64_t offset = row * tensor.row_bytes + 16 * piece;
        char* own = to + (offset ^ (offset >> 3 & (tensor.row_bytes == 64 ? 0x30 : 0x70)));
        const int64_t from = row_begin + 16 * piece;
        if (inside && from >= 0 && from < row_end) {
          std::memcpy(own, source + from, 16);
        } else {
          std::memset(own, 0, 16);
        }
      }
    }
    phases.bytes -= rows * tensor.row_bytes;
    emulator::end_phase_if_complete(phases);
  });
}
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
