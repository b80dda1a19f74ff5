// Which part of the problem a tile is: its request, its rows, and the keys that they see.
//
// The query heads of a KV head (its group) share K and V, so they are rows of one matrix: row r
// of a request is query r / group with head r % group of the group.
#pragma once
#include "../params.h"
#include "ptx.cuh"

namespace sparsek {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// What tensor cores multiply, where queries are T and keys and values are KV.
template <typename T, typename KV>
using Operand = std::conditional_t<std::is_same_v<KV, T>, T, __half>;

__device__ inline float load_float(const void* data, Float type, int64_t index) {
  switch (type) {
    case Float::kFloat16:
      return __half2float(static_cast<const __half*>(data)[index]);
    case Float::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

// From one row of so many bytes to the next in shared memory: a power of two.
__host__ __device__ constexpr int row_pitch(int bytes) {
  int pitch = 64;
  while (pitch < bytes) pitch *= 2;
  return pitch;
}
// Where a piece of 16 bytes of a row lies in a tile in shared memory: eight rows' pieces of the
// same index, which ldmatrix reads together, are in eight different groups of banks.
template <int kRowBytes>
__device__ inline uint32_t tile_offset(int row, int piece) {
  const uint32_t offset = row * row_pitch(kRowBytes) + piece * 16;
  return offset ^ (row_pitch(kRowBytes) < 128 ? offset >> 3 & 0x30 : (row & 7) << 4);
}

struct KeyRange {
  int begin, end;  // empty where begin >= end
};

// In the packed queries.
__device__ inline int first_query(const AttentionParams& p, int b) {
  return p.cu_seqlens_q ? p.cu_seqlens_q[b] : b * p.max_seqlen_q;
}

// Positions of keys count from the beginning of a request's first page, or of the packed tensor:
// its own keys are those from `start` on.
struct Request {
  int index, q_begin, rows, start, end, offset;

  Request() = default;
  __device__ Request(const AttentionParams& p, int b) : index(b) {
    q_begin = first_query(p, b);
    const int queries = first_query(p, b + 1) - q_begin;
    const int keys = p.seq_lens ? p.seq_lens[b] : p.max_seqlen_k;
    rows = queries * p.group;
    start = p.k_starts ? p.k_starts[b] : p.seq_lens ? 0 : b * p.max_seqlen_k;
    end = start + keys;
    offset = start + (p.q_offsets ? p.q_offsets[b] : keys - queries);
  }

  // That of another lane of the warp.
  __device__ Request of_lane(int lane) const {
    Request other;
    other.index = __shfl_sync(~0u, index, lane);
    other.q_begin = __shfl_sync(~0u, q_begin, lane);
    other.rows = __shfl_sync(~0u, rows, lane);
    other.start = __shfl_sync(~0u, start, lane);
    other.end = __shfl_sync(~0u, end, lane);
    other.offset = __shfl_sync(~0u, offset, lane);
    return other;
  }

  __device__ bool is_decode(const AttentionParams& p) const {
    return rows <= (end - start > p.long_keys ? p.long_decode_rows : p.decode_rows);
  }

  // Keys that the queries first to last see, together. A span holds its query, so that what one
  // sees is still a range, and those of later queries begin and end no earlier.
  template <bool kSpans = false>
  __device__ KeyRange keys(const AttentionParams& p, int first, int last) const {
    KeyRange range{start, end};
    if (p.window_left >= 0) range.begin = max(start, offset + first - p.window_left);
    if (p.window_right >= 0) range.end = min(end, offset + last + p.window_right + 1);
    if (kSpans && p.spans) {
      const int2 of_first = span(p, first), of_last = span(p, last);
      if (of_first.x < of_first.y) range.begin = max(start, min(range.begin, start + of_first.x));
      if (of_last.x < of_last.y) range.end = max(range.end, start + min(of_last.y, end - start));
    }
    return range;
  }
  // (A request without queries may lie behind the last one.)
  __device__ int2 span(const AttentionParams& p, int query) const {
    return reinterpret_cast<const int2*>(p.spans)[min(q_begin + query, p.total_q - 1)];
  }
  template <bool kSpans = false>
  __device__ KeyRange keys(const AttentionParams& p, int query) const {
    return keys<kSpans>(p, query, query);
  }

  // Rows times keys that they see: of a causal mask or none exactly, of a window about.
  __device__ float pairs(const AttentionParams& p) const {
    const KeyRange first = keys(p, 0), last = keys(p, p.group_divisor(max(rows, 1) - 1));
    const int both = max(first.end - first.begin, 0) + max(last.end - last.begin, 0);
    return 0.5f * static_cast<float>(rows) * static_cast<float>(both);
  }

  // Where a tile of keys that holds `key` begins: tiles lie in pages as the pages do, and in packed
  // keys as the request does. So they do not depend on what else is in the batch.
  template <int kKeys>
  __device__ int tile_begin(const AttentionParams& p, int key) const {
    const int first = p.block_table ? 0 : start;
    return first + (key - first) / kKeys * kKeys;
  }
};

// Lengths, and beginnings of block tables, come to L2, while the kernel before ends: what it may
// yet write is not read. By one warp of each block.
__device__ inline void prefetch_tables(const AttentionParams& p, int lane) {
  constexpr int kLine = 32;  // integers
#pragma unroll 1
  for (int i = lane * kLine; i <= p.batch; i += 32 * kLine) {
    if (p.cu_seqlens_q) prefetch_to_l2(p.cu_seqlens_q + i);
    if (p.seq_lens && i < p.batch) prefetch_to_l2(p.seq_lens + i);
    if (p.k_starts && i < p.batch) prefetch_to_l2(p.k_starts + i);
  }
  if (!p.block_table) return;
  // A lane has a line, the lanes of a block lines from all of the tables, and of few lines several
  // blocks have the same: some begin late.
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int of_table = p.block_divisor(p.max_seqlen_k - 1) / kLine + 1;
  const int of_row = max(1, min(of_table, 32 * blocks / p.batch));
  const int lines = of_row * p.batch, line = (block + lane * ((lines + 31) / 32)) % lines;
  const int row = line / of_row;
  prefetch_to_l2(p.block_table + row * p.block_table_stride + (line - row * of_row) * kLine);
}

// The sum over this lane and those before it.
__device__ inline int inclusive_sum(int lane, int own) {
  int sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  return sum;
}
// The sum over the warps before this one, from each one's own, all of which are in `warp_sums`
// then. All threads of the block come here.
template <int kThreads>
__device__ inline int sum_of_warps_before(int thread, int own, int (&warp_sums)[kThreads / 32]) {
  if (thread % 32 == 0) warp_sums[thread / 32] = own;
  __syncthreads();
  int sum = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < thread / 32) sum += warp_sums[w];
  }
  return sum;
}

// First of the prefill kernels' tiles of kRows rows of request b: an upper bound of the tiles
// before it that needs no sum over the requests, so that a binary search finds a tile's request.
template <int kRows>
__device__ inline int first_tile(const AttentionParams& p, int b) {
  return static_cast<int>(int64_t{first_query(p, b)} * p.group / kRows) + b;
}
template <int kRows>
__device__ inline int request_of_tile(const AttentionParams& p, int tile) {
  int b = 0;
  for (int end = p.batch; end - b > 1;) {
    const int middle = (b + end) / 2;
    (first_tile<kRows>(p, middle) <= tile ? b : end) = middle;
  }
  return b;
}
// As many tiles as there can be, of each KV head.
template <int kRows>
inline int most_tiles(const AttentionParams& p) {
  return static_cast<int>(int64_t{p.total_q} * p.group / kRows) + p.batch;
}

// Where a key of a request lies, and the keys after it up to the next multiple of 16: pages are
// multiples of 16. The look-up is apart from the address, to be made early. Packed keys are one
// endless page (see AttentionParams::block_divisor).
struct KeyAddress {
  int block, token;

