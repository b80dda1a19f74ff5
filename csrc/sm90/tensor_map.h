// How the tensor memory accelerator reads K and V.
#pragma once
#include <cuda.h>

#include "sm90.h"

namespace sparsek::sm90 {

constexpr int kChunkBytes = 128;  // of a swizzled row

// Keys of a box, which lies within a page: at most `most`, a power of two.
inline int box_keys(const AttentionParams& p, int most) {
  if (!p.block_table) return most;
  int keys = 16;  // which divides every page
  while (keys < most && p.k.tokens % (2 * keys) == 0) keys *= 2;
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

// Of K or V (or of both, where V lies behind K in each row of so many bytes) as [block, head,
// chunk, token, element of the chunk]. A copy brings a box of so many tokens of one head, so many
// bytes of them: one chunk after the other, or shorter rows.
template <typename KV>
cudaError_t make_tensor_map(CUtensorMap* map, const KVTensor& tensor, int kv_heads, int row_bytes,
                            int box_keys, int box_bytes) {
  const EncodeTiled encode = encode_tiled();
  if (!encode) return cudaErrorNotSupported;
  constexpr auto type =
      sizeof(KV) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  const int chunk_bytes = row_bytes < kChunkBytes ? row_bytes : kChunkBytes;
  const cuuint32_t elements = chunk_bytes / sizeof(KV);
  // Rows shorter than the pattern would be padded to it.
  const auto swizzle =
      chunk_bytes == kChunkBytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  // Where there is one of a kind its stride is never used, but has to be a legal one.
  const auto bytes = [](int64_t stride) {
    return static_cast<cuuint64_t>(stride ? sizeof(KV) * stride : kChunkBytes);
  };
  const cuuint64_t sizes[5] = {elements, static_cast<cuuint64_t>(tensor.tokens),
                               static_cast<cuuint64_t>(row_bytes / chunk_bytes),
                               static_cast<cuuint64_t>(kv_heads),
                               static_cast<cuuint64_t>(tensor.blocks)};
  const cuuint64_t strides[4] = {bytes(tensor.stride_token), kChunkBytes, bytes(tensor.stride_head),
                                 bytes(tensor.stride_block)};
  const cuuint32_t box[5] = {elements, static_cast<cuuint32_t>(box_keys),
                             static_cast<cuuint32_t>(box_bytes / chunk_bytes), 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  // No promotion: fetching 256 bytes for a row of 128 costs a tenth of the bandwidth.
  const CUresult result =
      encode(map, type, 5, const_cast<void*>(tensor.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace sparsek::sm90
