// Thin wrappers of PTX for copies by the tensor memory accelerator, mbarriers, and kernels that
// overlap.
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
// Makes initialised barriers visible to asynchronous copies, and to other blocks of the cluster.
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
// The same where other thread blocks of the cluster have written.
__device__ inline void mbarrier_wait_cluster(uint64_t* barrier, int parity) {
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
// The threads of a cluster's blocks meet, in two steps; those that have ended are not waited for.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}
// Writes where block `rank` of the cluster has `to`, in shared memory, at some time; the bytes
// count towards the phase of its `barrier`.
__device__ inline void store_async(int rank, float4* to, float4 x, uint64_t* barrier) {
  asm volatile(
      "{\n"
      ".reg .u32 to, barrier;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, "
      "[barrier];\n"
      "}\n" ::"r"(shared_address(to)),
      "r"(shared_address(barrier)), "r"(rank), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
      : "memory");
}
__device__ inline void store_async(int rank, float2* to, float2 x, uint64_t* barrier) {
  asm volatile(
      "{\n"
      ".reg .u32 to, barrier;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%3, %4}, "
      "[barrier];\n"
      "}\n" ::"r"(shared_address(to)),
      "r"(shared_address(barrier)), "r"(rank), "f"(x.x), "f"(x.y)
      : "memory");
}
// A kernel that was launched to overlap with the one before it: returns once that one has ended
// and its writes are seen.
__device__ inline void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
}
// What other blocks have written, and seen to be written, is seen, by asynchronous copies too.
__device__ inline void acquire_writes() {
  asm volatile("fence.acq_rel.gpu;\nfence.proxy.async;\n" ::: "memory");
}
// Lets such a kernel behind this one begin.
__device__ inline void allow_next_kernel() {
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}

template <typename Parameters>
struct Launch {
  void (*kernel)(Parameters);
  int blocks, threads, shared_bytes;
  int cluster = 1;  // blocks of one
};

// Launches a kernel, to overlap with the end of the one before it.
template <typename Parameters>
cudaError_t launch_overlapping(const Launch<Parameters>& launch, const Parameters& parameters,
                               cudaStream_t stream, bool overlapping = true) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = launch.blocks;
  config.blockDim = launch.threads;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (overlapping) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (launch.cluster > 1) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  }
  return cudaLaunchKernelEx(&config, launch.kernel, parameters);
}

// Clusters of so many blocks that run at the same time on this device; 0 if it has none.
template <typename Parameters>
int most_clusters(const Launch<Parameters>& launch) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = launch.cluster;
  config.blockDim = launch.threads;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, launch.kernel, &config) == cudaSuccess)
    return clusters;
  cudaGetLastError();  // or whoever asks next would have it
  return 0;
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
// Copies the other way, at some time: see the waits below.
__device__ inline void tensor_store(const CUtensorMap* map, const void* source, int c0, int c1,
                                    int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], "
      "[%1];\n" ::"l"(map),
      "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
// Of the thread's tensor_store()s since the last one.
__device__ inline void tensor_store_commit() {
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
// Returns once all sources of these have been read.
__device__ inline void tensor_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
}
// And once all boxes have been written.
__device__ inline void tensor_store_wait() {
  asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
}
__device__ inline void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

}  // namespace sparsek
