// Attention of few queries a request over long keys on Hopper: split KV, with K and V brought by
// the tensor memory accelerator (TMA).
//
// common/split.cuh says how the work is shared out, and how parts meet through L2; those of a
// request that is alone and short meet in the shared memory of clusters. One thread block a
// multiprocessor: producer
// warps, in turn, run ahead through the block's whole share, across segments, and keep a ring of
// units in shared memory full. Two groups of four consumer warps take units in turn, each warp 16
// keys, or 32 of fp8 where it has the registers: as many bytes. Where there are more rows than a
// warp can hold, both groups take every unit, each for half of the rows.
//
// The operands of the products are swapped: keys (then the dimensions of V) are the 16 rows of
// mma.sync m16n8k16 and queries its 8 columns, since a KV head has few. kTiles such tiles of rows
// are held at once. Keys and values of fp8 become fp16 on their way from shared memory to
// registers: the pieces of 16 bytes that ldmatrix hands out then hold other elements, so that
// queries are loaded, and dimensions of the output counted, in another order. bf16 queries are
// scaled to fp16.
#include "../common/split.cuh"
#include "barrier.cuh"
#include "tensor_map.h"

namespace sparsek::sm90 {
namespace {

constexpr int kGroups = 2, kWarpsOfGroup = 4, kWarps = kGroups * kWarpsOfGroup;
constexpr int kProducers = 2;  // warps: small boxes take one too long
constexpr int kConsumers = 32 * kWarps, kThreads = kConsumers + 32 * kProducers;
constexpr int kRingBytes = 128 * 1024;
constexpr int kConsumerBarrier = 1;
// Blocks of a cluster, and what one of them adds up at a time: what a warp writes at once.
#ifndef SPARSEK_CLUSTER  // tests have fewer
#define SPARSEK_CLUSTER 8
#endif
constexpr int kCluster = SPARSEK_CLUSTER, kPieceFloats = 32 * 4;

// kWide: where one group's rows are too few the groups take other rows of the same units, in place
// of other units of the same rows.
template <typename KV, int kHeadDim, int kTiles, bool kWide>
struct Shape {
  static constexpr int kRowsOfGroup = 8 * kTiles, kRows = kRowsOfGroup * (kWide ? kGroups : 1);
  static constexpr bool kFp8 = sizeof(KV) == 1;
  // Of 16 keys, of a warp in a unit: as many as there are registers for.
  static constexpr int kKeyTiles = kFp8 && kHeadDim * kTiles < 256 ? 2 : 1;
  static constexpr int kGroupKeys = 16 * kKeyTiles, kUnitKeys = kWarpsOfGroup * kGroupKeys;
  static constexpr int kRowBytes = sizeof(KV) * kHeadDim;       // of a key
  static constexpr int kUnitBytes = 2 * kRowBytes * kUnitKeys;  // and values
  static constexpr int kStages = kRingBytes / kUnitBytes;
  // A group that is ahead would take the stage of another for its own, one round later.
  static_assert(kWide || kStages % kGroups == 0);
  // Where there are registers for it.
  static constexpr bool kClusters = kTiles == 1 && !kWide && kHeadDim <= 128;
};
// Rows of sums that warps leave each other: four floats more keep them in different banks.
template <int kHeadDim>
constexpr int kPitch = kHeadDim + 4;
template <typename S>
using OwnShare = Share<kThreads, S::kRows, S::kUnitKeys, S::kUnitKeys,
                       S::kClusters ? Alone::kInClusters : Alone::kEvenly, false>;

template <typename S, int kHeadDim>
struct Shared {
  static constexpr int kRows = S::kRows;
  static constexpr int kMeetingFloats = kWarps * S::kRowsOfGroup * kPitch<kHeadDim>;

