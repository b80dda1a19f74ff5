// Attention of few queries a request over long keys on Hopper: split KV, with K and V brought by
// the tensor memory accelerator (TMA).
//
// common/split.cuh says how the work is shared out. One thread block a multiprocessor: a producer
// warp runs ahead through the block's whole share, across segments, and keeps a ring of units in
// shared memory full. Two groups of four consumer warps take units in turn, each warp 16 keys.
//
// The operands of the products are swapped: keys (then the dimensions of V) are the 16 rows of
// mma.sync m16n8k16 and queries its 8 columns, since a KV head has few. kTiles such tiles of rows
// are held at once.
#include "../common/hopper.cuh"
#include "../common/split.cuh"
#include "tensor_map.h"

namespace sparsek::sm90 {
namespace {

constexpr int kGroups = 2, kWarpsOfGroup = 4, kWarps = kGroups * kWarpsOfGroup;
constexpr int kConsumers = 32 * kWarps, kThreads = kConsumers + 32;
constexpr int kGroupKeys = kUnitKeys / kWarpsOfGroup;
static_assert(kGroupKeys == 16);
constexpr int kRingBytes = 128 * 1024;
constexpr int kConsumerBarrier = 1;

template <int kHeadDim>
constexpr int kTensorBytes = 2 * kHeadDim * kUnitKeys;  // of K or V, a unit
template <int kHeadDim>
constexpr int kStages = kRingBytes / (2 * kTensorBytes<kHeadDim>);
// Rows of sums that warps leave each other: four floats more keep them in different banks.
template <int kHeadDim>
constexpr int kPitch = kHeadDim + 4;
template <int kTiles>
using OwnShare = Share<kThreads, 8 * kTiles, kUnitKeys, true>;

template <int kHeadDim, int kTiles>
struct Shared {
  static constexpr int kRows = 8 * kTiles;
  static constexpr int kMeetingFloats = kWarpsOfGroup * kRows * kPitch<kHeadDim>;

  char ring[kRingBytes];
  float meeting[kMeetingFloats];  // warps' sums
  float row_maxima[kWarps][kRows], row_sums[kWarps][kRows];
  uint64_t full[kStages<kHeadDim>], empty[kStages<kHeadDim>];
  typename OwnShare<kTiles>::Scratch scratch;
};

struct DecodeParams {
  CUtensorMap k, v;
  AttentionParams attention;
  int box_keys, box_keys_log2;  // that one copy brings
  bool joined;                  // a copy by `k` brings keys and values
};

// Brings the units of the block's share, one after the other.
template <int kHeadDim, typename Share>
__device__ void produce(const DecodeParams& d, Share& share, char* ring, uint64_t* full,
                        uint64_t* empty) {
  constexpr int kBytes = kTensorBytes<kHeadDim>, kStagesHere = kStages<kHeadDim>;
  const AttentionParams& p = d.attention;
  const int lane = threadIdx.x % 32;
  const int boxes = kUnitKeys >> d.box_keys_log2;  // of a unit
  const int blocks = static_cast<int>(p.k.blocks);
  int stage = 0, phase = 0;
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
      const int block = __shfl_sync(~0u, now.block, (box + lane) % 32);
      const int token = __shfl_sync(~0u, now.token, (box + lane) % 32);
      mbarrier_wait(&empty[stage], phase ^ 1);
      if (lane == 0) mbarrier_arrive_expect(&full[stage], 2 * kBytes);
      __syncwarp();
      if (lane < boxes) {
        const int box_bytes = 2 * kHeadDim << d.box_keys_log2;
        char* k = ring + stage * 2 * kBytes + lane * 2 * box_bytes;
        tensor_copy(k, &d.k, &full[stage], 0, token, 0, segment.kv_head, block);
        if (!d.joined)
          tensor_copy(k + box_bytes, &d.v, &full[stage], 0, token, 0, segment.kv_head, block);
      }
      if (++stage == kStagesHere) stage = 0, phase ^= 1;
    }
  }
}

