// Attention over two disjoint sets of keys, merged: https://arxiv.org/abs/1805.02867.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "portable.h"

namespace sparsek::portable {
namespace {

// A warp takes one head of one token.
template <typename T>
__global__ void merge_states_kernel(const __grid_constant__ MergeParams p) {
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  const int64_t token = row / p.heads, head = row - token * p.heads;
  if (token >= p.tokens) return;
  const float lse_a = p.lse_a[head * p.lse_a_stride[0] + token * p.lse_a_stride[1]];
  const float lse_b = p.lse_b[head * p.lse_b_stride[0] + token * p.lse_b_stride[1]];
  const float top = fmaxf(lse_a, lse_b);
  const float a = lse_a == -INFINITY ? 0.0f : expf(lse_a - top);
  const float b = lse_b == -INFINITY ? 0.0f : expf(lse_b - top);
  const float sum = a + b;
  for (int i = lane; i < p.head_dim; i += 32) {
    const auto load = [&](const void* data, const int64_t (&stride)[3]) {
      return static_cast<float>(
          static_cast<const T*>(data)[token * stride[0] + head * stride[1] + i * stride[2]]);
    };
    // Empty parts are left out by selection: 0 * NaN is NaN.
    float value = 0;
    if (lse_a != -INFINITY) value += a / sum * load(p.out_a, p.a_stride);
    if (lse_b != -INFINITY) value += b / sum * load(p.out_b, p.b_stride);
    static_cast<T*>(p.out)[token * p.out_stride[0] + head * p.out_stride[1] + i * p.out_stride[2]] =
        static_cast<T>(value);
  }
  if (lane == 0) {
    p.lse[head * p.lse_stride[0] + token * p.lse_stride[1]] =
        sum == 0 ? -INFINITY : top + logf(sum);
  }
}

}  // namespace

template <typename T>
cudaError_t merge_states(const MergeParams& p, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t blocks = (int64_t{p.tokens} * p.heads * 32 + kThreads - 1) / kThreads;
  merge_states_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template cudaError_t merge_states<float>(const MergeParams&, cudaStream_t);
template cudaError_t merge_states<__half>(const MergeParams&, cudaStream_t);
template cudaError_t merge_states<__nv_bfloat16>(const MergeParams&, cudaStream_t);

}  // namespace sparsek::portable
