// Writing new keys and values to their slots of the paged cache.
#include "../common/hopper.cuh"
#include "portable.h"

namespace sparsek::portable {
namespace {

// One thread block a token. Vector is 16 bytes, or one 16-bit element.
template <typename Vector>
__global__ void write_kv_kernel(const __grid_constant__ WriteParams p) {
  constexpr int kElements = sizeof(Vector) / 2;
  allow_next_kernel();  // attention, as a rule
  const int64_t token = blockIdx.x;
  const int64_t slot = p.slots_are_64_bit ? static_cast<const int64_t*>(p.slots)[token]
                                          : static_cast<const int*>(p.slots)[token];
  if (slot < 0) return;
  const int64_t block = slot / p.block_size, position = slot - block * p.block_size;
  const auto at = [](auto* data, int64_t offset) {
    using Element = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(data)>>,
                                       const uint16_t, uint16_t>;
    return static_cast<Element*>(data) + offset;
  };
  const auto* key = at(p.key, token * p.key_stride_token);
  const auto* value = at(p.value, token * p.value_stride_token);
  auto* k = at(p.k_cache, block * p.k_stride_block + position * p.k_stride_token);
  auto* v = at(p.v_cache, block * p.v_stride_block + position * p.v_stride_token);
  const int vectors = p.head_dim / kElements;
  for (int i = threadIdx.x; i < p.kv_heads * vectors; i += blockDim.x) {
    const int head = i / vectors, element = (i - head * vectors) * kElements;
    *reinterpret_cast<Vector*>(k + head * p.k_stride_head + element) =
        *reinterpret_cast<const Vector*>(key + head * p.key_stride_head + element);
    *reinterpret_cast<Vector*>(v + head * p.v_stride_head + element) =
        *reinterpret_cast<const Vector*>(value + head * p.value_stride_head + element);
  }
}

}  // namespace

cudaError_t write_kv(const WriteParams& p, cudaStream_t stream) {
  if (p.aligned) {
    const int threads = min(256, (p.kv_heads * p.head_dim / 8 + 31) / 32 * 32);
    write_kv_kernel<uint4><<<p.tokens, threads, 0, stream>>>(p);
  } else {
    write_kv_kernel<uint16_t><<<p.tokens, 256, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace sparsek::portable