  char ring[kRingBytes];
  float meeting[kMeetingFloats];  // warps' sums
  alignas(16) float row_maxima[kRows][kWarps], row_sums[kRows][kWarps];
  Segment segments[kWarps];
  uint64_t full[S::kStages], empty[S::kStages];
  typename OwnShare<S>::Scratch scratch;
  // Of all blocks of the cluster: pieces of their sums, of each row the maximum and the sum of
  // weights.
  static constexpr int kOwnPieces =
      S::kClusters ? (kRows * kHeadDim / kPieceFloats + kCluster - 1) / kCluster : 1;
  float4 pieces[kOwnPieces][kCluster][kPieceFloats / 4];
  float2 states[kCluster][kRows];
  uint64_t arrived;
};

struct DecodeParams {
  CUtensorMap k, v;
  AttentionParams attention;
  int box_keys, box_keys_log2;  // that one copy brings
  bool joined;                  // a copy by `k` brings keys and values
};

// Brings every second unit of the block's share, for the producer of that number.
template <typename S, typename Share>
__device__ void produce(const DecodeParams& d, Share& share, int number, char* ring, uint64_t* full,
                        uint64_t* empty) {
  const AttentionParams& p = d.attention;
  const int lane = threadIdx.x % 32;
  const int boxes = S::kUnitKeys >> d.box_keys_log2;  // of a unit
  const int blocks = static_cast<int>(p.k.blocks);
  int stage = 0, phase = 0, turn = 0;
  for (Segment segment; share.next(p, segment);) {
    // A lane looks up the page of every 32nd box, one round ahead of the copies. Boxes without a
    // visible key lie outside of the tensor, whatever the block table says there.
    const auto look_up = [&](int box) -> KeyAddress {
      const int key = segment.key0 + (box << d.box_keys_log2);
      KeyAddress address;
      address.block = blocks;
      address.token = 0;
      if (key < segment.keys.end && key + d.box_keys > segment.keys.begin)
        address = KeyAddress(p, segment.request, key);
      return address;
    };
    const int units = segment.end - segment.begin;
    KeyAddress now = look_up(lane), ahead = look_up(lane + 32);
#pragma unroll 1
    for (int unit = 0, box = 0; unit < units; ++unit, box += boxes) {
      if (box > 0 && box % 32 == 0) {
        now = ahead;
        ahead = look_up(box + 32 + lane);
      }
      if (turn == number) {
        const int block = __shfl_sync(~0u, now.block, (box + lane) % 32);
        const int token = __shfl_sync(~0u, now.token, (box + lane) % 32);
        mbarrier_wait(&empty[stage], phase ^ 1);
        if (lane == 0) mbarrier_arrive_expect(&full[stage], S::kUnitBytes);
        __syncwarp();
        if (lane < boxes) {
          const int box_bytes = S::kRowBytes << d.box_keys_log2;
          char* k = ring + stage * S::kUnitBytes + lane * 2 * box_bytes;
          tensor_copy(k, &d.k, &full[stage], 0, token, 0, segment.kv_head, block);
          if (!d.joined)
            tensor_copy(k + box_bytes, &d.v, &full[stage], 0, token, 0, segment.kv_head, block);
        }
      }
      turn = turn + 1 == kProducers ? 0 : turn + 1;
      if (++stage == S::kStages) stage = 0, phase ^= 1;
    }
  }
}

// Where a piece of 16 bytes of a row lies in a box, whose rows are `pitch` bytes apart: TMA XORs
// bits 4 to 6 of an offset with bits 7 to 9.
__device__ inline uint32_t swizzled(int row, int pitch, int piece) {
  const uint32_t offset = row * pitch + piece * 16;
  return offset ^ (offset >> 3 & (pitch < kChunkBytes ? 0x30 : 0x70));
}

// A 16x16 first operand of two that a load has brought: `which` 0 or 1. Columns are dimensions of
// keys, or keys.
template <typename S, bool kValues>
__device__ inline void first_operand(uint32_t (&a)[4], const uint32_t (&loaded)[4], int which) {
  if constexpr (S::kFp8) {
    const uint32_t upper = loaded[2 * which], lower = loaded[2 * which + 1];
    if constexpr (kValues) {
      widen_fp8(swap_inner_bytes(upper), a[0], a[1]);
      widen_fp8(swap_inner_bytes(lower), a[2], a[3]);
    } else {
      widen_fp8(upper, a[0], a[2]);
      widen_fp8(lower, a[1], a[3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = loaded[i];
  }
}

// The blocks of a cluster add up what each has of the same rows, quicker than through L2 by 2 us.
// The sums are cut into pieces of 128 floats, a warp's; piece i is block i % kCluster's: all blocks
// write theirs into its shared memory, and one of its warps adds them up. It waits for all that is
// written to it, so that it cannot end before. Consumers' threads come here once, those that have a
// row (has_row) with four neighbours of its sums, its maximum and its sum of weights.
template <typename S, int kHeadDim, typename F>
__device__ void meet_in_cluster(Shared<S, kHeadDim>& shared, const F& finish, bool has_row,
                                float peak, float sum, float4 value) {
  constexpr int kRowOfPiece = kHeadDim < kPieceFloats ? kHeadDim : kPieceFloats;
  const int thread = threadIdx.x, lane = thread % 32;
  const int rank = static_cast<int>(blockIdx.x) % kCluster;
  const int floats = finish.segment.rows * kHeadDim;
  if (thread == 0) {
    int bytes = 0;
    for (int i = rank * kPieceFloats; i < floats; i += kCluster * kPieceFloats) {
      const int own = min(kPieceFloats, floats - i);
      bytes += kCluster * (own * 4 + own / kRowOfPiece * 8);
    }
    mbarrier_arrive_expect(&shared.arrived, bytes);
  }
  if (has_row) {
    const int piece = thread / 32, owner = piece % kCluster, row = 4 * thread / kHeadDim;
    store_async(owner, &shared.pieces[piece / kCluster][rank][lane], value, &shared.arrived);
    if (4 * lane % kRowOfPiece == 0)
      store_async(owner, &shared.states[rank][row], float2{peak, sum}, &shared.arrived);
  }
  // A warp for each piece of this block.
  const int i = (thread / 32 * kCluster + rank) * kPieceFloats + 4 * lane;
  if (i >= floats) return;
  const int row = i / kHeadDim;
  mbarrier_wait_cluster(&shared.arrived, 0);
  peak = -INFINITY;
#pragma unroll
  for (int k = 0; k < kCluster; ++k) peak = fmaxf(peak, shared.states[k][row].x);
  sum = 0;
  value = float4{};
#pragma unroll
  for (int k = 0; k < kCluster; ++k) {
    const float2 state = shared.states[k][row];
    const float factor = finish.weight(state.x, peak);
    sum += factor * state.y;
    finish.add(value, factor, shared.pieces[thread / 32][k][lane]);
  }
  finish.store(row, i % kHeadDim, peak, sum, value);
}

template <typename T, typename KV, int kHeadDim, int kTiles, bool kGeneral, bool kWide>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams d) {
  using S = Shape<KV, kHeadDim, kTiles, kWide>;
  using M = Operand<T, KV>;
  constexpr int kSteps = kHeadDim / 16, kRows = S::kRows;  // steps of 16 dimensions
  constexpr int kStepsALoad = S::kFp8 ? 2 : 1, kLoads = kSteps / kStepsALoad;
  constexpr int kScores = 4 * S::kKeyTiles;  // of a row tile: four a key tile
  extern __shared__ __align__(1024) char dynamic[];
  auto& shared = *reinterpret_cast<Shared<S, kHeadDim>*>(dynamic);

  const AttentionParams& p = d.attention;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (thread == 0) {
    prefetch_tensor_map(&d.k);
    if (!d.joined) prefetch_tensor_map(&d.v);
    for (int i = 0; i < S::kStages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kWarpArrivals * (kWide ? kWarps : kWarpsOfGroup));
    }
    if (S::kClusters) mbarrier_init(&shared.arrived, 1);
    mbarrier_fence_init();
  }
  if (warp == kWarps) prefetch_tables(p, lane);
  // The barriers are known to all from here on; nothing of this reads what a kernel has written.
  __syncthreads();
  if (S::kClusters && p.cluster > 0) cluster_arrive();
  wait_for_previous_kernel();
  allow_next_kernel();
  OwnShare<S> share(p, shared.scratch);
  if (share.empty()) return;
  if (warp >= kWarps)
    return produce<S>(d, share, warp - kWarps, shared.ring, shared.full, shared.empty);

  const int warp_of_group = warp % kWarpsOfGroup, group = warp / kWarpsOfGroup;
  // Where this lane's row of a matrix lies in a warp's keys: boxes of 16 or more keys, each one
  // chunk of the head after the other, first of keys, then of values. Of two short rows in one copy
  // keys and values are one chunk.
  const bool one_chunk = 2 * S::kRowBytes <= kChunkBytes && d.joined;
  const int pitch = one_chunk ? kChunkBytes : min(kChunkBytes, S::kRowBytes);
  const int chunk_bytes = kChunkBytes << d.box_keys_log2;
  const int box_bytes = S::kRowBytes << d.box_keys_log2;
  const int own_key = warp_of_group * S::kGroupKeys, own_box = own_key >> d.box_keys_log2;
  const int own_row = own_key - (own_box << d.box_keys_log2);
  const int key_tile_bytes = d.box_keys == 16 ? 2 * box_bytes : 16 * pitch;
  const uint32_t own_ring = shared_address(shared.ring) + own_box * 2 * box_bytes;
  const uint32_t k_lane = own_ring + swizzled(own_row + lane % 16, pitch, lane / 16);
  // Two loaded registers are of the same keys, or, of fp8, of the same dimensions.
  const int v_row = own_row + (S::kFp8 ? lane % 16 : lane % 8 + lane / 16 * 8);
  const int v_piece = S::kFp8 ? lane / 16 : lane / 8 % 2;
  const uint32_t v_lane = one_chunk ? own_ring + swizzled(v_row, pitch, v_piece + S::kRowBytes / 16)
                                    : own_ring + box_bytes + swizzled(v_row, pitch, v_piece);

  int stage = kWide ? 0 : group, phase = 0, turn = 0;
  for (Segment segment; share.next(p, segment);) {
    const Request request(p, segment.request);
    const KeyRange keys = segment.keys;
    const bool wide = kWide && segment.rows > S::kRowsOfGroup, one_tile = segment.rows <= 8;
    const int group_row = wide ? group * S::kRowsOfGroup : 0;
    const auto query_of = [&](int row) {
      return p.group_divisor(segment.row0 + min(row, segment.rows - 1));
    };
    const auto head_of = [&](int row, int query) {
      return segment.kv_head * p.group + segment.row0 + min(row, segment.rows - 1) -
             query * p.group;
    };
    // Keys that every row sees need no mask.
    const KeyRange common{request.keys(p, query_of(segment.rows - 1)).begin,
                          request.keys(p, query_of(0)).end};

    // What is needed at the end of the segment waits in shared memory: registers are short.
    if (lane == 0) shared.segments[warp] = segment;

    // As the second operand: this lane has row lane / 4 of a tile, two times two elements a step.
    constexpr int kPair = S::kFp8 ? 4 : 2, kSecond = S::kFp8 ? 2 : 8;
    uint32_t q[kTiles][kSteps][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int query = query_of(group_row + 8 * t + lane / 4);
      const int head = head_of(group_row + 8 * t + lane / 4, query);
      const T* source = static_cast<const T*>(p.q) +
                        (int64_t{segment.q_begin} + query) * p.q_stride_token +
                        head * p.q_stride_head + kPair * (lane % 4);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
          q[t][step][j] = *reinterpret_cast<const uint32_t*>(source + 16 * step + kSecond * j);
      }
    }
    float score_factor = 1;
    if constexpr (S::kFp8) {
      score_factor = scale_of(p.k_scale, p.k_scale_stride, segment.kv_head) *
                     fit_queries<T>(reinterpret_cast<uint32_t (&)[2 * kTiles * kSteps]>(q));
    }
    const float exponent_scale = kGeneral  ? kLog2e
                                 : S::kFp8 ? usable_scale(p.scale_log2e * score_factor)
                                           : p.scale_log2e;
    // Of the products, this lane has columns (rows of queries) 2 * (lane % 4) and the next.
    float out[kTiles][kSteps][4] = {};
    float row_max[kTiles][2], row_sum[kTiles][2] = {};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) row_max[t][0] = row_max[t][1] = -INFINITY;

    const int units = segment.end - segment.begin;
    for (int unit = 0; unit < units; ++unit) {
      const bool own_turn = wide || turn == group;
      turn = turn + 1 == kGroups ? 0 : turn + 1;
      if (!kWide && !own_turn) continue;
      mbarrier_wait(&shared.full[stage], phase);
      const int key = segment.key0 + unit * S::kUnitKeys + own_key;
      // Of the first kCount tiles of rows.
      const auto attend = [&](auto count) {
        constexpr int kCount = decltype(count)::value;
        const uint32_t offset = stage * S::kUnitBytes;
        // The products of one tile wait for each other: of one alone two sums are made.
        constexpr bool kTwoSums = kCount * S::kKeyTiles == 1;
        float scores[kCount][S::kKeyTiles][4] = {}, second[4] = {};
#pragma unroll
        for (int m = 0; m < S::kKeyTiles; ++m) {
#pragma unroll
          for (int load = 0; load < kLoads; ++load) {
            uint32_t loaded[4];
            load_matrices(loaded, ((k_lane + offset + m * key_tile_bytes) ^ (load % 4 << 5)) +
                                      load / 4 * chunk_bytes);
#pragma unroll
            for (int which = 0; which < kStepsALoad; ++which) {
              const int step = load * kStepsALoad + which;
              uint32_t k[4];
              first_operand<S, false>(k, loaded, which);
#pragma unroll
              for (int t = 0; t < kCount; ++t)
                mma<M>(kTwoSums && step % 2 ? second : scores[t][m], k, q[t][step][0],
                       q[t][step][1]);
            }
          }
        }
        if (kTwoSums) {
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[0][0][i] += second[i];
        }
        if (kGeneral || key < common.begin || key + S::kGroupKeys > common.end) {
          const Request own_request(p, segment.request);  // again: registers are short
          int own_lane = lane;
          recompute(own_lane);
#pragma unroll
          for (int t = 0; t < kCount; ++t) {
#pragma unroll
            for (int i = 0; i < kScores; ++i) {
              float& score = scores[t][i / 4][i % 4];
              const int row = group_row + 8 * t + 2 * (own_lane % 4) + i % 2;
              const int own = key + own_lane / 4 + i / 2 * 8;
              const int query = query_of(row);
              const KeyRange visible = own_request.keys(p, query);
              const bool sees = own >= visible.begin && own < visible.end;
              if (kGeneral)
                score = adjust_score(p, score * score_factor, own_request, head_of(row, query),
                                     query, own, sees);
              // By selection: adding -inf would keep a NaN.
              if (!sees) score = -INFINITY;
            }
          }
        }

        // Lanes look for the maximum of their row together only when one has to be rescaled.
        bool grown = false;
#pragma unroll
        for (int t = 0; t < kCount; ++t) {
#pragma unroll
          for (int i = 0; i < kScores; ++i) grown |= scores[t][i / 4][i % 4] > row_max[t][i % 2];
        }
        if (__any_sync(~0u, grown)) {
#pragma unroll
          for (int t = 0; t < kCount; ++t) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float x = row_max[t][c];
#pragma unroll
              for (int i = c; i < kScores; i += 2) x = fmaxf(x, scores[t][i / 4][i % 4]);
              x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
              x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
              x = fmaxf(x, __shfl_xor_sync(~0u, x, 16));
              // While a row has seen no key, its sum is 0 and any factor but NaN will do.
              const float factor =
                  x == -INFINITY ? 1.0f : exp2_approx((row_max[t][c] - x) * exponent_scale);
              row_max[t][c] = x;
              row_sum[t][c] *= factor;
#pragma unroll
              for (int step = 0; step < kSteps; ++step) {
                out[t][step][c] *= factor;
                out[t][step][c + 2] *= factor;
              }
            }
          }
        }
        uint32_t weights[kCount][kScores / 2];
#pragma unroll
        for (int t = 0; t < kCount; ++t) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float peak_or_0 = row_max[t][c] == -INFINITY ? 0.0f : row_max[t][c];
            const Exponential<kGeneral> exponential(peak_or_0, exponent_scale);
#pragma unroll
            for (int i = c; i < kScores; i += 4) {
              float (&score)[4] = scores[t][i / 4];
              score[c] = exponential(score[c]);
              score[c + 2] = exponential(score[c + 2]);
              row_sum[t][c] += score[c] + score[c + 2];
            }
          }
#pragma unroll
          for (int i = 0; i < kScores; i += 2)
            weights[t][i / 2] =
                transpose_matrix(pack<M>(scores[t][i / 4][i % 4], scores[t][i / 4][i % 4 + 1]));
        }

