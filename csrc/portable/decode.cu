// Attention of few queries a request over long keys, bound by memory: split KV on mma.sync and
// cp.async, for any GPU from sm_90 on.
//
// common/split.cuh says how the work is shared out. Every warp streams its own 16 of a unit's 64
// keys (32, by two warps, where heads are longer than 128) through its own ring in shared memory,
// and the warps meet only at the end of a segment. Above 256 two warps share 16 keys and their
// ring, and each has half of the output's columns.
#include "../common/split.cuh"
#include "operands.cuh"
#include "portable.h"

namespace sparsek::portable {
namespace {

constexpr int kRows = kDecodeRows, kGroupKeys = 16;
constexpr int kBlockBytes = 96 * 1024;  // rings of all warps

// Fewer warps where rows are long: each needs two stages at least.
template <int kHeadDim>
struct Shape {
  static constexpr int kWarps = kHeadDim > 128 ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kParts = column_parts(kHeadDim);
  static constexpr int kGroups = kWarps / kParts;  // of warps with the same keys
  // Queries are in registers where there are enough.
  static constexpr int kQueryBytes = kParts > 1 ? kRows * 2 * kHeadDim : 0;
  static constexpr int kRingBytes = (kBlockBytes - kQueryBytes) / kGroups;
  static constexpr int kUnitKeys = kGroupKeys * kGroups;
  static_assert(kParts == 1 || kGroups == 1);  // warps that share a ring meet by __syncthreads
};

template <typename T, typename KV, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(Shape<kHeadDim>::kThreads, kDecodeBlocksPerMultiprocessor)
    decode_kernel(const __grid_constant__ AttentionParams p) {
  using M = Operand<T, KV>;
  constexpr bool kFp8 = sizeof(KV) == 1;
  using Row = portable::Row<KV, kHeadDim>;
  using S = Shape<kHeadDim>;
  constexpr int kWarps = S::kWarps, kThreads = S::kThreads, kUnitKeys = S::kUnitKeys;
  constexpr int kParts = S::kParts, kGroups = S::kGroups, kColumns = kHeadDim / kParts;
  constexpr int kRingBytes = S::kRingBytes, kSteps = kHeadDim / 16, kStepsALoad = kFp8 ? 2 : 1;
  constexpr uint32_t kGroupBytes = kGroupKeys * Row::kPitch;
  constexpr int kStages = kRingBytes / (2 * kGroupBytes);
  static_assert(kStages >= 2);

  extern __shared__ __align__(1024) char shared[];
  __shared__ float row_maxima[kGroups][kRows], row_sums[kGroups][kRows];
  __shared__ Segment segments[kWarps];
  __shared__ int largest_queries[kParts];

  const int thread = threadIdx.x, warp = thread / 32;
  const int group = warp / kParts, part = warp % kParts;
  int lane = thread % 32;
  using OwnShare = Share<kThreads, kRows, kUnitKeys, kGroupKeys, Alone::kAsOthers, kGeneral>;
  __shared__ typename OwnShare::Scratch scratch;
  OwnShare share(p, scratch);
  if (share.empty()) return;

  const uint32_t ring = shared_address(shared) + group * kRingBytes;
  uint4* const shared_queries = reinterpret_cast<uint4*>(shared + kGroups * kRingBytes);
  const auto sync_group = [] {
    if constexpr (kParts > 1)
      __syncthreads();
    else
      __syncwarp();
  };
  const auto k_lane = [&] {
    return tile_offset<Row::kBytes>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  };
  const auto v_lane = [&] { return kGroupBytes + tile_offset<Row::kBytes>(lane % 16, lane / 16); };

  for (Segment segment; share.next(p, segment);) {
    const Request request(p, segment.request);
    const int kv_head = segment.kv_head, row0 = segment.row0, rows = segment.rows;
    const KeyRange keys = segment.keys;
    const int key0 = segment.key0, key1 = segment.key1;

    // This thread's rows, lane / 4 and 8 below it, and what they see.
    const int rows_of[2] = {row0 + min(lane / 4, rows - 1), row0 + min(lane / 4 + 8, rows - 1)};
    const int queries[2] = {p.group_divisor(rows_of[0]), p.group_divisor(rows_of[1])};
    const KeyRange common{request.keys<kGeneral>(p, p.group_divisor(row0 + rows - 1)).begin,
                          request.keys<kGeneral>(p, p.group_divisor(row0)).end};

    constexpr int kPair = kFp8 ? 4 : 2, kSecond = kFp8 ? 2 : 8;
    constexpr int kOwnSteps = kSteps / kParts;
    uint32_t q[kOwnSteps][4];
    {
      const T* source[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int head = kv_head * p.group + rows_of[h] - queries[h] * p.group;
        source[h] = static_cast<const T*>(p.q) +
                    (int64_t{request.q_begin} + queries[h]) * p.q_stride_token +
                    head * p.q_stride_head + part * kColumns + kPair * (lane % 4);
      }
#pragma unroll
      for (int d = 0; d < kOwnSteps; ++d) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          // Of fp8 all are within 16 dimensions, of which head_dim is a multiple then.
          const int first = part * kColumns + 16 * d + (kFp8 ? 0 : 8 * (j / 2));
          const T* pair = source[j % 2] + 16 * d + kSecond * (j / 2);
          q[d][j] = first < p.head_dim ? *reinterpret_cast<const uint32_t*>(pair) : 0;
        }
      }
    }
    float score_factor = 1;
    if constexpr (kFp8) {
      const auto across_parts = [&](int largest) {
        if constexpr (kParts > 1) {
          if (lane == 0) largest_queries[part] = largest;
          __syncthreads();
#pragma unroll
          for (const int other : largest_queries) largest = max(largest, other);
        }
        return largest;
      };
      score_factor = scale_of(p.k_scale, p.k_scale_stride, kv_head) *
                     fit_queries<T>(reinterpret_cast<uint32_t (&)[4 * kOwnSteps]>(q), across_parts);
    }
    if constexpr (kParts > 1) {
#pragma unroll
      for (int d = 0; d < kOwnSteps; ++d) {
        shared_queries[32 * (part * kOwnSteps + d) + lane] = {q[d][0], q[d][1], q[d][2], q[d][3]};
      }
    }
    const float exponent_scale = kGeneral ? kLog2e
                                 : kFp8   ? usable_scale(p.scale_log2e * score_factor)
                                          : p.scale_log2e;
    float out[kColumns / 8][4] = {};
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0, 0};

