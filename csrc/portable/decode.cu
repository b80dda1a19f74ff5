// Attention of few queries a request over long keys, bound by memory: split KV on mma.sync and
// cp.async, for any GPU from sm_80 on.
//
// The work of a launch is a list of units: 64 keys of one KV head, for up to 16 rows (queries and
// heads of the group, packed). Each thread block takes an equal, contiguous share of the list, so
// uneven lengths balance and the grid does not depend on them: a captured graph replays with new
// lengths. (Idea: Stream-K, https://arxiv.org/abs/2301.03598, and FlashInfer's scheduler.) Every
// warp streams its own 16 of a unit's 64 keys through its own ring in shared memory, and the warps
// meet only at the end of a segment, the part of a share that belongs to one KV head. A segment
// that is no whole is left in the workspace; the last thread block to arrive adds the parts up, in
// an order that does not depend on timing.
#include "../common/request.cuh"
#include "portable.h"

namespace sparsek::portable {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = kDecodeRows, kGroupKeys = 16, kUnitKeys = kGroupKeys * kWarps;
constexpr int kRingBytes = 24 * 1024;  // a warp

// Units of one request, and how they are laid out: KV heads outermost, then tiles of rows, then
// keys.
struct RequestUnits {
  int row_tiles, key_units, keys_begin;
  int64_t total;

