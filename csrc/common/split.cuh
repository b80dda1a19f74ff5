// How the decode kernels share out their work, and how they add up what several thread blocks have
// of the same rows.
//
// The work of a launch is a list of units: kUnitKeys keys of one KV head, for up to kRows rows
// (queries and heads of the group, packed). Each thread block takes an equal, contiguous share of
// the list, so uneven lengths balance and the grid does not depend on them: a captured graph
// replays with new lengths. (Idea: Stream-K, https://arxiv.org/abs/2301.03598, and FlashInfer's
// scheduler.) The part of a share that belongs to one KV head and one tile of rows is a segment. A
// segment that is no whole is left in the workspace; one thread block adds the parts up, in an
// order that does not depend on timing.
//
// Where prefill runs beside decode, only some of decode's blocks have a share, and the others end
// at once: they leave prefill the multiprocessors that it needs to end with decode. (After
// POD-Attention, https://arxiv.org/abs/2410.18038, which has both on each multiprocessor.)
#pragma once
#include "request.cuh"

namespace sparsek {

// Beside prefill, of all blocks: a third keeps memory busy, about, and two thirds do so as well as
// all. Within that, prefill gets several times what it needs: its tiles take long, and one that
// begins late would end long after decode.
constexpr float kSpare = 8;

// How the keys of a request that is alone are split.
//
// kEvenly: among as many thread blocks for each KV head and tile of rows, and no more of them than
// have keys. Units without keys fill up the last share. A block then has one segment.
//
// kInClusters: likewise, but if its units are few (AttentionParams::cluster_units), the blocks of a
// cluster have those of one KV head and tile of rows, all of them a share.
enum class Alone { kAsOthers, kEvenly, kInClusters };

// Of other blocks' parts a thread block adds up so many rows in the time that a unit takes.
constexpr float kRowsAddedAUnit = 200;

// Units of one request, and how they are laid out: KV heads outermost, then tiles of rows, then
// keys. The first unit begins at a multiple of kAlignment.
template <int kRows, int kUnitKeys, int kAlignment, bool kSpans>
struct RequestUnits {
  int row_tiles, key_units, keys_begin;

  __device__ RequestUnits(const AttentionParams& p, const Request& request) {
    row_tiles = (request.rows + kRows - 1) / kRows;
    if (!request.is_decode(p)) row_tiles = 0;
    const KeyRange keys = request.keys<kSpans>(p, 0, p.group_divisor(max(request.rows, 1) - 1));
    keys_begin = keys.begin & ~(kAlignment - 1);
    // Rows that see no key have a unit too: somebody must write their zeros.
    key_units = max(1, (keys.end - keys_begin + kUnitKeys - 1) / kUnitKeys);
  }

  __device__ int total(const AttentionParams& p) const {
    return row_tiles * key_units * p.kv_heads;  // 2^31 units would be 2^37 tokens of a KV head
  }
};

struct Segment {
  int request, kv_head, row0, rows;  // rows row0 to row0 + rows - 1 of the request
  int q_begin;                       // the request's first query
  KeyRange keys;                     // that any of the rows sees
  int key0, key1;                    // this segment's part of them: from a unit's first key on
  int begin, end;                    // its units
  int whole_begin, whole_end;        // those of all that these rows see
};

// A thread block's share of the units, taken segment by segment. All threads of the block make
// one, together; they do not always meet there.
template <int kThreads, int kRows, int kUnitKeys, int kAlignment, Alone kAlone, bool kSpans>
class Share {
  using Units = RequestUnits<kRows, kUnitKeys, kAlignment, kSpans>;

 public:
  struct Scratch {  // in shared memory
    int warp_sums[kThreads / 32], before;
    Request request;
    float warp_pairs[kThreads / 32];
  };