    // What is needed for masks and at the end waits in shared memory: registers are short.
    if (lane == 0) segments[warp] = segment;
    __syncwarp();

    // This warp's groups of 16 keys: one in each unit. The look-up of a group's page is made one
    // group ahead of its copy.
    const int own_begin = key0 + group * kGroupKeys;
    KeyAddress next;
    if (own_begin < key1) next = KeyAddress(p, segment.request, own_begin);
    const auto copy = [&](int stage, int first) {
      if (first < key1) {
        const uint32_t k_group = ring + stage * 2 * kGroupBytes;
        const int copier = part * 32 + lane, piece = copier % Row::kLanes;
        const KV* k = next.template at<KV>(p.k, kv_head) + piece * Row::kElements;
        const KV* v = next.template at<KV>(p.v, kv_head) + piece * Row::kElements;
#pragma unroll 4
        for (int i = 0; i < kGroupKeys; i += 32 * kParts / Row::kLanes) {
          if (piece >= Row::kPieces) break;
          const int row = i + copier / Row::kLanes, key = first + row;
          const bool valid = key >= keys.begin && key < keys.end;
#pragma unroll
          for (int turn = 0; turn < Row::kTurns; ++turn) {
            const int further = turn * Row::kLanes;
            const uint32_t to = k_group + tile_offset<Row::kBytes>(row, piece + further);
            const bool inside = valid && (piece + further) * Row::kElements < p.head_dim;
            copy_async_16(to, k + row * p.k.stride_token + further * Row::kElements, inside);
            copy_async_16(to + kGroupBytes, v + row * p.v.stride_token + further * Row::kElements,
                          inside);
          }
        }
        const int ahead = first + kUnitKeys;
        if (ahead < key1) next = KeyAddress(p, segments[warp].request, ahead);
      }
      copy_async_commit();
    };

#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) copy(s, own_begin + s * kUnitKeys);
    int stage = 0;
    for (int key = own_begin; key < key1; key += kUnitKeys) {
      if (kHeadDim > 128) recompute(lane);
      copy_async_wait<kStages - 2>();
      sync_group();  // the keys are here, and all lanes are done with those before
      copy(stage == 0 ? kStages - 1 : stage - 1, key + (kStages - 1) * kUnitKeys);
      const uint32_t tile = ring + stage * 2 * kGroupBytes;
      stage = stage == kStages - 1 ? 0 : stage + 1;

      float scores[2][4] = {};
#pragma unroll
      for (int load = 0; load < Row::kLoads; ++load) {
        uint32_t k[4];
        load_matrices(k, (tile + k_lane()) ^ (load << 5));
        auto* own_q = &q[kParts > 1 ? 0 : load * kStepsALoad];
        if constexpr (kParts > 1) {
#pragma unroll
          for (int step = 0; step < kStepsALoad; ++step) {
            const uint4 again = shared_queries[32 * (load * kStepsALoad + step) + lane];
            own_q[step][0] = again.x, own_q[step][1] = again.y;
            own_q[step][2] = again.z, own_q[step][3] = again.w;
          }
        }
        multiply_keys<M, KV>(scores[0], own_q, k[0], k[1], Row::whole(load));
        multiply_keys<M, KV>(scores[1], own_q, k[2], k[3], Row::whole(load));
      }
      if (kGeneral || key < common.begin || key + kGroupKeys > common.end) {
        const Segment& own_segment = segments[warp];
        const Request own(p, own_segment.request);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = own_segment.row0 + min(lane / 4 + 8 * h, own_segment.rows - 1);
          const int query = p.group_divisor(r);
          const KeyRange visible = own.keys<kGeneral>(p, query);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = key + 8 * (i / 2) + 2 * (lane % 4) + i % 2;
            const bool sees = column >= visible.begin && column < visible.end;
            float& score = scores[i / 2][2 * h + i % 2];
            if (kGeneral) {
              const int head = kv_head * p.group + r - query * p.group;
              score = adjust_score(p, score * score_factor, own, head, query, column, sees);
            }
            // By selection: adding -inf would keep a NaN.
            if (!sees) score = -INFINITY;
          }
        }
      }

      float peak[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = fmaxf(fmaxf(scores[0][2 * h], scores[0][2 * h + 1]),
                        fmaxf(scores[1][2 * h], scores[1][2 * h + 1]));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        peak[h] = fmaxf(x, row_max[h]);
      }
      if (__any_sync(~0u, peak[0] > row_max[0] || peak[1] > row_max[1])) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float factor =
              peak[h] == -INFINITY ? 1.0f : exp2_approx((row_max[h] - peak[h]) * exponent_scale);
          row_max[h] = peak[h];
          row_sum[h] *= factor;
