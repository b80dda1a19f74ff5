// Writing new keys and values to their slots of the paged cache.
#include "../common/hopper.cuh"
#include "portable.h"

namespace sparsek::portable {
namespace {

template <typename T, int kElements>
struct alignas(sizeof(T) * kElements) Vector {
  T element[kElements];
};

// What the cache gets of some neighbours: themselves, or fp8 of them divided by the scale.
template <typename T, typename KV, int kElements>
__device__ inline Vector<KV, kElements> converted(const Vector<T, kElements>& x, float scale) {
  if constexpr (std::is_same_v<T, KV>) {
    return x;
  } else {
    Vector<KV, kElements> result;
#pragma unroll
    for (int i = 0; i < kElements; i += 2) {
      const float first = __fdiv_rn(static_cast<float>(x.element[i]), scale);
      const float second =
          kElements > 1 ? __fdiv_rn(static_cast<float>(x.element[(i + 1) % kElements]), scale) : 0;
      const uint16_t pair = narrow_to_fp8(first, second);
      result.element[i] = {static_cast<uint8_t>(pair)};
      if (kElements > 1) result.element[(i + 1) % kElements] = {static_cast<uint8_t>(pair >> 8)};
    }
    return result;
  }
}

// One thread block a token.
template <typename T, typename KV, int kElements>
__global__ void write_kv_kernel(const __grid_constant__ WriteParams p) {
  allow_next_kernel();  // attention, as a rule
  const int64_t token = blockIdx.x;
  const int64_t slot = p.slots_are_64_bit ? static_cast<const int64_t*>(p.slots)[token]
                                          : static_cast<const int*>(p.slots)[token];
  if (slot < 0) return;
  const int64_t block = slot / p.block_size, position = slot - block * p.block_size;
  const T* key = static_cast<const T*>(p.key) + token * p.key_stride_token;
  const T* value = static_cast<const T*>(p.value) + token * p.value_stride_token;
  KV* k = static_cast<KV*>(p.k_cache) + block * p.k_stride_block + position * p.k_stride_token;
  KV* v = static_cast<KV*>(p.v_cache) + block * p.v_stride_block + position * p.v_stride_token;
  const int vectors = p.head_dim / kElements;
  for (int i = threadIdx.x; i < p.kv_heads * vectors; i += blockDim.x) {
    const int head = i / vectors, element = (i - head * vectors) * kElements;
    const auto put = [&](const T* from, KV* to, const float* scales, int stride) {
      const float scale = scales ? scales[head * stride] : 1.0f;
      *reinterpret_cast<Vector<KV, kElements>*>(to + element) = converted<T, KV, kElements>(
          *reinterpret_cast<const Vector<T, kElements>*>(from + element), scale);
    };
    put(key + head * p.key_stride_head, k + head * p.k_stride_head, p.k_scale, p.k_scale_stride);
    put(value + head * p.value_stride_head, v + head * p.v_stride_head, p.v_scale,
        p.v_scale_stride);
  }
}

template <typename T, typename KV>
cudaError_t launch(const WriteParams& p, cudaStream_t stream) {
  if (p.aligned) {
    const int threads = min(256, (p.kv_heads * p.head_dim / 8 + 31) / 32 * 32);
    const auto kernel = write_kv_kernel<T, KV, 8>;
    kernel<<<p.tokens, threads, 0, stream>>>(p);
  } else {
    const auto kernel = write_kv_kernel<T, KV, 1>;
    kernel<<<p.tokens, 256, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t write_kv(const WriteParams& p, cudaStream_t stream) {
  if (!p.fp8) return launch<uint16_t, uint16_t>(p, stream);
  return p.type == Float::kFloat16 ? launch<__half, E4M3>(p, stream)
                                   : launch<__nv_bfloat16, E4M3>(p, stream);
}

}  // namespace sparsek::portable