  __device__ Share(const AttentionParams& p, Scratch& scratch) {
    const int thread = threadIdx.x;
    if (kAlone != Alone::kAsOthers && p.batch == 1) {
      share_out_alone(p);
      return;
    }
    // Each thread sums the units of some consecutive requests; a scan over the threads then tells
    // the total and who holds this block's first unit. Of few requests each warp does so by itself.
    const bool by_warps = p.batch <= 32;
    const int requests_each = (p.batch + kThreads - 1) / kThreads;
    const int b0 = min(p.batch, by_warps ? thread % 32 : thread * requests_each);
    const int b1 = min(p.batch, b0 + requests_each);
    int own = 0;
    float pairs = 0;  // of prefill's requests
    Request request;
#pragma unroll 1
    for (int b = b0; b < b1; ++b) {
      request = Request(p, b);
      own += Units(p, request).total(p);
      if (p.keys_a_pair > 0 && !request.is_decode(p)) pairs += request.pairs(p);
    }
    if (p.keys_a_pair > 0) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) pairs += __shfl_xor_sync(~0u, pairs, step);
      if (!by_warps && thread % 32 == 0) scratch.warp_pairs[thread / 32] = pairs;
    }
    int inclusive = inclusive_sum(thread % 32, own), total = __shfl_sync(~0u, inclusive, 31);
    if (!by_warps) {
      inclusive += sum_of_warps_before<kThreads>(thread, total, scratch.warp_sums);
      total = 0;
#pragma unroll
      for (int w = 0; w < kThreads / 32; ++w) total += scratch.warp_sums[w];
    }
    const int all = static_cast<int>(gridDim.x);
    int blocks = all, own_block = static_cast<int>(blockIdx.x);
    if (p.keys_a_pair > 0) {
      if (!by_warps) {
        pairs = 0;
#pragma unroll
        for (int w = 0; w < kThreads / 32; ++w) pairs += scratch.warp_pairs[w];
      }
      const float keys = static_cast<float>(max(total, 1)) * kUnitKeys;
      const float needed = p.keys_a_pair * pairs * static_cast<float>(p.kv_heads) / keys;
      const int third = all / 3;
      const float given = fmaxf(needed, fminf(kSpare * needed, static_cast<float>(third)));
      blocks -= static_cast<int>(fminf(given, static_cast<float>(all - third - 1)));
      // Spread over all: neighbours share a path to memory.
      const int next = (own_block + 1) * blocks / all;
      own_block = own_block * blocks / all;
      if (next == own_block) total = 0;
    }
    size = (total + blocks - 1) / blocks;
    take(total, own_block);
    if (empty()) return;
    const bool holds_first = unit_ < inclusive && unit_ >= inclusive - own;
    if (by_warps) {
      const int lane = __ffs(static_cast<int>(__ballot_sync(~0u, holds_first))) - 1;
      request_ = request.of_lane(lane);
      before_ = __shfl_sync(~0u, inclusive - own, lane);
      return;
    }
    if (holds_first) {
      before_ = inclusive - own;
      request_ = Request(p, b0);
      find_request(p);
      scratch.request = request_;
      scratch.before = before_;
    }
    __syncthreads();
    request_ = scratch.request;
    before_ = scratch.before;
  }

  __device__ bool empty() const { return unit_ >= end_; }

  // The next segment; false behind the last.
  __device__ bool next(const AttentionParams& p, Segment& segment) {
    if (empty()) return false;
    // The portable kernel, whose requests are kAsOthers, has no registers to keep one.
    if (kAlone == Alone::kAsOthers) request_ = Request(p, request_.index);
    const Units units = find_request(p);
    const Request& request = request_;
    const int within = unit_ - before_;
    const int head_and_tile = within / units.key_units;
    segment.request = request.index;
    segment.q_begin = request.q_begin;
    // (A division takes as long as everything else here.)
    segment.kv_head = units.row_tiles == 1 ? head_and_tile : head_and_tile / units.row_tiles;
    segment.row0 = (head_and_tile - segment.kv_head * units.row_tiles) * kRows;
    segment.rows = min(kRows, request.rows - segment.row0);
    segment.whole_begin = before_ + head_and_tile * units.key_units;
    segment.whole_end = segment.whole_begin + units.key_units;
    segment.begin = unit_;
    segment.end = min(segment.whole_end, end_);
    segment.keys = request.keys<kSpans>(p, p.group_divisor(segment.row0),
                                        p.group_divisor(segment.row0 + segment.rows - 1));
    segment.key0 = units.keys_begin + (unit_ - segment.whole_begin) * kUnitKeys;
    segment.key1 =
        min(segment.keys.end, units.keys_begin + (segment.end - segment.whole_begin) * kUnitKeys);
    unit_ = segment.end;
    return true;
  }

  int size;                 // units a thread block
  int block;                // of those that have a share
  bool in_cluster = false;  // the other parts of this block's rows are those of its cluster

 private:
  __device__ void take(int total, int own) {
    block = own;
    unit_ = own * size;
    end_ = min(total, unit_ + size);
  }
  // Goes on to the request that has the next unit.
  __device__ Units find_request(const AttentionParams& p) {
    for (;; request_ = Request(p, request_.index + 1)) {
      Units units(p, request_);
      if (kAlone != Alone::kAsOthers && p.batch == 1) units.key_units = lone_key_units_;
      const int total = units.total(p);
      if (unit_ < before_ + total) return units;
      before_ += total;
    }
  }

  // See Alone.
  __device__ void share_out_alone(const AttentionParams& p) {
    request_ = Request(p, 0);
    before_ = 0;
    Units units(p, request_);
    const int blocks = static_cast<int>(gridDim.x);
    int share = 0;  // of a block
    if (units.row_tiles > 0) {
      const int all = blocks / (units.row_tiles * p.kv_heads);
      in_cluster = kAlone == Alone::kInClusters && units.key_units > 1 && all >= p.cluster &&
                   units.key_units <= p.cluster * p.cluster_units;
      // More parts are more to add up: the units of a block and the rows of parts, in its time,
      // are least with so many.
      const float rows = static_cast<float>(min(kRows, request_.rows));
      const float square = static_cast<float>(units.key_units) * kRowsAddedAUnit / rows;
      const int most = static_cast<int>(sqrtf(square)) + 1;
      const int parts = in_cluster ? p.cluster : max(1, min(all, most));
      const int each = (units.key_units + parts - 1) / parts;
      units.key_units = (in_cluster ? parts : (units.key_units + each - 1) / each) * each;
      if (parts > 1) share = each;
    }
    lone_key_units_ = units.key_units;
    const int total = units.total(p);
    size = share > 0 ? share : (total + blocks - 1) / blocks;
    take(total, static_cast<int>(blockIdx.x));
  }

  int lone_key_units_;
  int unit_, end_;
  Request request_;  // that has the next unit
  int before_;       // units of the requests before it
};