template <typename T, int kHeadDim, int kTiles, bool kGeneral>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams d) {
  constexpr int kSteps = kHeadDim / 16, kRows = 8 * kTiles;
  constexpr int kBytes = kTensorBytes<kHeadDim>, kStagesHere = kStages<kHeadDim>;
  extern __shared__ __align__(1024) char dynamic[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim, kTiles>*>(dynamic);

  const AttentionParams& p = d.attention;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (thread == 0) {
    prefetch_tensor_map(&d.k);
    if (!d.joined) prefetch_tensor_map(&d.v);
    for (int i = 0; i < kStagesHere; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kWarpsOfGroup);
    }
    mbarrier_fence_init();
  }
  // The barriers are known to all from here on; nothing of this reads what a kernel has written.
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();
  OwnShare<kTiles> share(p, shared.scratch);
  if (share.empty()) return;
  if (warp == kWarps) return produce<kHeadDim>(d, share, shared.ring, shared.full, shared.empty);

  const int warp_of_group = warp % kWarpsOfGroup, group = warp / kWarpsOfGroup;
  // Where this lane's row of a matrix lies in a warp's 16 keys: boxes of 16 or more keys, each one
  // chunk of the head after the other, first of keys, then of values; 16-byte pieces XORed with the
  // row's low three bits.
  const int chunk_bytes = 2 * kChunk << d.box_keys_log2;
  const int own_key = warp_of_group * kGroupKeys;
  const int own_box = own_key >> d.box_keys_log2;
  const int box_bytes = kHeadDim / kChunk * chunk_bytes;
  const uint32_t own_rows =
      own_box * 2 * box_bytes + (own_key - (own_box << d.box_keys_log2)) * 2 * kChunk;
  const uint32_t ring = shared_address(shared.ring);
  const auto piece = [](int row, int index) -> uint32_t {
    return row * (2 * kChunk) + ((index ^ (row & 7)) << 4);
  };
  const uint32_t k_lane = ring + own_rows + piece(lane % 16, lane / 16);
  const uint32_t v_lane =
      ring + box_bytes + own_rows + piece(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const float exponent_scale = kGeneral ? kLog2e : p.scale_log2e;

  int stage = group, phase = 0, turn = 0;
  for (Segment segment; share.next(p, segment);) {
    const Request request(p, segment.request);
    const int kv_head = segment.kv_head, row0 = segment.row0, rows = segment.rows;
    const KeyRange keys = segment.keys;
    const auto query_of = [&](int row) { return p.group_divisor(row0 + min(row, rows - 1)); };
    const auto head_of = [&](int row, int query) {
      return kv_head * p.group + row0 + min(row, rows - 1) - query * p.group;
    };
    // Keys that every row sees need no mask.
    const KeyRange common{request.keys(p, query_of(rows - 1)).begin,
                          request.keys(p, query_of(0)).end};

    // As the second operand: this lane has row lane / 4 of a tile.
    uint32_t q[kTiles][kSteps][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int query = query_of(8 * t + lane / 4), head = head_of(8 * t + lane / 4, query);
      const T* source = static_cast<const T*>(p.q) +
                        (int64_t{request.q_begin} + query) * p.q_stride_token +
                        head * p.q_stride_head + 2 * (lane % 4);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        q[t][step][0] = *reinterpret_cast<const uint32_t*>(source + 16 * step);
        q[t][step][1] = *reinterpret_cast<const uint32_t*>(source + 16 * step + 8);
      }
    }
    // Of the products, this lane has columns (rows of queries) 2 * (lane % 4) and the next.
    float out[kTiles][kSteps][4] = {};
    float row_max[kTiles][2], row_sum[kTiles][2] = {};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) row_max[t][0] = row_max[t][1] = -INFINITY;

    const int units = segment.end - segment.begin;
    for (int unit = 0; unit < units; ++unit) {
      const bool own_turn = turn == group;
      turn = turn + 1 == kGroups ? 0 : turn + 1;
      if (!own_turn) continue;
      mbarrier_wait(&shared.full[stage], phase);
      const int key = segment.key0 + unit * kUnitKeys + own_key;
      if (key < keys.end && key + kGroupKeys > keys.begin) {
        const uint32_t offset = stage * 2 * kBytes;
        float scores[kTiles][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint32_t k[4];
          load_matrices(k, ((k_lane + offset) ^ (step % 4 << 5)) + step / 4 * chunk_bytes);
#pragma unroll
          for (int t = 0; t < kTiles; ++t) mma<T>(scores[t], k, q[t][step][0], q[t][step][1]);
        }
        if (kGeneral || key < common.begin || key + kGroupKeys > common.end) {
          const Request own_request(p, segment.request);  // again: registers are short
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = 8 * t + 2 * (lane % 4) + i % 2, own = key + lane / 4 + i / 2 * 8;
              const int query = query_of(row);
              const KeyRange visible = own_request.keys(p, query);
              const bool sees = own >= visible.begin && own < visible.end;
              if (kGeneral)
                scores[t][i] = adjust_score(p, scores[t][i], own_request, head_of(row, query),
                                            query, own, sees);
              // By selection: adding -inf would keep a NaN.
              if (!sees) scores[t][i] = -INFINITY;
            }
          }
        }

        // Lanes look for the maximum of their row together only when one has to be rescaled.
        bool grown = false;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) grown |= scores[t][i] > row_max[t][i % 2];
        }
        if (__any_sync(~0u, grown)) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float x = fmaxf(fmaxf(scores[t][c], scores[t][c + 2]), row_max[t][c]);
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
        uint32_t weights[kTiles][2];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float peak_or_0 = row_max[t][c] == -INFINITY ? 0.0f : row_max[t][c];
            const Exponential<kGeneral> exponential(peak_or_0, exponent_scale);
            scores[t][c] = exponential(scores[t][c]);
            scores[t][c + 2] = exponential(scores[t][c + 2]);
            row_sum[t][c] += scores[t][c] + scores[t][c + 2];
          }
          weights[t][0] = transpose_matrix(pack<T>(scores[t][0], scores[t][1]));
          weights[t][1] = transpose_matrix(pack<T>(scores[t][2], scores[t][3]));
        }

        // Values of keys that no row sees can be NaN, which a weight of 0 does not cancel. Keys
        // 2 * (lane % 4) and the next are in the low and the high half of a register.
        const bool partial = key < keys.begin || key + kGroupKeys > keys.end;
        uint32_t kept[2] = {~0u, ~0u};
        if (partial) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int first = key + 8 * half + 2 * (lane % 4);
            kept[half] = (first >= keys.begin && first < keys.end ? 0x0000ffffu : 0u) |
                         (first + 1 >= keys.begin && first + 1 < keys.end ? 0xffff0000u : 0u);
          }
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint32_t v[4];
          load_matrices_transposed(v,
                                   ((v_lane + offset) ^ (step % 4 << 5)) + step / 4 * chunk_bytes);
          if (partial) v[0] &= kept[0], v[1] &= kept[0], v[2] &= kept[1], v[3] &= kept[1];