  KeyAddress() = default;
  __device__ KeyAddress(const AttentionParams& p, int request, int key) {
    const int page = p.block_divisor(key);
    block = p.block_table ? p.block_table[request * p.block_table_stride + page] : 0;
    token = key - page * static_cast<int>(p.block_divisor.divisor);
#ifdef SPARSEK_DEBUG
    if (block < 0) __trap();
#endif
  }

  template <typename T>
  __device__ const T* at(const KVTensor& tensor, int kv_head) const {
    return static_cast<const T*>(tensor.data) + block * tensor.stride_block +
           token * tensor.stride_token + kv_head * tensor.stride_head;
  }
};

// The score that enters the softmax, in natural units, where softcap, ALiBi or bias is in force.
__device__ inline float adjust_score(const AttentionParams& p, float score, const Request& request,
                                     int head, int query, int key, bool visible) {
  score *= p.scale;
  if (p.softcap > 0) {
    // tanh(x) = 1 - 2 / (1 + exp(2x)): tanh.approx is too coarse.
    score = p.softcap * (1 - 2 * __frcp_rn(1 + exp2_approx(2 * kLog2e * (score / p.softcap))));
  }
  if (p.alibi_slopes) {
    recompute(head);  // registers are short
    score -= p.alibi_slopes[head] * fabsf(static_cast<float>(key - request.offset - query));
  }
  if (p.bias && visible) {
    score += load_float(p.bias, p.bias_type,
                        request.index * p.bias_stride[0] + head * p.bias_stride[1] +
                            query * p.bias_stride[2] + (key - request.start) * p.bias_stride[3]);
  }
  return score;
}

// exp((score - peak) * scale), by powers of two. A bias can make scores so large that their product
// with the scale is rounded by more than 1: then the difference comes first.
template <bool kLarge>
struct Exponential {
  float peak, scale;