// Ends segments: from sums over the keys of one to rows of the output, or to parts in the
// workspace.
template <typename T, int kHeadDim, int kRows, bool kGeneral>
struct Finish {
  static constexpr int kPartFloats = kRows * (kHeadDim + 2);

  const AttentionParams& p;
  const Segment& segment;
  int share, block;      // units of a block, and which of those that have any this one is
  float exponent_scale;  // of the maxima, in powers of two

  __device__ int first_block() const { return segment.whole_begin / share; }
  __device__ int last_block() const { return (segment.whole_end - 1) / share; }
  __device__ bool whole() const {
    return segment.begin == segment.whole_begin && segment.end == segment.whole_end;
  }

  // A part is each row's weighted sum of values, then each row's maximum, then each row's sum of
  // weights. A block leaves at most two: of the segment that it goes on with and of the one that
  // it leaves unfinished.
  __device__ float* part_of(int index) const {
    return p.partials + (2 * int64_t{index} + (index == first_block())) * kPartFloats;
  }

  // Weight of a part whose maximum is `own`, where the whole's is `peak`.
  __device__ float weight(float own, float peak) const {
    return peak == -INFINITY ? 0.0f : exp2_approx((own - peak) * exponent_scale);
  }

  __device__ static void add(float4& to, float factor, float4 value) {
    to.x += factor * value.x, to.y += factor * value.y;
    to.z += factor * value.z, to.w += factor * value.w;
  }

  // Four neighbours of a row of the output, where that has them.
  __device__ void store(int row, int column, float peak, float sum, float4 value) const {
    if (column >= p.head_dim) return;
    const int r = segment.row0 + row, query = p.group_divisor(r);
    const int head = segment.kv_head * p.group + r - query * p.group;
    const int64_t token = int64_t{segment.q_begin} + query;
    const RowState state =
        finish_row(p, peak * (kGeneral ? 1.0f : exponent_scale * kLn2), sum, head);
    uint2* destination = reinterpret_cast<uint2*>(
        static_cast<T*>(p.out) + token * p.out_stride_token + head * p.out_stride_head + column);
    *destination = {pack<T>(value.x * state.factor, value.y * state.factor),
                    pack<T>(value.z * state.factor, value.w * state.factor)};
    if (p.lse && column == 0) p.lse[head * p.lse_stride_head + token] = state.lse;
  }

