// Kernels that run on every supported GPU. Attention is compiled for one dtype of queries
// and output, one of keys and values and one head_dim at a time.
#pragma once
#include <cuda_runtime.h>

#include "../params.h"

namespace sparsek::portable {

// Requests that are not Request::is_decode().
template <typename T, typename KV, int kHeadDim>
cudaError_t prefill(const AttentionParams& params, cudaStream_t stream);

// Requests that are.
template <typename T, typename KV, int kHeadDim>
cudaError_t decode(const AttentionParams& params, cudaStream_t stream);

constexpr int kDecodeBlocksPerMultiprocessor = 2;
constexpr int kDecodeRows = 16;  // that a unit of decode's work has

// Copies rows of 16-bit elements to their slots, or converts them to fp8.
cudaError_t write_kv(const WriteParams& params, cudaStream_t stream);

template <typename T>
cudaError_t merge_states(const MergeParams& params, cudaStream_t stream);

}  // namespace sparsek::portable
