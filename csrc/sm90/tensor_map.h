// How the tensor memory accelerator reads Q, K and V, and writes the output.
#pragma once
#include <cuda.h>

#include <algorithm>

#include "sm90.h"

namespace sparsek::sm90 {

constexpr int kChunkBytes = 128;  // of a swizzled row

// Keys of a box, which lies within a page: at most `most`, which is a multiple of them.
inline int box_keys(const AttentionParams& p, int most) {
  if (!p.block_table) return most;
  int keys = 16;  // which divides every page
  while (most % (2 * keys) == 0 && p.k.tokens % (2 * keys) == 0) keys *= 2;
  return keys;
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Out of the driver, which the library is not linked with.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<EncodeTiled>(found)
               : nullptr;
  }();
  return function;
}

// Of a tensor with dimensions of such sizes, innermost first, and such strides, in bytes, of all
// but the first. A copy brings a box. A dimension of size 1 can have a stride of 0.
template <typename T>
cudaError_t encode_map(CUtensorMap* map, const void* data, const int64_t (&sizes)[5],
                       const int64_t (&strides)[4], const int (&box)[5]) {
  const EncodeTiled encode = encode_tiled();
  if (!encode) return cudaErrorNotSupported;
  constexpr auto type =
      sizeof(T) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  // Rows shorter than the pattern would be padded to it.
  const auto swizzle =
      box[0] * sizeof(T) == kChunkBytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  cuuint64_t own_sizes[5], own_strides[4];
  cuuint32_t own_box[5], steps[5];
  for (int i = 0; i < 5; ++i) {
    own_sizes[i] = static_cast<cuuint64_t>(sizes[i]);
    own_box[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
  }
  // One that is never used has to be legal too.
  for (int i = 0; i < 4; ++i)
    own_strides[i] = static_cast<cuuint64_t>(strides[i] ? strides[i] : kChunkBytes);
  // No promotion: fetching 256 bytes for a row of 128 costs a tenth of the bandwidth.
  const CUresult result =
      encode(map, type, 5, const_cast<void*>(data), own_sizes, own_strides, own_box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Of K or V (or of both, where V lies behind K in each row of so many bytes) as [block, head,
// chunk, token, element of the chunk]. A copy brings so many tokens of one head, one chunk after
// the other.
template <typename KV>
cudaError_t make_row_map(CUtensorMap* map, const KVTensor& tensor, int kv_heads, int row_bytes,
                         int box_keys) {
  constexpr int64_t kBytes = sizeof(KV);
  const int chunk_bytes = std::min(row_bytes, kChunkBytes), chunks = row_bytes / chunk_bytes;
  const int elements = chunk_bytes / static_cast<int>(kBytes);
  return encode_map<KV>(map, tensor.data,
                        {elements, tensor.tokens, chunks, kv_heads, tensor.blocks},
                        {kBytes * tensor.stride_token, kChunkBytes, kBytes * tensor.stride_head,
                         kBytes * tensor.stride_block},
                        {elements, box_keys, chunks, 1, 1});
}

// Of K or V as [block, head, 1, token, element]. A copy brings so many elements, up to a chunk, of
// so many tokens of one head, with zeros behind the row's end.
template <typename KV>
cudaError_t make_chunk_map(CUtensorMap* map, const KVTensor& tensor, const AttentionParams& p,
                           int elements, int box_keys) {
  constexpr int64_t kBytes = sizeof(KV);
  return encode_map<KV>(map, tensor.data, {p.head_dim, tensor.tokens, 1, p.kv_heads, tensor.blocks},
                        {kBytes * tensor.stride_token, kChunkBytes, kBytes * tensor.stride_head,
                         kBytes * tensor.stride_block},
                        {elements, box_keys, 1, 1, 1});
}

// Queries, or what attention gives for them.
struct RowTensor {
  const void* data;
  int64_t stride_token, stride_head;
};

// Whether boxes can have so many rows of a KV head: they hold whole tokens, and all of each chunk.
inline bool has_rows_map(const RowTensor& tensor, const AttentionParams& p, int head_dim,
                         int rows) {
  return p.head_dim == head_dim && rows % p.group == 0 &&
         fits_tensor_map(p.total_q, tensor.stride_token) &&
         fits_tensor_map(p.group, tensor.stride_head) &&
         fits_tensor_map(p.kv_heads, p.group * tensor.stride_head);
}

// As [KV head, chunk, token, head of the group, element of the chunk]. A copy brings so many rows
// of so many chunks, one chunk after the other.
template <typename T>
cudaError_t make_rows_map(CUtensorMap* map, const RowTensor& tensor, const AttentionParams& p,
                          int rows, int chunks) {
  constexpr int64_t kBytes = sizeof(T);
  constexpr int kElements = kChunkBytes / kBytes;
  return encode_map<T>(map, tensor.data,
                       {kElements, p.group, p.total_q, p.head_dim / kElements, p.kv_heads},
                       {kBytes * tensor.stride_head, kBytes * tensor.stride_token, kChunkBytes,
                        kBytes * p.group * tensor.stride_head},
                       {kElements, p.group, rows / p.group, chunks, 1});
}

}  // namespace sparsek::sm90