  // Four neighbours of a row of this block's part; to the output if it is the whole.
  __device__ void leave(int row, int column, float peak, float sum, float4 value) const {
    if (whole()) return store(row, column, peak, sum, value);
    float* part = part_of(block);
    *reinterpret_cast<float4*>(part + row * kHeadDim + column) = value;
    if (column == 0) {
      part[kRows * kHeadDim + row] = peak;
      part[kRows * kHeadDim + kRows + row] = sum;
    }
  }

  // After leave(): the last block to arrive adds the parts up. kThreads threads come here, which
  // meet at `barrier`; add_up() tells what `scratch` is.
  template <int kThreads>
  __device__ void meet(int thread, int barrier, float* scratch) const {
    if (whole()) return;
    bool& last_to_arrive = *reinterpret_cast<bool*>(scratch);
    barrier_sync<kThreads>(barrier);
    if (thread == 0) {
      int* counter = p.arrivals + first_block();
      last_to_arrive = add_acquire_release(counter, 1) == last_block() - first_block();
      if (last_to_arrive) *counter = 0;
    }
    barrier_sync<kThreads>(barrier);
    if (last_to_arrive) add_up<kThreads>(thread, barrier, scratch);
  }

 private:
  // Adds up the parts. `scratch` is shared memory for a bool in the first four floats, then two
  // floats a row and part, then two a row.
  template <int kThreads>
  __device__ void add_up(int thread, int barrier, float* scratch) const {
    const auto load = [&](int index, int i) { return __ldcg(part_of(index) + i); };
    const auto load_4 = [&](int index, int i) {
      return __ldcg(reinterpret_cast<const float4*>(part_of(index) + i));
    };
    // A load takes longer than everything else here: all that can be are in flight together.
    constexpr int kAhead = 16;
    const int first = first_block(), parts = last_block() - first + 1;
    const int rows = segment.rows, i0 = 4 * thread;
    float4 ahead[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      ahead[k] = float4{};
      if (k < parts && i0 < rows * kHeadDim) ahead[k] = load_4(first + k, i0);
    }
    // A warp takes a row, a lane every 32nd part of it.
    float* weights = scratch + 4;
    float* sums = weights + parts * kRows;
    float* totals = sums + parts * kRows;
    for (int row = thread / 32; row < rows; row += kThreads / 32) {
      const int lane = thread % 32;
      float peak = -INFINITY, sum = 0;
      for (int k = lane; k < parts; k += 32) {
        const float own = load(first + k, kRows * kHeadDim + row);
        weights[k * kRows + row] = own;
        sums[k * kRows + row] = load(first + k, kRows * kHeadDim + kRows + row);
        peak = fmaxf(peak, own);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, step));
      for (int k = lane; k < parts; k += 32) {
        const float factor = weight(weights[k * kRows + row], peak);
        weights[k * kRows + row] = factor;
        sum += factor * sums[k * kRows + row];
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) {
        totals[row] = peak;
        totals[kRows + row] = sum;
      }
    }
    barrier_sync<kThreads>(barrier);
    for (int i = i0; i < rows * kHeadDim; i += 4 * kThreads) {
      const int row = i / kHeadDim, column = i % kHeadDim;
      float4 value = {};
      int k = 0;
      if (i == i0) {
#pragma unroll
        for (; k < kAhead; ++k)
          if (k < parts) add(value, weights[k * kRows + row], ahead[k]);
      }
#pragma unroll 8
      for (; k < parts; ++k) add(value, weights[k * kRows + row], load_4(first + k, i));
      store(row, column, totals[row], totals[kRows + row], value);
    }
  }
};

// What a thread block leaves in the workspace at most, in floats.
constexpr int most_part_floats(int rows, int head_dim) { return 2 * rows * (head_dim + 2); }

// What add_up() needs at most, in floats.
constexpr int scratch_floats(int rows, int blocks) { return 4 + 2 * rows * (blocks + 1); }

}  // namespace sparsek