        // Values of keys that no row sees can be NaN, which a weight of 0 does not cancel. Keys
        // 2 * (lane % 4) and the next are in the low and the high half of a register.
        const bool partial = key < keys.begin || key + S::kGroupKeys > keys.end;
#pragma unroll
        for (int m = 0; m < S::kKeyTiles; ++m) {
          uint32_t kept[2] = {~0u, ~0u};
          if (partial) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int first = key + 16 * m + 8 * half + 2 * (lane % 4);
              kept[half] = (first >= keys.begin && first < keys.end ? 0x0000ffffu : 0u) |
                           (first + 1 >= keys.begin && first + 1 < keys.end ? 0xffff0000u : 0u);
            }
          }
#pragma unroll
          for (int load = 0; load < kLoads; ++load) {
            uint32_t loaded[4];
            load_matrices_transposed(loaded,
                                     ((v_lane + offset + m * key_tile_bytes) ^ (load % 4 << 5)) +
                                         load / 4 * chunk_bytes);
            if (partial) {
#pragma unroll
              for (int i = 0; i < 4; ++i) loaded[i] &= kept[S::kFp8 ? i % 2 : i / 2];
            }
#pragma unroll
            for (int which = 0; which < kStepsALoad; ++which) {
              const int step = load * kStepsALoad + which;
              uint32_t v[4];
              first_operand<S, true>(v, loaded, which);
#pragma unroll
              for (int t = 0; t < kCount; ++t)
                mma<M>(out[t][step], v, weights[t][2 * m], weights[t][2 * m + 1]);
            }
          }
        }
      };
      if (own_turn && key < keys.end && key + S::kGroupKeys > keys.begin) {
        if (kTiles > 1 && one_tile) {
          attend(std::integral_constant<int, 1>{});
        } else {
          attend(std::integral_constant<int, kTiles>{});
        }
      }
      warp_arrive(&shared.empty[stage]);
      stage += kWide ? 1 : kGroups;
      if (stage >= S::kStages) stage -= S::kStages, phase ^= 1;
    }

    __syncwarp();
    segment = shared.segments[warp];
    // The warps' sums meet, those of a row from all warps that had it.
    const auto sums_of = [&](int warp, int row) {
      const int own = wide ? row % S::kRowsOfGroup : row;
      return shared.meeting + (warp * S::kRowsOfGroup + own) * kPitch<kHeadDim>;
    };
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (!kGeneral) row_max[t][c] *= exponent_scale;  // groups can differ in it
        float& sum = row_sum[t][c];
        sum += __shfl_xor_sync(~0u, sum, 4);
        sum += __shfl_xor_sync(~0u, sum, 8);
        sum += __shfl_xor_sync(~0u, sum, 16);
        const int row = group_row + 8 * t + 2 * (lane % 4) + c;
        if (lane < 4) {
          shared.row_maxima[row][warp] = row_max[t][c];
          shared.row_sums[row][warp] = sum;
        }
        if (row >= segment.rows) continue;
        float* own_sums = sums_of(warp, row);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
            own_sums[16 * step + (S::kFp8 ? 2 * (lane / 4) + half : 8 * half + lane / 4)] =
                out[t][step][c + 2 * half];
        }
      }
    }
    barrier_sync<kConsumers>(kConsumerBarrier);
    int own_thread = thread;
    recompute(own_thread);  // or addresses would be kept from before the loop
    const Finish<T, kHeadDim, kRows, kGeneral> finish{p, segment, share.size, share.block,
                                                      kGeneral ? kLog2e : 1.0f};
    constexpr int kPasses = (kRows * kHeadDim + 4 * kConsumers - 1) / (4 * kConsumers);
    float4 values[kPasses] = {};
    float peaks[kPasses] = {}, sums[kPasses] = {};
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int i = 4 * (own_thread + pass * kConsumers), row = i / kHeadDim, column = i % kHeadDim;
      if (row >= segment.rows) break;
      // The warps that have a part of the row, and the first of them.
      const int warps = wide ? kWarpsOfGroup : kWarps;
      const int first = wide ? row / S::kRowsOfGroup * kWarpsOfGroup : 0;
      float maxima[kWarps], peak = -INFINITY;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        maxima[w] = w < warps ? shared.row_maxima[row][first + w] : -INFINITY;
        peak = fmaxf(peak, maxima[w]);
      }
      peaks[pass] = peak;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w >= warps) break;
        const float factor = finish.weight(maxima[w], peak);
        sums[pass] += factor * shared.row_sums[row][first + w];
        finish.add(values[pass], factor,
                   *reinterpret_cast<const float4*>(sums_of(first + w, row) + column));
      }
    }
    if constexpr (S::kClusters) {
      if (share.in_cluster) {
        static_assert(kPasses == 1);
        const int row = 4 * thread / kHeadDim;
        __syncwarp();
        cluster_wait();  // for the barriers of all
        return meet_in_cluster<S>(shared, finish, row < segment.rows, peaks[0], sums[0], values[0]);
      }
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int i = 4 * (own_thread + pass * kConsumers), row = i / kHeadDim, column = i % kHeadDim;
      if (row >= segment.rows) break;
      finish.leave(row, column, peaks[pass], sums[pass], values[pass]);
    }
    finish.template meet<kConsumers>(thread, kConsumerBarrier, shared.meeting);
    barrier_sync<kConsumers>(kConsumerBarrier);  // row_maxima and meeting are free again
  }
}