#pragma unroll
          for (int t = 0; t < kTiles; ++t) mma<T>(out[t][step], v, weights[t][0], weights[t][1]);
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&shared.empty[stage]);
      stage += kGroups;
      if (stage >= kStagesHere) stage -= kStagesHere, phase ^= 1;
    }

    // The warps' sums meet: first their maxima, then the second group's sums, to which the first
    // adds its own.
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& sum = row_sum[t][c];
        sum += __shfl_xor_sync(~0u, sum, 4);
        sum += __shfl_xor_sync(~0u, sum, 8);
        sum += __shfl_xor_sync(~0u, sum, 16);
        if (lane < 4) {
          shared.row_maxima[warp][8 * t + 2 * lane + c] = row_max[t][c];
          shared.row_sums[warp][8 * t + 2 * lane + c] = sum;
        }
      }
    }
    barrier_sync<kConsumers>(kConsumerBarrier);
    const Finish<T, kHeadDim, kRows, kGeneral> finish{p, segment, share.size, exponent_scale};
    float* own_sums = shared.meeting + warp_of_group * kRows * kPitch<kHeadDim>;
    const auto exchange = [&](bool adds) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int row = 8 * t + 2 * (lane % 4) + c;
          if (row >= rows) continue;
          float peak = -INFINITY;