  __device__ RequestUnits(const AttentionParams& p, const Request& request) {
    row_tiles = (request.rows + kRows - 1) / kRows;
    if (request.rows > p.decode_rows) row_tiles = 0;
    const KeyRange keys = request.keys(p, 0, p.group_divisor(max(request.rows, 1) - 1));
    keys_begin = keys.begin & ~(kGroupKeys - 1);
    // Rows that see no key have a unit too: somebody must write their zeros.
    key_units = max(1, (keys.end - keys_begin + kUnitKeys - 1) / kUnitKeys);
    total = int64_t{row_tiles} * key_units * p.kv_heads;
  }
};

__device__ inline int64_t units_of(const AttentionParams& p, int b) {
  return RequestUnits(p, Request(p, b)).total;
}

struct Place {
  int request;
  int64_t before;  // units of the requests before it
};

template <typename T, int kHeadDim, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kDecodeBlocksPerMultiprocessor)
    decode_kernel(const __grid_constant__ AttentionParams p) {
  constexpr int kSteps = kHeadDim / 16, kChunks = kHeadDim / 8;
  constexpr int kPartFloats = decode_part_floats(kHeadDim);
  constexpr uint32_t kRowBytes = 2 * kHeadDim, kGroupBytes = kGroupKeys * kRowBytes;
  constexpr int kStages = kRingBytes / (2 * kGroupBytes);

  extern __shared__ __align__(1024) char shared[];
  __shared__ int64_t warp_sums[kWarps];
  __shared__ Place first_place;
  __shared__ float row_maxima[kWarps][kRows], row_sums[kWarps][kRows];
  __shared__ bool last_to_arrive;

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  // Each thread sums the units of some consecutive requests; a scan over the threads then tells
  // the total and who holds this block's first unit.
  const int requests_each = (p.batch + kThreads - 1) / kThreads;
  const int b0 = min(p.batch, thread * requests_each), b1 = min(p.batch, b0 + requests_each);
  int64_t own = 0;
  for (int b = b0; b < b1; ++b) own += units_of(p, b);
  int64_t inclusive = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(~0u, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int64_t total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) inclusive += warp_sums[w];
    total += warp_sums[w];
  }
  const int64_t share = (total + gridDim.x - 1) / gridDim.x;
  int64_t unit = blockIdx.x * share;
  const int64_t units_end = min(total, unit + share);
  if (unit >= units_end) return;
  if (unit < inclusive && unit >= inclusive - own) {
    Place place{b0, inclusive - own};
    for (int64_t n; place.before + (n = units_of(p, place.request)) <= unit; ++place.request)
      place.before += n;
    first_place = place;
  }
  __syncthreads();
  Place place = first_place;

  const uint32_t ring = shared_address(shared) + warp * kRingBytes;
  const auto offset = [](int row, int chunk) -> uint32_t {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  };
  const uint32_t k_lane = offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const uint32_t v_lane = kGroupBytes + offset(lane % 16, lane / 16);
  const float exponent_scale = kGeneral ? kLog2e : p.scale_log2e;

  while (unit < units_end) {
    const Request request(p, place.request);
    const RequestUnits units(p, request);
    if (unit >= place.before + units.total) {
      place = {place.request + 1, place.before + units.total};
      continue;
    }
    // The segment: units of one KV head and row tile.
    const int within = static_cast<int>(unit - place.before);
    const int head_and_tile = within / units.key_units;
    const int kv_head = head_and_tile / units.row_tiles;
    const int row0 = (head_and_tile - kv_head * units.row_tiles) * kRows;
    const int rows = min(kRows, request.rows - row0);
    const int64_t whole_begin = place.before + int64_t{head_and_tile} * units.key_units;
    const int64_t whole_end = whole_begin + units.key_units;
    const int64_t segment_end = min(whole_end, units_end);
    const KeyRange keys = request.keys(p, p.group_divisor(row0), p.group_divisor(row0 + rows - 1));
    const int key0 = units.keys_begin + static_cast<int>(unit - whole_begin) * kUnitKeys;
    const int key1 =
        min(keys.end, units.keys_begin + static_cast<int>(segment_end - whole_begin) * kUnitKeys);

    // This thread's rows, lane / 4 and 8 below it, and what they see.
    const int rows_of[2] = {row0 + min(lane / 4, rows - 1), row0 + min(lane / 4 + 8, rows - 1)};
    const int queries[2] = {p.group_divisor(rows_of[0]), p.group_divisor(rows_of[1])};
    const KeyRange visible[2] = {request.keys(p, queries[0]), request.keys(p, queries[1])};
    const KeyRange common{request.keys(p, p.group_divisor(row0 + rows - 1)).begin,
                          request.keys(p, p.group_divisor(row0)).end};

    uint32_t q[kSteps][4];
    {
      const T* source[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int head = kv_head * p.group + rows_of[h] - queries[h] * p.group;
        source[h] = static_cast<const T*>(p.q) +
                    (int64_t{request.q_begin} + queries[h]) * p.q_stride_token +
                    head * p.q_stride_head + 2 * (lane % 4);
      }
#pragma unroll
      for (int d = 0; d < kSteps; ++d) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          q[d][j] = *reinterpret_cast<const uint32_t*>(source[j % 2] + 16 * d + 8 * (j / 2));
      }
    }
    float out[kHeadDim / 8][4] = {};
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0, 0};

    // This warp's groups of 16 keys: one in each unit. The look-up of a group's page is made one
    // group ahead of its copy.
    const int own_begin = key0 + warp * kGroupKeys;
    KeyAddress next;
    int next_key = own_begin;
    if (next_key < key1) next = KeyAddress(p, place.request, next_key);
    const auto copy_next = [&](int stage) {
      if (next_key < key1) {
        const uint32_t k_group = ring + stage * 2 * kGroupBytes;
        const T* k = next.at<T>(p.k, kv_head) + lane % kChunks * 8;
        const T* v = next.at<T>(p.v, kv_head) + lane % kChunks * 8;
#pragma unroll
        for (int i = 0; i < kGroupKeys; i += 32 / kChunks) {
          const int row = i + lane / kChunks, key = next_key + row;
          const bool valid = key >= keys.begin && key < keys.end;
          const uint32_t destination = k_group + offset(row, lane % kChunks);
          copy_async_16(destination, k + row * p.k.stride_token, valid);
          copy_async_16(destination + kGroupBytes, v + row * p.v.stride_token, valid);
        }
        next_key += kUnitKeys;
        if (next_key < key1) next = KeyAddress(p, place.request, next_key);
      }
      copy_async_commit();
    };