  __device__ Exponential(float peak, float scale)
      : peak(kLarge ? peak : peak * scale), scale(scale) {}
  __device__ float operator()(float score) const {
    return exp2_approx(kLarge ? (score - peak) * scale : fmaf(score, scale, -peak));
  }
};

// Of keys or values.
__device__ inline float scale_of(const float* scales, int stride, int kv_head) {
  return scales ? scales[kv_head * stride] : 1.0f;
}

// The power of two that brings the largest of a row's numbers to 2^kExponent or above it, by less
// than twice: close to the end of a format's range, so that small ones keep their precision. From
// the bits of that largest one.
template <int kExponent>
struct PowerOfTwo {
  float up, down;

  __device__ explicit PowerOfTwo(int largest) {
    const int exponent = max(largest >> 23, 30);  // of 2^-97: both factors are normal numbers
    up = __int_as_float((2 * 127 + kExponent - exponent) << 23);
    down = __int_as_float((exponent - kExponent) << 23);
  }
};
// The larger of a row's largest so far and one more, as the bits of its absolute value. Infinities
// and NaN stay what they are whatever the factor, and must not set that of others.
__device__ inline int largest_of(int largest, float x) {
  const int bits = __float_as_int(x) & 0x7fffffff;
  return max(largest, bits < 0x7f800000 ? bits : 0);
}
// The same of two numbers of 16 bits.
template <typename T>
__device__ inline int largest_of(int largest, uint32_t pair) {
  float low, high;
  to_floats<T>(pair, low, high);
  return largest_of(largest_of(largest, low), high);
}
template <typename T>
__device__ inline uint32_t to_half(uint32_t pair, float factor) {
  float low, high;
  to_floats<T>(pair, low, high);
  return pack<__half>(low * factor, high * factor);
}

// Queries beside fp8 keys as fp16: bf16 ones by one factor for all that the warp has, and others
// too if `across` makes of its largest one theirs. Returns the factor of their scores.
template <typename T, int kCount, typename Across>
__device__ inline float fit_queries(uint32_t (&pairs)[kCount], const Across& across) {
  if constexpr (std::is_same_v<T, __half>) {
    return 1.0f;
  } else {
    int largest = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) largest = largest_of<T>(largest, pairs[i]);
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
      largest = max(largest, __shfl_xor_sync(~0u, largest, step));
    const PowerOfTwo<14> power(across(largest));  // fp16 ends at 2^16
#pragma unroll
    for (int i = 0; i < kCount; ++i) pairs[i] = to_half<T>(pairs[i], power.up);
    return power.down;
  }
}

template <typename T, int kCount>
__device__ inline float fit_queries(uint32_t (&pairs)[kCount]) {
  return fit_queries<T>(pairs, [](int largest) { return largest; });
}

// A factor of scores: not 0, by which -inf would become NaN. Where it is that small, all weights
// are 1 anyway.
__device__ inline float usable_scale(float scale) { return fmaxf(scale, 1.17549435e-38f); }

struct RowState {
  float factor, lse;  // of the row's output, and its natural log-sum-exp
};

// From a row's maximum in natural units and the sum of its exponentials, the sink included. Where
// that is NaN so is the LSE, or merging would take the row for one without keys. In powers of two
// the maximum could overflow: masks made by adding the lowest float are common.
__device__ inline RowState finish_row(const AttentionParams& p, float peak, float sum, int head) {
  const auto v_scale = [&] { return scale_of(p.v_scale, p.v_scale_stride, p.group_divisor(head)); };
  if (p.sinks) {
    const float sink = load_float(p.sinks, p.sinks_type, head * p.sinks_stride);
    const float top = sum == 0 ? sink : fmaxf(peak, sink);
    const float rescale = sum == 0 ? 0.0f : exp2f((peak - top) * kLog2e);
    const float total = sum * rescale + (sink == -INFINITY ? 0.0f : exp2f((sink - top) * kLog2e));
    if (total == 0) return {0.0f, -INFINITY};
    return {v_scale() * rescale / total, top + kLn2 * log2f(total)};
  }
  if (sum == 0) return {0.0f, -INFINITY};
  return {v_scale() / sum, peak + kLn2 * log2f(sum)};
}

}  // namespace sparsek
