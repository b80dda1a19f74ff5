// Products with keys and values that ldmatrix has loaded, 32 bytes of each row: 16 dimensions of 16
// bits, or 32 of fp8 (the last time perhaps 16), which become fp16 here. A register of fp8 holds
// four neighbours where one of 16 bits holds two, so that dimensions of queries and of the output
// go by another order.
#pragma once
#include "../common/request.cuh"

namespace sparsek::portable {

// A row of keys or values, and its copy to shared memory by lanes: `lanes` a row, a power of two,
// which take so many turns at its pieces of 16 bytes.
template <typename KV, int kHeadDim>
struct Row {
  static constexpr int kBytes = sizeof(KV) * kHeadDim, kPitch = row_pitch(kBytes);
  static constexpr int kPieces = kBytes / 16, kLanes = kPitch < 512 ? kPitch / 16 : 32;
  static constexpr int kTurns = kPitch / 16 / kLanes;
  static constexpr int kElements = 16 / sizeof(KV);  // of a piece
  static constexpr int kLoads = (kBytes + 31) / 32;  // by ldmatrix
  __host__ __device__ static constexpr bool whole(int load) { return 32 * load + 32 <= kBytes; }
};

// Warps that have the same rows, each of so many of the output's columns: above head_dim 256 one
// has no registers for all. They compute the same scores.
constexpr int column_parts(int head_dim) { return head_dim > 256 ? 2 : 1; }

// A lane has of each row of queries, a step of 16 dimensions: elements 2 * (lane % 4) and the next,
// and those 8 further on; beside fp8 keys 4 * (lane % 4) and the next three.
template <typename M, typename KV>
__device__ inline void multiply_keys(float (&scores)[4], const uint32_t (*q)[4], uint32_t first,
                                     uint32_t second, bool whole) {
  if constexpr (sizeof(KV) == 1) {
    uint32_t low, high;
    widen_fp8(first, low, high);
    mma<M>(scores, q[0], low, high);
    if (!whole) return;
    widen_fp8(second, low, high);
    mma<M>(scores, q[1], low, high);
  } else {
    mma<M>(scores, q[0], first, second);
  }
}

// 16 keys' values, two registers for 16 bytes of them.
template <typename M, typename KV>
__device__ inline void multiply_values(float (*out)[4], const uint32_t (&weights)[4],
                                       const uint32_t (&v)[4], bool whole) {
  if constexpr (sizeof(KV) == 1) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == 1 && !whole) return;
      uint32_t even[2], odd[2];
      widen_fp8(swap_inner_bytes(v[2 * i]), even[0], odd[0]);
      widen_fp8(swap_inner_bytes(v[2 * i + 1]), even[1], odd[1]);
      mma<M>(out[2 * i], weights, even[0], even[1]);
      mma<M>(out[2 * i + 1], weights, odd[0], odd[1]);
    }
  } else {
    mma<M>(out[0], weights, v[0], v[1]);
    mma<M>(out[1], weights, v[2], v[3]);
  }
}

// The n-th two neighbours that a lane has of a row of the output.
template <typename KV>
struct OutputPair {
  float first, second;
  int n;

  __device__ OutputPair(const float (*out)[4], int n, int half) : n(n) {
    if (sizeof(KV) == 1) {
      first = out[n & ~1][2 * half + n % 2];
      second = out[n | 1][2 * half + n % 2];
    } else {
      first = out[n][2 * half];
      second = out[n][2 * half + 1];
    }
  }
  __device__ int column(int lane) const {
    return sizeof(KV) == 1 ? n / 2 * 16 + 4 * (lane % 4) + n % 2 * 2 : 8 * n + 2 * (lane % 4);
  }
};

}  // namespace sparsek::portable