#pragma unroll
          for (int n = 0; n < kColumns / 8; ++n) {
            out[n][2 * h] *= factor;
            out[n][2 * h + 1] *= factor;
          }
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float peak_or_0 = row_max[h] == -INFINITY ? 0.0f : row_max[h];
        const Exponential<kGeneral> exponential(peak_or_0, exponent_scale);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            scores[n][i] = exponential(scores[n][i]);
            row_sum[h] += scores[n][i];
          }
        }
      }
      const uint32_t weights[4] = {
          pack<M>(scores[0][0], scores[0][1]), pack<M>(scores[0][2], scores[0][3]),
          pack<M>(scores[1][0], scores[1][1]), pack<M>(scores[1][2], scores[1][3])};
      constexpr int kLoads = Row::kLoads / kParts;
      const uint32_t v_tile = (tile + v_lane()) ^ (part * kLoads << 5);
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        uint32_t v[4];
        load_matrices_transposed(v, v_tile ^ (load << 5));
        multiply_values<M, KV>(&out[load * (kFp8 ? 4 : 2)], weights, v, Row::whole(load));
      }
    }
    copy_async_wait<0>();
    sync_group();
    segment = segments[warp];

    // The warps' parts meet in shared memory, in the rings, which are empty now.
    float* own_part = reinterpret_cast<float*>(shared + group * kRingBytes) + part * kColumns;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + 8 * h;
      row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 1);
      row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 2);
      if (part == 0 && lane % 4 == 0) {
        row_maxima[group][row] = row_max[h];
        row_sums[group][row] = row_sum[h];
      }
      if (row < segment.rows) {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          const OutputPair<KV> pair(out, n, h);
          *reinterpret_cast<float2*>(own_part + row * kHeadDim + pair.column(lane)) =
              make_float2(pair.first, pair.second);
        }
      }
    }
    __syncthreads();

    const Finish<T, kHeadDim, kRows, kGeneral> finish{p, segment, share.size, share.block,
                                                      exponent_scale};
    for (int i = 4 * thread; i < segment.rows * kHeadDim; i += 4 * kThreads) {
      const int row = i / kHeadDim, column = i % kHeadDim;
      float peak = -INFINITY, sum = 0;
      float4 value = {};
#pragma unroll
      for (int g = 0; g < kGroups; ++g) peak = fmaxf(peak, row_maxima[g][row]);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float factor = finish.weight(row_maxima[g][row], peak);
        sum += factor * row_sums[g][row];
        finish.add(value, factor,
                   *reinterpret_cast<const float4*>(shared + g * kRingBytes + 4 * i));
      }
      finish.leave(row, column, peak, sum, value);
    }
    // The rings have been read by the time that it uses them.
    finish.template meet<kThreads>(thread, 0, reinterpret_cast<float*>(shared));
    __syncthreads();  // the rings and row_maxima are free again
  }
}

template <typename T, typename KV, int kHeadDim, bool kGeneral>
cudaError_t launch(const AttentionParams& p, cudaStream_t stream) {
  static_assert(kDecodeBlocksPerMultiprocessor * most_part_floats(kRows, kHeadDim) <=
                kWorkspaceFloats);
  auto kernel = decode_kernel<T, KV, kHeadDim, kGeneral>;
  constexpr int bytes = kBlockBytes;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int blocks = p.multiprocessors * kDecodeBlocksPerMultiprocessor;
  // All of them can hold a part of the same rows, whose weights and sums go to shared memory.
  if (scratch_floats(kRows, blocks) * static_cast<int>(sizeof(float)) > bytes)
    return cudaErrorInvalidConfiguration;
  kernel<<<blocks, Shape<kHeadDim>::kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

template <typename T, typename KV, int kHeadDim>
cudaError_t decode(const AttentionParams& p, cudaStream_t stream) {
  return is_general(p) ? launch<T, KV, kHeadDim, true>(p, stream)
                       : launch<T, KV, kHeadDim, false>(p, stream);
}

template cudaError_t decode<SPARSEK_DTYPE, SPARSEK_KV, SPARSEK_HEAD_DIM>(const AttentionParams&,
                                                                         cudaStream_t);

}  // namespace sparsek::portable
