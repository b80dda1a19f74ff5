// Thin wrappers of the PTX that only Hopper's own kernels use.
#pragma once
#include <cuda.h>

#include "ptx.cuh"

namespace sparsek {

// An mbarrier counts arrivals and bytes of a phase; phases alternate in parity, from 0 on.
__device__ inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes initialised barriers visible to asynchronous copies.
__device__ inline void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ inline void mbarrier_arrive_times(uint64_t* barrier, int count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)),
               "r"(count)
               : "memory");
}
// Returns once the phase of that parity is complete, and what was written before its arrivals is
// seen.
__device__ inline void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// The same for arrivals from other blocks of the cluster. It empties the L1 cache.
__device__ inline void mbarrier_wait_for_cluster(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Thread blocks of a cluster run at the same time and read each other's shared memory.
__device__ inline int cluster_size() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size));
  return size;
}
// All threads of the cluster that have not ended arrive, then wait. The second form tells nothing
// of what was written before, save by a fence of its own, and costs less.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
}
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}
// Where what lies at `pointer` here lies in the block of that rank.
__device__ inline uint32_t remote_address(const void* pointer, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n"
      : "=r"(address)
      : "r"(shared_address(pointer)), "r"(rank));
  return address;
}
__device__ inline float load_remote(uint32_t address) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(x) : "r"(address) : "memory");
  return x;
}
__device__ inline float4 load_remote_4(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ inline void mbarrier_arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];\n" ::"r"(barrier)
               : "memory");
}

__device__ inline void mbarrier_arrive_remote_relaxed(uint32_t barrier) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];\n" ::"r"(barrier)
               : "memory");
}

// A kernel that was launched to overlap with the one before it: returns once that one has ended
// and its writes are seen.
__device__ inline void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
}
// Lets such a kernel behind this one begin.
__device__ inline void allow_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}

template <typename Parameters>
struct Launch {
  void (*kernel)(Parameters);
  int blocks, threads, shared_bytes, cluster;
};

template <typename Parameters>
cudaLaunchConfig_t launch_config(const Launch<Parameters>& launch, cudaStream_t stream,
                                 cudaLaunchAttribute (&attributes)[2]) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = launch.blocks;
  config.blockDim = launch.threads;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return config;
}

// Launches a kernel in clusters, to overlap with the end of the one before it.
template <typename Parameters>
cudaError_t launch_overlapping(const Launch<Parameters>& launch, const Parameters& parameters,
                               cudaStream_t stream) {
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = launch_config(launch, stream, attributes);
  return cudaLaunchKernelEx(&config, launch.kernel, parameters);
}

// How many of its clusters run at the same time.
template <typename Parameters>
cudaError_t active_clusters(const Launch<Parameters>& launch, int* clusters) {
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = launch_config(launch, nullptr, attributes);
  return cudaOccupancyMaxActiveClusters(clusters, launch.kernel, &config);
}

// Copies the box at these coordinates (innermost first) to shared memory; its bytes count towards
// the barrier's phase. Elements outside the tensor arrive as zeros.
__device__ inline void tensor_copy(void* destination, const CUtensorMap* map, uint64_t* barrier,
                                   int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];\n" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
__device__ inline void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

}  // namespace sparsek