// Clusters that run at the same time. It is asked for once a device: even those of a kind differ,
// by which of their parts work.
template <typename Memory>
int clusters_of_device(void (*kernel)(DecodeParams), int multiprocessors) {
  constexpr int kMostDevices = 64;
  static int known[kMostDevices];  // one more than that; launches are one at a time
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMostDevices) return 0;
  if (known[device] == 0) {
    const Launch<DecodeParams> one{kernel, kCluster, kThreads, sizeof(Memory), kCluster};
    known[device] = 1 + std::min(most_clusters(one), multiprocessors / kCluster);
  }
  return known[device] - 1;
}

template <typename T, typename KV, int kHeadDim, int kTiles, bool kGeneral, bool kWide>
cudaError_t launch(const AttentionParams& p, cudaStream_t stream) {
  using S = Shape<KV, kHeadDim, kTiles, kWide>;
  using Memory = Shared<S, kHeadDim>;
  static_assert(sizeof(Memory) <= kSharedBytes && S::kRows <= most_decode_rows(kHeadDim));
  static_assert(most_part_floats(S::kRows, kHeadDim) <= kDecodeFloats);
  // All blocks can hold a part of the same rows, whose weights and sums go to shared memory.
  if (scratch_floats(S::kRows, p.multiprocessors) > Memory::kMeetingFloats)
    return cudaErrorInvalidConfiguration;
  DecodeParams d{};
  d.attention = p;
  d.attention.partials += int64_t{p.multiprocessors} * kWorkspaceFloats;
  d.attention.arrivals += int64_t{p.multiprocessors} * kWorkspaceCounters;
  d.box_keys = box_keys(p, S::kUnitKeys);
  while (1 << d.box_keys_log2 < d.box_keys) ++d.box_keys_log2;
  d.joined =
      static_cast<const char*>(p.v.data) == static_cast<const char*>(p.k.data) + S::kRowBytes &&
      p.v.stride_block == p.k.stride_block && p.v.stride_token == p.k.stride_token &&
      p.v.stride_head == p.k.stride_head;
  const int row_bytes = d.joined ? 2 * S::kRowBytes : S::kRowBytes;
  const auto map = [&](CUtensorMap* to, const KVTensor& tensor) {
    return make_row_map<KV>(to, tensor, p.kv_heads, row_bytes, d.box_keys);
  };
  cudaError_t error = map(&d.k, p.k);
  if (error == cudaSuccess && !d.joined) error = map(&d.v, p.v);
  if (error != cudaSuccess) return error;
  const auto kernel = decode_kernel<T, KV, kHeadDim, kTiles, kGeneral, kWide>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(sizeof(Memory)));
  if (error != cudaSuccess) return error;
  Launch<DecodeParams> grid{kernel, p.multiprocessors, kThreads, sizeof(Memory)};
  const int64_t tiles = (p.most_rows + S::kRows - 1) / S::kRows * p.kv_heads;
  if (S::kClusters && p.batch == 1 && p.keys_a_pair == 0 && tiles * kCluster <= p.multiprocessors) {
    const int clusters = clusters_of_device<Memory>(kernel, p.multiprocessors);
    if (tiles <= clusters) {
      grid.cluster = kCluster;
      grid.blocks = clusters * kCluster;
      d.attention.cluster = kCluster;
      // Of long keys these blocks alone would not keep memory busy. They do where all of each
      // one's share fits its ring and they are half of the multiprocessors; fewer get less.
      const int half = p.multiprocessors / 2, blocks = static_cast<int>(tiles) * kCluster;
      d.attention.cluster_units = std::min((S::kStages * blocks + half - 1) / half, S::kStages);
    }
  }
  return launch_overlapping(grid, d, stream);
}

}  // namespace

template <typename T, typename KV, int kHeadDim>
cudaError_t decode(const AttentionParams& p, cudaStream_t stream) {
  // What changes scores takes the registers that a second tile would need.
  if (p.softcap > 0 || p.bias || p.alibi_slopes)
    return launch<T, KV, kHeadDim, 1, true, false>(p, stream);
  if (p.most_rows <= 8) return launch<T, KV, kHeadDim, 1, false, false>(p, stream);
  if constexpr (kHeadDim > 128) {
    return launch<T, KV, kHeadDim, 1, false, true>(p, stream);
  } else {
    return p.most_rows > 16 ? launch<T, KV, kHeadDim, 2, false, true>(p, stream)
                            : launch<T, KV, kHeadDim, 2, false, false>(p, stream);
  }
}

template cudaError_t decode<SPARSEK_DTYPE, SPARSEK_KV, SPARSEK_HEAD_DIM>(const AttentionParams&,
                                                                         cudaStream_t);

}  // namespace sparsek::sm90
