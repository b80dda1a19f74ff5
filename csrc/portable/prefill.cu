// Attention of many queries a request: FlashAttention-2's loop (https://arxiv.org/abs/2307.08691)
// on mma.sync and cp.async, for any GPU from sm_90 on.
//
// A thread block takes kBlockM rows of one KV head (queries and heads of the group, packed) and
// walks over the keys that they see, kBlockN at a time, through a ring of kStages tiles in shared
// memory. A warp owns its rows, so the softmax needs no exchange between warps. Queries stay in
// shared memory above head_dim 64, where registers are short, and in registers there. Above 256 two
// warps have the same rows, and each half of the output's columns.
#include "operands.cuh"
#include "portable.h"

namespace sparsek::portable {
namespace {

#ifndef SPARSEK_BLOCK_M
#define SPARSEK_BLOCK_M 128
#endif
#ifndef SPARSEK_BLOCK_N
#define SPARSEK_BLOCK_N 64
#endif
#ifndef SPARSEK_NUM_STAGES
#define SPARSEK_NUM_STAGES 2
#endif
#ifndef SPARSEK_NUM_WARPS
#define SPARSEK_NUM_WARPS 4
#endif

// Softcap, bias and fp8 take registers that two row tiles a warp do not leave, and long rows take
// shared memory too.
template <typename KV, int kHeadDim, bool kGeneral>
struct Shape {
  static constexpr bool kLong = kHeadDim > 128;
  static constexpr int kParts = column_parts(kHeadDim);
  static constexpr int kBlockN = kParts > 1 ? 16 : kLong ? 32 : SPARSEK_BLOCK_N;
  static constexpr int kStages = kLong ? 2 : SPARSEK_NUM_STAGES;
  static constexpr int kWarps = kLong ? 4 : SPARSEK_NUM_WARPS, kThreads = 32 * kWarps;
  static constexpr int kRowWarps = kWarps / kParts;  // that have different rows
  static constexpr int kBlockM =
      kGeneral || kLong || sizeof(KV) == 1 ? 16 * kRowWarps : SPARSEK_BLOCK_M;
  // Keys that a warp copies at a time: of one page, since pages are multiples of 16.
  static constexpr int kSlice = kBlockN / kWarps < 16 ? kBlockN / kWarps : 16;
  static_assert(kBlockM % (16 * kRowWarps) == 0 && kBlockN % (kSlice * kWarps) == 0);
  static_assert(16 % kSlice == 0 && kSlice >= 4 && kStages >= 2);
  static constexpr int kQueryPitch = row_pitch(2 * kHeadDim);
  static constexpr int kTileBytes = kBlockN * Row<KV, kHeadDim>::kPitch;
  static constexpr int kSharedBytes = kBlockM * kQueryPitch + 2 * kStages * kTileBytes;
};

// Queries beside fp8 keys: fp16 in the order that products take them (see operands.cuh), bf16 ones
// scaled to its range. The factor of each row's scores goes to `factors`.
template <typename T, int kHeadDim, int kBlockM, int kThreads>
__device__ inline void reorder_queries(char* q, float* factors) {
  constexpr int kLanes = row_pitch(2 * kHeadDim) / 32;  // that share a row; the last may have none
  static_assert(kBlockM * kLanes % kThreads == 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < kBlockM * kLanes; i += kThreads) {
    const int row = i / kLanes, piece = i % kLanes * 2;
    auto* first = reinterpret_cast<uint4*>(q + tile_offset<2 * kHeadDim>(row, piece));
    auto* second = reinterpret_cast<uint4*>(q + tile_offset<2 * kHeadDim>(row, piece + 1));
    const bool has = piece < kHeadDim / 8;
    const uint4 a = has ? *first : uint4{}, b = has ? *second : uint4{};
    uint32_t pairs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    float factor = 1;
    if constexpr (!std::is_same_v<T, __half>) {
      int largest = 0;
#pragma unroll
      for (const uint32_t pair : pairs) largest = largest_of<T>(largest, pair);
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2)
        largest = max(largest, __shfl_xor_sync(~0u, largest, step));
      const PowerOfTwo<14> power(largest);  // fp16 ends at 2^16
#pragma unroll
      for (uint32_t& pair : pairs) pair = to_half<T>(pair, power.up);
      factor = power.down;
    }
    if (!has) continue;
    *first = {pairs[0], pairs[2], pairs[4], pairs[6]};
    *second = {pairs[1], pairs[3], pairs[5], pairs[7]};
    if (piece == 0) factors[row] = factor;
  }
}

template <typename T, typename KV, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(Shape<KV, kHeadDim, kGeneral>::kThreads,
                                  Shape<KV, kHeadDim, kGeneral>::kWarps <= 4 ? 2 : 1)
    prefill_kernel(const __grid_constant__ AttentionParams p) {
  using M = Operand<T, KV>;
  constexpr bool kFp8 = sizeof(KV) == 1;
  using Row = portable::Row<KV, kHeadDim>;
  using S = Shape<KV, kHeadDim, kGeneral>;
  constexpr int kBlockM = S::kBlockM, kBlockN = S::kBlockN, kStages = S::kStages;
  constexpr int kWarps = S::kWarps, kThreads = S::kThreads, kSlice = S::kSlice;
  constexpr int kParts = S::kParts, kColumns = kHeadDim / kParts;
  constexpr int kRowTiles = kBlockM / (16 * S::kRowWarps);  // of 16 rows, a warp
  constexpr int kQueryLanes = S::kQueryPitch / 16;          // that copy a row of queries
  constexpr int kRowsAtOnce = kThreads / kQueryLanes;       // that all threads copy together
  constexpr int kStepsALoad = kFp8 ? 2 : 1;
  constexpr int kSteps = kHeadDim / 16;   // of QK^T along head_dim
  constexpr int kKeyTiles = kBlockN / 8;  // columns of the score tile
  constexpr int kGroups = kBlockN / 16;   // of 16 keys
  constexpr int kSlicesAWarp = kBlockN / (kSlice * kWarps);
  constexpr bool kQueriesInRegisters = kHeadDim <= 64;
  constexpr uint32_t kTileBytes = S::kTileBytes;

  extern __shared__ __align__(1024) char shared[];
  const uint32_t shared_q = shared_address(shared);
  const uint32_t shared_kv = shared_q + kBlockM * S::kQueryPitch;

  // Late tiles first: under a causal mask they are the heaviest.
  const int tile = gridDim.x - 1 - blockIdx.x;
  const int kv_head = blockIdx.y;
  const int b = request_of_tile<kBlockM>(p, tile);
  const int row0 = (tile - first_tile<kBlockM>(p, b)) * kBlockM;
  const Request request(p, b);
  if (row0 >= request.rows || request.is_decode(p)) return;

  const int thread = threadIdx.x, warp = thread / 32;
  const int row_warp = warp / kParts, part = warp % kParts;
  int lane = thread % 32;
  const int chunk = thread % kQueryLanes, copy_row = thread / kQueryLanes;

  // Queries to shared memory.
#pragma unroll
  for (int i = 0; i < kBlockM; i += kRowsAtOnce) {
    if (chunk >= kHeadDim / 8) break;
    const int row = i + copy_row, r = row0 + row;
    const bool valid = r < request.rows;
    const int query = valid ? p.group_divisor(r) : 0;
    const int head = kv_head * p.group + (valid ? r - query * p.group : 0);
    const T* source = static_cast<const T*>(p.q) +
                      (int64_t{request.q_begin} + query) * p.q_stride_token +
                      head * p.q_stride_head + chunk * 8;
    copy_async_16(shared_q + tile_offset<2 * kHeadDim>(row, chunk), source,
                  valid && 8 * chunk < p.head_dim);
  }
  __shared__ float score_factors[kFp8 ? kBlockM : 1];
  if constexpr (kFp8) {
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    reorder_queries<T, kHeadDim, kBlockM, kThreads>(shared, score_factors);
  }

  // Keys that the tile needs, in tiles of kBlockN.
  const int last_row = min(row0 + kBlockM, request.rows) - 1;
  const int first = p.group_divisor(row0), last = p.group_divisor(last_row);
  const KeyRange keys = request.keys<kGeneral>(p, first, last);
  const int keys_begin = request.tile_begin<kBlockN>(p, keys.begin);
  const int keys_end = keys.begin < keys.end ? keys.end : keys_begin;
  // What the loop needs now and then waits in shared memory: registers are short.
  __shared__ struct {
    int request, row0, window_begin;
    int first_slice;  // of 16 keys, that any row sees
    KeyRange common;  // keys that all rows see: they need no mask
  } constants;
  if (threadIdx.x == 0) {
    constants = {b,
                 row0,
                 keys.begin,
                 keys_begin + (keys.begin - keys_begin) / 16 * 16,
                 {request.keys<kGeneral>(p, last).begin, request.keys<kGeneral>(p, first).end}};
  }
  __syncthreads();

  // A slice's page is looked up one tile ahead of its copy. Pages outside of the range are not
  // looked up: block tables hold garbage there.
  KeyAddress next[kSlicesAWarp];
  const auto find_tile = [&](int key0) {
#pragma unroll
    for (int i = 0; i < kSlicesAWarp; ++i) {
      const int first = key0 + kSlice * (warp + i * kWarps);
      const int key = max(constants.first_slice, min(first, keys_end - 1));
      next[i] = KeyAddress(p, constants.request, key);
    }
  };
  const auto copy_tile = [&](int stage, int key0) {
    const uint32_t k_tile = shared_kv + stage * 2 * kTileBytes, v_tile = k_tile + kTileBytes;
#pragma unroll
    for (int i = 0; i < kSlicesAWarp; ++i) {
      const int first = kSlice * (warp + i * kWarps);
      const int piece = lane % Row::kLanes;
      const KV* k = next[i].template at<KV>(p.k, kv_head) + piece * Row::kElements;
      const KV* v = next[i].template at<KV>(p.v, kv_head) + piece * Row::kElements;
#pragma unroll
      for (int row = lane / Row::kLanes; row < kSlice; row += 32 / Row::kLanes) {
        if (piece >= Row::kPieces) break;
        const int key = key0 + first + row;
        const bool valid = key >= constants.window_begin && key < keys_end;
#pragma unroll
        for (int turn = 0; turn < Row::kTurns; ++turn) {
          const int further = turn * Row::kLanes;
          const uint32_t offset = tile_offset<Row::kBytes>(first + row, piece + further);
          const bool inside = valid && (piece + further) * Row::kElements < p.head_dim;
          copy_async_16(k_tile + offset, k + row * p.k.stride_token + further * Row::kElements,
                        inside);
          copy_async_16(v_tile + offset, v + row * p.v.stride_token + further * Row::kElements,
                        inside);
        }
      }
    }
  };

  const float exponent_scale = kGeneral ? kLog2e : p.scale_log2e;
  // This thread's rows: lane / 4, and 8 below it, of each of its warp's 16-row tiles.
  const auto row_of = [&](int m, int h) {
    return constants.row0 + (row_warp * kRowTiles + m) * 16 + lane / 4 + 8 * h;
  };
  float row_max[kRowTiles][2], row_sum[kRowTiles][2] = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) row_max[m][0] = row_max[m][1] = -INFINITY;
  float out[kRowTiles][kColumns / 8][4] = {};
  float score_factor[2];
  if constexpr (kFp8) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      score_factor[h] = scale_of(p.k_scale, p.k_scale_stride, kv_head) *
                        score_factors[row_warp * 16 + lane / 4 + 8 * h];
  }

  // ldmatrix addresses within a tile, for the first 16 elements of a row; step d along the row is
  // an XOR with d * 32 bytes. Q and V (transposed on the way): rows by lane % 16, chunk by
  // lane / 16. K: two 8-key matrices by two chunks.
  const auto across_rows = [&](auto row_bytes) {
    return tile_offset<decltype(row_bytes)::value>(lane % 16, lane / 16);
  };
  const auto across_chunks = [&] {
    return tile_offset<Row::kBytes>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  };
  using QueryBytes = std::integral_constant<int, 2 * kHeadDim>;
  using KeyBytes = std::integral_constant<int, Row::kBytes>;
  constexpr uint32_t kSixteenQueries = 16 * S::kQueryPitch, kSixteenKeys = 16 * Row::kPitch;

  uint32_t q_registers[kQueriesInRegisters ? kSteps : kStepsALoad][kRowTiles][4];
  static_assert(!kFp8 || kRowTiles == 1);  // steps follow each other

  if (keys_begin < keys_end) find_tile(keys_begin);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    const int key0 = keys_begin + s * kBlockN;
    if (key0 < keys_end) copy_tile(s, key0);
    if (key0 + kBlockN < keys_end) find_tile(key0 + kBlockN);
    copy_async_commit();
  }

  int stage = 0;
  for (int key0 = keys_begin; key0 < keys_end; key0 += kBlockN) {
    copy_async_wait<kStages - 2>();
    recompute(lane);
    __syncthreads();  // the tile is here, and all warps are done with the one before
    {
      const int next = key0 + (kStages - 1) * kBlockN;
      if (next < keys_end) copy_tile((stage + kStages - 1) % kStages, next);
      if (next + kBlockN < keys_end) find_tile(next + kBlockN);
      copy_async_commit();
    }
    const uint32_t k_tile = shared_kv + stage * 2 * kTileBytes, v_tile = k_tile + kTileBytes;

    if (kQueriesInRegisters && key0 == keys_begin) {
      const uint32_t q_lane =
          shared_q + row_warp * kRowTiles * kSixteenQueries + across_rows(QueryBytes{});
#pragma unroll
      for (int d = 0; d < kSteps; ++d) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          load_matrices(q_registers[kQueriesInRegisters ? d : 0][m],
                        (q_lane ^ (d << 5)) + m * kSixteenQueries);
        }
      }
    }

    const uint32_t q_lane =
        shared_q + row_warp * kRowTiles * kSixteenQueries + across_rows(QueryBytes{});
    const uint32_t k_lane = k_tile + across_chunks();
    float scores[kRowTiles][kKeyTiles][4] = {};