#pragma unroll
          for (int w = 0; w < kWarps; ++w) peak = fmaxf(peak, shared.row_maxima[w][row]);
          const float factor = finish.weight(row_max[t][c], peak);
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float& sum = own_sums[row * kPitch<kHeadDim> + 16 * step + 8 * half + lane / 4];
              const float own = factor * out[t][step][c + 2 * half];
              sum = adds ? sum + own : own;
            }
          }
        }
      }
    };
    if (group == 1) exchange(false);
    barrier_sync<kConsumers>(kConsumerBarrier);
    if (group == 0) exchange(true);
    barrier_sync<kConsumers>(kConsumerBarrier);
    constexpr int kPasses = (kRows * kHeadDim + 4 * kConsumers - 1) / (4 * kConsumers);
    float4 values[kPasses] = {};
    float peaks[kPasses], sums[kPasses] = {};
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int i = 4 * (thread + pass * kConsumers), row = i / kHeadDim, column = i % kHeadDim;
      peaks[pass] = -INFINITY;
      if (row >= rows) break;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) peaks[pass] = fmaxf(peaks[pass], shared.row_maxima[w][row]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sums[pass] +=
            finish.weight(shared.row_maxima[w][row], peaks[pass]) * shared.row_sums[w][row];
      }
#pragma unroll
      for (int w = 0; w < kWarpsOfGroup; ++w) {
        finish.add(values[pass], 1.0f,
                   *reinterpret_cast<const float4*>(shared.meeting +
                                                    (w * kRows + row) * kPitch<kHeadDim> + column));
      }
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int i = 4 * (thread + pass * kConsumers), row = i / kHeadDim, column = i % kHeadDim;
      if (row >= rows) break;
      finish.leave(row, column, peaks[pass], sums[pass], values[pass]);
    }
    finish.template meet<kConsumers>(thread, kConsumerBarrier, shared.meeting);
    barrier_sync<kConsumers>(kConsumerBarrier);  // row_maxima and meeting are free again
  }
}

template <typename T, int kHeadDim, int kTiles, bool kGeneral>
cudaError_t launch(const DecodeParams& d, cudaStream_t stream) {
  using Memory = Shared<kHeadDim, kTiles>;
  static_assert(sizeof(Memory) <= 227 * 1024);
  const int multiprocessors = d.attention.multiprocessors;
  // All blocks can hold a part of the same rows, whose weights and sums go to shared memory.
  if (scratch_floats(8 * kTiles, multiprocessors) > Memory::kMeetingFloats)
    return cudaErrorInvalidConfiguration;
  const auto kernel = decode_kernel<T, kHeadDim, kTiles, kGeneral>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(sizeof(Memory)));
  if (error != cudaSuccess) return error;
  return launch_overlapping(Launch<DecodeParams>{kernel, multiprocessors, kThreads, sizeof(Memory)},
                            d, stream);
}

}  // namespace

template <typename T, int kHeadDim>
cudaError_t decode(const AttentionParams& p, cudaStream_t stream) {
  DecodeParams d{};
  d.attention = p;
  d.box_keys = box_keys(p, kUnitKeys);
  while (1 << d.box_keys_log2 < d.box_keys) ++d.box_keys_log2;
  constexpr int kChunks = kHeadDim / kChunk;
  d.joined =
      static_cast<const char*>(p.v.data) == static_cast<const char*>(p.k.data) + 2 * kHeadDim &&
      p.v.stride_block == p.k.stride_block && p.v.stride_token == p.k.stride_token &&
      p.v.stride_head == p.k.stride_head;
  const int chunks = d.joined ? 2 * kChunks : kChunks;
  cudaError_t error = make_tensor_map<T>(&d.k, p.k, p.kv_heads, chunks, d.box_keys, chunks);
  if (error == cudaSuccess && !d.joined)
    error = make_tensor_map<T>(&d.v, p.v, p.kv_heads, kChunks, d.box_keys, kChunks);
  if (error != cudaSuccess) return error;
  // Softcap and bias take the registers that a second tile would need.
  if (p.softcap > 0 || p.bias) return launch<T, kHeadDim, 1, true>(d, stream);
  return p.most_rows > 8 ? launch<T, kHeadDim, 2, false>(d, stream)
                         : launch<T, kHeadDim, 1, false>(d, stream);
}

template cudaError_t decode<SPARSEK_DTYPE, SPARSEK_HEAD_DIM>(const AttentionParams&, cudaStream_t);

}  // namespace sparsek::sm90