#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) copy_next(s);
    int stage = 0;
    for (int key = own_begin; key < key1; key += kUnitKeys) {
      copy_async_wait<kStages - 2>();
      __syncwarp();  // the group is here, and all lanes are done with the one before
      copy_next(stage == 0 ? kStages - 1 : stage - 1);
      const uint32_t group = ring + stage * 2 * kGroupBytes;
      stage = stage == kStages - 1 ? 0 : stage + 1;

      float scores[2][4] = {};
#pragma unroll
      for (int d = 0; d < kSteps; ++d) {
        uint32_t k[4];
        load_matrices(k, (group + k_lane) ^ (d << 5));
        mma<T>(scores[0], q[d], k[0], k[1]);
        mma<T>(scores[1], q[d], k[2], k[3]);
      }
      if (kGeneral || key < common.begin || key + kGroupKeys > common.end) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int h = i / 2, column = key + 8 * n + 2 * (lane % 4) + i % 2;
            const bool sees = column >= visible[h].begin && column < visible[h].end;
            if (kGeneral) {
              const int head = kv_head * p.group + rows_of[h] - queries[h] * p.group;
              scores[n][i] = adjust_score(p, scores[n][i], request, head, queries[h], column, sees);
            }
            // By selection: adding -inf would keep a NaN.
            if (!sees) scores[n][i] = -INFINITY;
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
          for (int n = 0; n < kHeadDim / 8; ++n) {
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
          pack<T>(scores[0][0], scores[0][1]), pack<T>(scores[0][2], scores[0][3]),
          pack<T>(scores[1][0], scores[1][1]), pack<T>(scores[1][2], scores[1][3])};
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t v[4];
        load_matrices_transposed(v, (group + v_lane) ^ (n << 5));
        mma<T>(out[2 * n], weights, v[0], v[1]);
        mma<T>(out[2 * n + 1], weights, v[2], v[3]);
      }
    }
    copy_async_wait<0>();
    __syncwarp();

    // The warps' parts meet in shared memory, in the rings, which are empty now.
    float* own_part = reinterpret_cast<float*>(shared + warp * kRingBytes);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + 8 * h;
      row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 1);
      row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 2);
      if (lane % 4 == 0) {
        row_maxima[warp][row] = row_max[h];
        row_sums[warp][row] = row_sum[h];
      }
      if (row < rows) {
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          *reinterpret_cast<float2*>(own_part + row * kHeadDim + 8 * n + 2 * (lane % 4)) =
              make_float2(out[n][2 * h], out[n][2 * h + 1]);
        }
      }
    }
    __syncthreads();

    const bool whole = unit == whole_begin && segment_end == whole_end;
    const int first_block = static_cast<int>(whole_begin / share);
    const int last_block = static_cast<int>((whole_end - 1) / share);
    const auto part_of = [&](int block) {
      // A block leaves at most two parts: of the segment that it goes on with and of the one that
      // it leaves unfinished.
      return p.partials + (2 * int64_t{block} + (block == first_block)) * kPartFloats;
    };
    // Four neighbours of a row.
    const auto finish = [&](int row, int column, float peak, float sum, float4 value) {
      const int r = row0 + row, query = p.group_divisor(r);
      const int head = kv_head * p.group + r - query * p.group;
      const int64_t token = int64_t{request.q_begin} + query;
      const RowState state = finish_row(p, peak * (kGeneral ? 1.0f : p.scale), sum, head);
      uint32_t* destination = reinterpret_cast<uint32_t*>(
          static_cast<T*>(p.out) + token * p.out_stride_token + head * p.out_stride_head + column);
      destination[0] = pack<T>(value.x * state.factor, value.y * state.factor);
      destination[1] = pack<T>(value.z * state.factor, value.w * state.factor);
      if (p.lse && column == 0) p.lse[head * p.lse_stride_head + token] = state.lse;
    };
    const auto add = [](float4& to, float factor, float4 value) {
      to.x += factor * value.x, to.y += factor * value.y;
      to.z += factor * value.z, to.w += factor * value.w;
    };
    // Of a part whose maximum is `own`, where the whole's is `peak`.
    const auto weight = [&](float own, float peak) {
      return peak == -INFINITY ? 0.0f : exp2_approx((own - peak) * exponent_scale);
    };

    for (int i = 4 * thread; i < rows * kHeadDim; i += 4 * kThreads) {
      const int row = i / kHeadDim, column = i % kHeadDim;
      float peak = -INFINITY, sum = 0;
      float4 value = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) peak = fmaxf(peak, row_maxima[w][row]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float factor = weight(row_maxima[w][row], peak);
        sum += factor * row_sums[w][row];
        add(value, factor, *reinterpret_cast<const float4*>(shared + w * kRingBytes + 4 * i));
      }
      if (whole) {
        finish(row, column, peak, sum, value);
      } else {
        float* part = part_of(blockIdx.x);
        *reinterpret_cast<float4*>(part + i) = value;
        if (column == 0) {
          part[kRows * kHeadDim + row] = peak;
          part[kRows * kHeadDim + kRows + row] = sum;
        }
      }
    }

    if (!whole) {
      __threadfence();
      __syncthreads();
      if (thread == 0) {
        int* counter = p.arrivals + first_block;
        last_to_arrive = atomicAdd(counter, 1) == last_block - first_block;
        if (last_to_arrive) *counter = 0;
      }
      __syncthreads();
      if (last_to_arrive) {
        __threadfence();
        // A load takes longer than everything else here: all that can be are in flight together.
        // A warp takes a row, a lane every 32nd part of it; the parts' weights go to the rings.
        const int parts = last_block - first_block + 1;
        float* weights = reinterpret_cast<float*>(shared);
        float* sums = weights + parts * kRows;
        for (int row = warp; row < rows; row += kWarps) {
          float peak = -INFINITY, sum = 0;
          for (int k = lane; k < parts; k += 32) {
            const float* part = part_of(first_block + k) + kRows * kHeadDim + row;
            const float own = __ldcg(part);
            weights[k * kRows + row] = own;
            sums[k * kRows + row] = __ldcg(part + kRows);
            peak = fmaxf(peak, own);
          }
#pragma unroll
          for (int step = 16; step > 0; step /= 2)
            peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, step));
          for (int k = lane; k < parts; k += 32) {
            const float factor = weight(weights[k * kRows + row], peak);
            weights[k * kRows + row] = factor;
            sum += factor * sums[k * kRows + row];
          }
#pragma unroll
          for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
          if (lane == 0) {
            row_maxima[0][row] = peak;
            row_sums[0][row] = sum;
          }
        }
        __syncthreads();
        for (int i = 4 * thread; i < rows * kHeadDim; i += 4 * kThreads) {
          const int row = i / kHeadDim, column = i % kHeadDim;
          float4 value = {};
#pragma unroll 8
          for (int k = 0; k < parts; ++k) {
            const auto* part = reinterpret_cast<const float4*>(part_of(first_block + k) + i);
            add(value, weights[k * kRows + row], __ldcg(part));
          }
          finish(row, column, row_maxima[0][row], row_sums[0][row], value);
        }
      }
    }
    __syncthreads();  // the rings and row_maxima are free again
    unit = segment_end;
  }
}

template <typename T, int kHeadDim, bool kGeneral>
cudaError_t launch(const AttentionParams& p, cudaStream_t stream) {
  auto kernel = decode_kernel<T, kHeadDim, kGeneral>;
  constexpr int bytes = kWarps * kRingBytes;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int blocks = p.multiprocessors * kDecodeBlocksPerMultiprocessor;
  // All of them can hold a part of the same rows, whose weights and sums go to shared memory.
  if (blocks * kRows * 2 * static_cast<int>(sizeof(float)) > bytes)
    return cudaErrorInvalidConfiguration;
  kernel<<<blocks, kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

template <typename T, int kHeadDim>
cudaError_t decode(const AttentionParams& p, cudaStream_t stream) {
  const bool general = p.softcap > 0 || p.bias;
  return general ? launch<T, kHeadDim, true>(p, stream) : launch<T, kHeadDim, false>(p, stream);
}

template cudaError_t decode<SPARSEK_DTYPE, SPARSEK_HEAD_DIM>(const AttentionParams&, cudaStream_t);

}  // namespace sparsek::portable
