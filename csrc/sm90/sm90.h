// Kernels for Hopper (compiled as sm_90a), for one dtype of queries and output, one of keys and
// values and one head_dim at a time, of which prefill's serves shorter heads too; prefill with
// softcap apart.
#pragma once
#include <cuda_runtime.h>

#include "../params.h"

namespace sparsek::sm90 {

constexpr int kSharedBytes = 227 * 1024;  // that a thread block can have
constexpr int kMostHeadDim = 256;
// With softcap over fp8 nobody has asked for it.
constexpr bool has_prefill(int head_dim, bool fp8, bool softcap = false) {
  return head_dim <= kMostHeadDim && !(fp8 && softcap);
}
// Decode is bound by copies: for heads that are shorter than those that it is compiled for, the
// portable kernel is quicker.
constexpr bool has_decode(int head_dim) {
  return head_dim == 64 || head_dim == 128 || head_dim == 256;
}
// Rows that a unit of decode's work has at most. Softcap takes the registers of more.
constexpr int most_decode_rows(int head_dim, bool softcap = false) {
  return softcap ? 8 : head_dim > 128 ? 16 : 32;
}

// Whether the tensor memory accelerator can read a dimension: strides are below 2^40 bytes, and not
// 0 where there is more than one of a kind.
inline bool fits_tensor_map(int64_t size, int64_t stride) {
  return size == 1 || (size > 1 && stride > 0 && stride < int64_t{1} << 39);
}
// Keys or values.
inline bool has_tensor_map(const KVTensor& tensor, int kv_heads) {
  return fits_tensor_map(tensor.tokens, tensor.stride_token) &&
         fits_tensor_map(kv_heads, tensor.stride_head) &&
         fits_tensor_map(tensor.blocks, tensor.stride_block);
}

// Requests that are not Request::is_decode(), where both k and v have a tensor map; without bias,
// ALiBi and spans, with softcap or without. Only where has_prefill().
template <typename T, typename KV, int kHeadDim, bool kSoftcap>
cudaError_t prefill(const AttentionParams& params, cudaStream_t stream);

// Requests that are, where both k and v have a tensor map. Only where has_decode().
template <typename T, typename KV, int kHeadDim>
cudaError_t decode(const AttentionParams& params, cudaStream_t stream);

}  // namespace sparsek::sm90
