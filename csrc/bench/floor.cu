// What a decode step costs at least: an empty node of a CUDA graph, a read of so many bytes into
// shared memory by bulk copies, and the exchange of parts between thread blocks. A program of its
// own; `sparsek bench floor` compiles it and reads what it prints.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../common/hopper.cuh"

namespace sparsek {
namespace {

constexpr int kThreads = 288, kStages = 8, kChunkBytes = 16 * 1024, kPartFloats = 512;
constexpr int kMostGroup = 16;
constexpr size_t kPoolBytes = size_t{4} << 30;  // rotated over, so that L2 is cold

enum class Exchange : int { kNone, kCounted, kAwaited };

struct Parameters {
  const char* source;
  int chunks, chunk_bytes;  // shared out evenly over the blocks
  Exchange exchange;
  int group;  // consecutive blocks, at most kMostGroup, that exchange a part of kPartFloats each
  float *parts, *out;
  int* arrivals;
};

__device__ inline void bulk_copy(void* destination, const void* source, int bytes,
                                 uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(shared_address(destination)),
      "l"(source), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Of what other thread blocks read and write meanwhile.
__device__ inline void store_relaxed(float* to, float x) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;\n" ::"l"(to), "f"(x) : "memory");
}
__device__ inline float load_relaxed(const float* from) {
  float x;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];\n" : "=f"(x) : "l"(from) : "memory");
  return x;
}

__global__ void empty_kernel(const __grid_constant__ Parameters) {}

__global__ void __launch_bounds__(kThreads, 1) read_kernel(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(128) char ring[];
  __shared__ uint64_t full[kStages], empty[kStages];
  __shared__ bool last;
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], kThreads / 32 - 1);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int begin = static_cast<int>(int64_t{p.chunks} * block / blocks);
  const int end = static_cast<int>(int64_t{p.chunks} * (block + 1) / blocks);
  float sum = 0;
  int stage = 0, phase = 0;
  for (int chunk = begin; chunk < end; ++chunk) {
    char* here = ring + stage * p.chunk_bytes;
    if (thread == 0) {
      mbarrier_wait(&empty[stage], phase ^ 1);
      mbarrier_arrive_expect(&full[stage], p.chunk_bytes);
      bulk_copy(here, p.source + int64_t{chunk} * p.chunk_bytes, p.chunk_bytes, &full[stage]);
    } else if (thread >= 32) {
      mbarrier_wait(&full[stage], phase);
      sum += *reinterpret_cast<const float*>(here + 4 * thread);
      __syncwarp();
      if (thread % 32 == 0) mbarrier_arrive(&empty[stage]);
    }
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  if (p.exchange == Exchange::kNone) {
    if (sum == 1.2345f) p.out[0] = sum;  // the reads are not to be left out
    return;
  }
  const int group = block / p.group, first = group * p.group;
  const bool awaited = p.exchange == Exchange::kAwaited;
  for (int i = thread; i < kPartFloats; i += kThreads)
    store_relaxed(p.parts + block * kPartFloats + i, sum + i + 1);
  if (awaited) {
    if (block != first + p.group - 1) return;
  } else {
    __syncthreads();
    if (thread == 0) {
      last = add_acquire_release(p.arrivals + group, 1) == p.group - 1;
      if (last) p.arrivals[group] = 0;
    }
    __syncthreads();
    if (!last) return;
  }
  for (int i = thread; i < kPartFloats; i += kThreads) {
    float own[kMostGroup], total = 0;
#pragma unroll
    for (int rank = 0; rank < kMostGroup; ++rank)
      if (rank < p.group) own[rank] = load_relaxed(p.parts + (first + rank) * kPartFloats + i);
#pragma unroll
    for (int rank = 0; rank < kMostGroup; ++rank) {
      if (rank >= p.group) continue;
      float* part = p.parts + (first + rank) * kPartFloats + i;
      if (awaited) {  // zero: not there yet
        while (own[rank] == 0) own[rank] = load_relaxed(part);
        store_relaxed(part, 0.0f);
      }
      total += own[rank];
    }
    p.out[group * kPartFloats + i] = total;
  }
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA error: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Median microseconds of a node in a graph of `nodes` of them, alone or overlapping.
double measure(const Launch<Parameters>& launch, Parameters parameters, size_t bytes, int nodes,
               bool overlapping) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  const char* pool = parameters.source;
  const size_t places = bytes ? kPoolBytes / bytes : 1;
  const auto node = [&](int i) {
    parameters.source = pool + i % places * bytes;
    check(launch_overlapping(launch, parameters, stream, overlapping));
  };
  for (int i = 0; i < 3; ++i) node(i);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < nodes; ++i) node(i);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&stop));
  std::vector<double> times;
  for (int round = 0; round < 17; ++round) {
    check(cudaEventRecord(start, stream));
    check(cudaGraphLaunch(executable, stream));
    check(cudaEventRecord(stop, stream));
    check(cudaEventSynchronize(stop));
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, start, stop));
    if (round >= 2) times.push_back(1e3 * milliseconds / nodes);
  }
  check(cudaGraphExecDestroy(executable));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void report(const char* name, const Launch<Parameters>& launch, const Parameters& parameters,
            size_t bytes) {
  const int nodes = bytes ? static_cast<int>(std::clamp<size_t>(kPoolBytes / bytes, 4, 100)) : 100;
  std::printf("%s\t%zu\t%.3f\t%.3f\n", name, bytes,
              measure(launch, parameters, bytes, nodes, false),
              measure(launch, parameters, bytes, nodes, true));
}

