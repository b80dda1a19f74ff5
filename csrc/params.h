// What crosses from the op layer to the kernels: plain data, passed by value.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define SPARSEK_HOST_DEVICE __host__ __device__
#else
#define SPARSEK_HOST_DEVICE
#endif

namespace sparsek {

// Unsigned division by a number known on the host, for dividends below 2^31.
// Source: T. Granlund, P. Montgomery, "Division by invariant integers using multiplication", 1994.
struct FastDivisor {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }

  SPARSEK_HOST_DEVICE int operator()(int n) const {
#ifdef __CUDA_ARCH__
    const uint32_t high = __umulhi(multiplier, static_cast<uint32_t>(n));
#else
    const uint32_t high = static_cast<uint32_t>(uint64_t{multiplier} * uint32_t(n) >> 32);
#endif
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
  }
};

enum class Float : int { kFloat32, kFloat16, kBFloat16 };

// An element of an fp8 cache: a sign, 4 bits of exponent, 3 of mantissa.
struct E4M3 {
  uint8_t bits;
};

// Keys or values. Strides are in elements; where there is one of a kind, its stride is 0. Packed
// (not paged) tensors are one block.
struct KVTensor {
  const void* data;
  int64_t stride_block, stride_token, stride_head;
  int64_t blocks, tokens;  // tokens: of a block
};

struct AttentionParams {
  const void* q;
  void* out;
  float* lse;  // [heads, total_q], or null
  KVTensor k, v;
  int64_t q_stride_token, q_stride_head, out_stride_token, out_stride_head, lse_stride_head;

  // Null for requests that have max_seqlen_q queries and max_seqlen_k keys each, one behind the
  // other.
  const int *cu_seqlens_q, *seq_lens;
  const int* block_table;  // null for packed K and V
  int64_t block_table_stride;
  const int* k_starts;   // position of each request's first key, or null: 0, or where
                         // the request begins if seq_lens is null
  const int* q_offsets;  // position of each request's first query, or null: seq_len - query_len
  // Factors of keys and values, of fp8 alone: null for 1; stride 0 for one of all heads.
  const float *k_scale, *v_scale;
  int k_scale_stride, v_scale_stride;

  const void* sinks;          // [heads], or null
  const void* bias;           // [batch, heads, max_q, max_k], or null
  const float* alibi_slopes;  // [heads], or null
  Float sinks_type, bias_type;
  int64_t sinks_stride, bias_stride[4];

  int batch, kv_heads, group, total_q, multiprocessors;
  int head_dim;  // a multiple of 8; kernels for longer rows take zeros for the rest
  int max_seqlen_q, max_seqlen_k;  // of a request; the first at most total_q
  FastDivisor group_divisor;
  FastDivisor block_divisor;      // block_size; 2^31 for packed K and V
  float scale, scale_log2e;       // the second for scores in powers of two
  float softcap;                  // 0: off
  int window_left, window_right;  // -1: no limit
  const int* spans;               // of each query two: keys that it sees in any case, or none

  // Requests with at most decode_rows rows (queries times group) are the decode kernel's, those of
  // more than long_keys keys with at most long_decode_rows; the others are the prefill kernel's.
  int decode_rows, long_decode_rows, long_keys;
  int64_t most_rows;  // that a request of the decode kernel can have
  // Of Hopper's decode kernel, where its thread blocks are in clusters, which can write into each
  // other's shared memory: blocks of one (0: there are none), and units that each can have of a
  // request that is alone for its parts to meet there. See Alone in common/split.cuh.
  int cluster, cluster_units;
  bool batch_invariant;  // results of a row do not depend on other rows
  float rescale_slack;   // of the prefill kernels: powers of two by which a maximum may grow
  // Above 0, Hopper's prefill kernel runs beside its decode kernel, the launch before: keys that
  // decode reads in the time that a multiprocessor of prefill's takes for one row and one key.
  float keys_a_pair;
  // The workspace. Counters are zero before and after each launch.
  float* partials;     // kWorkspaceFloats for each multiprocessor, then kDecodeFloats
  int* arrivals;       // kWorkspaceCounters for each, then kDecodeCounters
  int* tile_counters;  // two: of Hopper's prefill kernel
};

// Whether there is more than a window: for the kernels that are made for all of it.
inline bool is_general(const AttentionParams& p) {
  return p.softcap > 0 || p.bias || p.alibi_slopes || p.spans;
}

// Keys that so many queries, one behind the other, see together at most.
inline int64_t most_keys(const AttentionParams& p, int64_t queries) {
  if (p.window_left < 0 || p.window_right < 0) return p.max_seqlen_k;
  const int64_t seen = int64_t{p.window_left} + p.window_right + queries;
  return seen < p.max_seqlen_k ? seen : p.max_seqlen_k;
}

// As in sparsek_vllm/core/kernels.py. Floats: two parts of what Hopper's prefill kernel computes at
// head_dim 128, of 12 warps' threads 64 sums, two maxima and two sums of weights. (At 256 that is
// room for one of 8 warps.)
constexpr int kWorkspaceFloats = 2 * 12 * 32 * (64 + 4), kWorkspaceCounters = 16;
// Of Hopper's decode kernel, since both can run at the same time: two parts of 32 rows of 128
// dimensions (or 16 of 256) with their maxima and sums; as many counters as keep the rest aligned.
constexpr int kDecodeFloats = 2 * 32 * (128 + 2), kDecodeCounters = 4;
constexpr int kTileCounters = 4;  // as many as keep the rest aligned

struct WriteParams {
  const void *key, *value;
  void *k_cache, *v_cache;
  int64_t key_stride_token, key_stride_head, value_stride_token, value_stride_head;
  int64_t k_stride_block, k_stride_token, k_stride_head;
  int64_t v_stride_block, v_stride_token, v_stride_head;
  const float *k_scale, *v_scale;  // as above
  int k_scale_stride, v_scale_stride;
  const void* slots;
  bool slots_are_64_bit;
  int block_size, tokens, kv_heads, head_dim;
  Float type;    // of key and value
  bool fp8;      // of the cache; otherwise it has that type
  bool aligned;  // every row of key and value begins at a multiple of 16 bytes, and is one
};

struct MergeParams {
  const void *out_a, *out_b;
  void* out;
  const float *lse_a, *lse_b;
  float* lse;
  int64_t a_stride[3], b_stride[3], out_stride[3];          // token, head, element
  int64_t lse_a_stride[2], lse_b_stride[2], lse_stride[2];  // head, token
  int tokens, heads, head_dim;
};

}  // namespace sparsek