#pragma unroll
    for (int load = 0; load < Row::kLoads; ++load) {
      if (!kQueriesInRegisters) {
#pragma unroll
        for (int step = 0; step < (Row::whole(load) ? kStepsALoad : 1); ++step) {
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            load_matrices(q_registers[step][m],
                          (q_lane ^ (load * kStepsALoad + step) << 5) + m * kSixteenQueries);
          }
        }
      }
      const auto& q = q_registers[kQueriesInRegisters ? load * kStepsALoad : 0];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        uint32_t k[4];
        load_matrices(k, (k_lane ^ (load << 5)) + g * kSixteenKeys);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply_keys<M, KV>(scores[m][2 * g], &q[m], k[0], k[1], Row::whole(load));
          multiply_keys<M, KV>(scores[m][2 * g + 1], &q[m], k[2], k[3], Row::whole(load));
        }
      }
    }
    if constexpr (kFp8) {
#pragma unroll
      for (int i = 0; i < 4 * kKeyTiles; ++i) scores[0][i / 4][i % 4] *= score_factor[i % 4 / 2];
    }

    const KeyRange common = constants.common;
    const bool masked = key0 < common.begin || key0 + kBlockN > common.end;
    if (kGeneral || masked) {
      const Request request(p, constants.request);
      const int last_row = min(constants.row0 + kBlockM, request.rows) - 1;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = min(row_of(m, h), last_row), query = p.group_divisor(r);
          const int head = kv_head * p.group + r - query * p.group;
          const KeyRange visible = request.keys<kGeneral>(p, query);
#pragma unroll
          for (int i = 0; i < 2 * kKeyTiles; ++i) {
            const int key = key0 + 8 * (i / 2) + 2 * (lane % 4) + i % 2;
            const bool sees = key >= visible.begin && key < visible.end;
            float& score = scores[m][i / 2][2 * h + i % 2];
            if (kGeneral) score = adjust_score(p, score, request, head, query, key, sees);
            // By selection: adding -inf would keep a NaN.
            if (!sees) score = -INFINITY;
          }
        }
      }
    }

    // Online softmax. Row sums stay with their thread until the end.
    // Lanes look for their rows' maxima together only when a row has to be rescaled.
    float peak[kRowTiles][2];
    bool grown = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
          x = fmaxf(x, fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
        peak[m][h] = x;
        grown |= (x - row_max[m][h]) * exponent_scale > p.rescale_slack;
      }
    }
    if (__any_sync(~0u, grown)) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x = fmaxf(row_max[m][h], peak[m][h]);
          x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
          x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
          // While a row has seen no key, its sum is 0 and any factor but NaN will do.
          const float factor =
              x == -INFINITY ? 1.0f : exp2_approx((row_max[m][h] - x) * exponent_scale);
          row_max[m][h] = x;
          row_sum[m][h] *= factor;
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n) {
            out[m][n][2 * h] *= factor;
            out[m][n][2 * h + 1] *= factor;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float peak_or_0 = row_max[m][h] == -INFINITY ? 0.0f : row_max[m][h];
        const Exponential<kGeneral> exponential(peak_or_0, exponent_scale);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            scores[m][n][i] = exponential(scores[m][n][i]);
            row_sum[m][h] += scores[m][n][i];
          }
        }
      }
    }

    constexpr int kLoads = Row::kLoads / kParts;
    const uint32_t v_lane = (v_tile + across_rows(KeyBytes{})) ^ (part * kLoads << 5);
    // The accumulator layout of two 8-key tiles is the A operand of one step of 16 keys.
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t weights[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* pair = &scores[m][2 * g + j / 2][2 * (j % 2)];
          weights[m][j] = pack<M>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        uint32_t v[4];
        load_matrices_transposed(v, (v_lane ^ (load << 5)) + g * kSixteenKeys);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
          multiply_values<M, KV>(&out[m][2 * kStepsALoad * load], weights[m], v, Row::whole(load));
      }
    }
    stage = (stage + 1) % kStages;
  }
  copy_async_wait<0>();

  const Request finished(p, constants.request);
  const int end_row = min(constants.row0 + kBlockM, finished.rows);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = row_sum[m][h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int r = row_of(m, h);
      if (r >= end_row) continue;
      const int query = p.group_divisor(r), head = kv_head * p.group + r - query * p.group;
      const int64_t token = int64_t{finished.q_begin} + query;
      const RowState state = finish_row(p, row_max[m][h] * (kGeneral ? 1.0f : p.scale), sum, head);
      T* destination = static_cast<T*>(p.out) + token * p.out_stride_token +
                       head * p.out_stride_head + part * kColumns;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const OutputPair<KV> pair(out[m], n, h);
        if (part * kColumns + pair.column(lane) >= p.head_dim) continue;
        *reinterpret_cast<uint32_t*>(destination + pair.column(lane)) =
            pack<T>(pair.first * state.factor, pair.second * state.factor);
      }
      if (p.lse && part == 0 && lane % 4 == 0) p.lse[head * p.lse_stride_head + token] = state.lse;
    }
  }
}

template <typename T, typename KV, int kHeadDim, bool kGeneral>
cudaError_t launch(const AttentionParams& p, cudaStream_t stream) {
  auto kernel = prefill_kernel<T, KV, kHeadDim, kGeneral>;
  using S = Shape<KV, kHeadDim, kGeneral>;
  constexpr int bytes = S::kSharedBytes;
  static_assert(bytes <= 99 * 1024);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int tiles = most_tiles<S::kBlockM>(p);
  kernel<<<dim3(static_cast<unsigned>(tiles), p.kv_heads), S::kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

template <typename T, typename KV, int kHeadDim>
cudaError_t prefill(const AttentionParams& p, cudaStream_t stream) {
  const bool general = is_general(p);
  return general ? launch<T, KV, kHeadDim, true>(p, stream)
                 : launch<T, KV, kHeadDim, false>(p, stream);
}

template cudaError_t prefill<SPARSEK_DTYPE, SPARSEK_KV, SPARSEK_HEAD_DIM>(const AttentionParams&,
                                                                          cudaStream_t);

}  // namespace sparsek::portable