int run() {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  constexpr int kRingBytes = kStages * kChunkBytes;
  check(cudaFuncSetAttribute(read_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes));
  char* pool;
  check(cudaMalloc(&pool, kPoolBytes));
  // Not zeros: constant data can be moved at less power.
  std::vector<uint32_t> random(1 << 20);
  uint32_t state = 1;
  for (uint32_t& word : random) word = 0x3f000000 | (state = state * 1664525u + 1013904223u) >> 9;
  for (size_t at = 0; at < kPoolBytes; at += 4 * random.size())
    check(cudaMemcpy(pool + at, random.data(), 4 * random.size(), cudaMemcpyHostToDevice));
  Parameters p{pool, 0, kChunkBytes, Exchange::kNone, 1};
  check(cudaMalloc(&p.parts, 256 * kPartFloats * sizeof(float)));
  check(cudaMalloc(&p.out, 256 * kPartFloats * sizeof(float)));
  check(cudaMalloc(&p.arrivals, 256 * sizeof(int)));
  check(cudaMemset(p.arrivals, 0, 256 * sizeof(int)));

  report("empty", {empty_kernel, multiprocessors, kThreads, 0}, p, 0);
  const Launch<Parameters> all{read_kernel, multiprocessors, kThreads, kRingBytes};
  report("empty, 128 KB of shared memory", all, p, 0);
  for (const int kilobytes : {1024, 4096, 16384, 65536, 262144, 1048576}) {
    p.chunks = kilobytes * 1024 / kChunkBytes;
    report("read", all, p, size_t{1024} * static_cast<size_t>(kilobytes));
  }
  const size_t bytes = 4 << 20;
  p.chunk_bytes = kChunkBytes / 2;
  p.chunks = static_cast<int>(bytes) / p.chunk_bytes;
  p.group = 16;
  const Launch<Parameters> even{read_kernel, 128, kThreads, kRingBytes};
  report("128 blocks read", even, p, bytes);
  p.exchange = Exchange::kCounted;
  report("128 blocks read, 16 exchange parts, the last to arrive adds up", even, p, bytes);
  p.exchange = Exchange::kAwaited;
  check(cudaMemset(p.parts, 0, 256 * kPartFloats * sizeof(float)));
  report("128 blocks read, 16 exchange parts, one awaits them", even, p, bytes);
  check(cudaDeviceSynchronize());
  return 0;
}

}  // namespace
}  // namespace sparsek

int main() { return sparsek::run(); }
