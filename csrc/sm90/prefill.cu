// Attention of many queries a request on Hopper: wgmma, with Q, K and V brought by the tensor
// memory accelerator (TMA). After FlashAttention-3 (https://arxiv.org/abs/2407.08608): warps that
// load and warpgroups that compute, a warpgroup's softmax under its own product with V and under
// the other warpgroups' products.
//
// One thread block a multiprocessor takes tile after tile from a counter: rows of one KV head
// (queries and heads of the group, packed), 64 for each of kGroups warpgroups. Keys come in tiles
// of kBlockN, the last first: that is where masks are. The loading warps (one for keys, one for
// values, one or two for queries) run ahead into the next tile.
//
// Instructions of the softmax are what time goes into, a sixth of them for the maxima of rows. So a
// warp looks for maxima in its first key tile and where there are masks, and elsewhere takes those
// it has. Should weights come out far above 1 then, it multiplies its queries by those keys again.
//
// Where there are few tiles, or few left in the last round, several blocks share one: each has some
// of its rows, or a piece of its keys; of the pieces the last one to be done adds the results up.
//
// Beside keys of fp8 a query is the sum of two terms of fp8, which is about as precise as bf16. Its
// products with both are as quick as one of 16 bits. Values of fp8 land in the second half of their
// place, and one more warpgroup writes them all over it as fp16: products of fp8 cannot read them.
#include <algorithm>
#include <cfloat>
#include <climits>

#include "../common/request.cuh"
#include "../common/wgmma.cuh"
#include "barrier.cuh"
#include "tensor_map.h"

namespace sparsek::sm90 {
namespace {

constexpr int kEnd = -1;                 // in place of a request: there are no more tiles
constexpr int kSectionBytes = 40 << 20;  // of 50 or 60 MB of L2 cache
// In the time that a tile of 128 keys takes: what a tile takes beside its keys, and what adding
// pieces up takes, once and for each. (Fitted to times of 1 to 8 pieces.)
constexpr float kTileOverhead = 5, kJoinCost = 2, kPieceCost = 1;
// All of that takes as many times as long as the block has warpgroups, and this more.
constexpr float kTileCost = 2;
constexpr int kLeastPiece = 1024;  // keys
// That a thread's weights of a row in one key tile may add up to where the maximum is an old one;
// above, maxima are looked for. So fp16 holds each of them.
constexpr float kMostWeight = 32768;
// tanh(x) / x in powers of x^2, to 2e-6 of it for |x| < kNear (least squares, weighted until errors
// were even).
constexpr float kNear = 0.6f;
constexpr float kNearSeries[] = {0.99999784f, -0.33314028f, 0.13057821f, -0.04092931f};
constexpr float kUnseen = -FLT_MAX;  // the maximum of a row that has seen no key

// Of Config, by sparsek_vllm/build; 0 for what is best.
#ifndef SPARSEK_HOPPER_WARPGROUPS
#define SPARSEK_HOPPER_WARPGROUPS 0
#endif
#ifndef SPARSEK_HOPPER_STAGES
#define SPARSEK_HOPPER_STAGES 0
#endif

// How many warpgroups a block can have that compute; it has one, two, or the most. The one that
// widens fp8 takes another one's registers, and so do sums of longer rows.
constexpr int most_groups(int head_dim, bool fp8, bool softcap) {
  if (head_dim > 128 || (fp8 && head_dim > 64)) return 2;
  return head_dim == 128 || fp8 ? 3 : softcap ? 2 : 4;
}
// Keys of a tile, a multiple of 16, of fp8 of 32: as many as there are registers for.
constexpr int block_n(int head_dim, int groups, bool fp8) {
  return groups > 2 || (head_dim > 128 && fp8) ? 64 : head_dim > 128 ? 80 : 128;
}

enum Barrier : int { kTileTaken = 1, kFirstGroup = 2, kWidening = 6 };

template <typename KV, int kHeadDim_, int kGroups_>
struct Shape {
  static constexpr int kHeadDim = kHeadDim_, kGroups = kGroups_;
  static constexpr bool kFp8 = sizeof(KV) == 1;
  static constexpr int kBlockM = 64 * kGroups, kBlockN = block_n(kHeadDim, kGroups, kFp8);
  static constexpr int kLeastTiles = (kLeastPiece + kBlockN - 1) / kBlockN;  // of a piece
  static constexpr int kThreads = 128 * (kGroups + (kFp8 ? 2 : 1));
  static constexpr int kChunks = 2 * kHeadDim / kChunkBytes;
  // Of keys or values as they arrive.
  static constexpr int kRowBytes = sizeof(KV) * kHeadDim, kArrivingBytes = kRowBytes * kBlockN;
  static constexpr int kArrivingChunks = kRowBytes > kChunkBytes ? kRowBytes / kChunkBytes : 1;
  static constexpr int kBoxBytes = kRowBytes / kArrivingChunks;  // of a key or value in a box
  static constexpr int kBoxElements = kHeadDim / kArrivingChunks;
  // Of the place for a tile of values.
  static constexpr int kTileBytes = 2 * kHeadDim * kBlockN;
  // Places for queries. If there is one, those of a tile arrive when all of the one before have
  // been used.
  static constexpr int kQueryPlaces = kHeadDim > 128 ? 1 : 2;
  // Whether rows of the output leave by way of their queries' place. (Where they do not, the loop
  // over keys is compiled otherwise and is quicker. One or two warpgroups have few rows to write.)
  static constexpr bool kLeavesByPlace = kQueryPlaces > 1 && (kFp8 ? kHeadDim > 64 : kGroups > 2);
  // Tiles in flight; beside them are the queries, counts of tiles and the rest.
  static constexpr int kStagesThatFit =
      (kSharedBytes - 1024 - 4 * kThreads - kQueryPlaces * 2 * kHeadDim * kBlockM) /
      (kArrivingBytes + kTileBytes);
  static constexpr int kStagesAsked = SPARSEK_HOPPER_STAGES ? SPARSEK_HOPPER_STAGES : 6;
  static constexpr int kStages = kStagesAsked < kStagesThatFit ? kStagesAsked : kStagesThatFit;
  static constexpr int kLoaderRegisters = kThreads < 512 ? 40 : 32;
  static constexpr int kWideningRegisters = kFp8 ? 48 : 0;
  static constexpr int kComputeRegisters = kFp8           ? (kGroups == 3 ? 128 : 216)
                                           : kGroups == 4 ? 112
                                           : kGroups == 3 ? 160
                                                          : 232;
  // Those that a block is launched with: warpgroups that ask for more than others give wait
  // forever.
  static constexpr int kRegisters = 64 * 1024 / kThreads / 8 * 8;
  static_assert(128 * (kLoaderRegisters + kWideningRegisters + kGroups * kComputeRegisters) <=
                kThreads * kRegisters);
};

// Rows of queries and the keys that they need.
template <int kGroups>
struct Tile {
  Request request;  // its rows end where the tile's do; its index is kEnd behind the last tile
  int kv_head, row0;
  KeyRange keys;  // that any row sees
  // Without fp8: values of others can be NaN, which a weight of 0 does not cancel, and come in
  // boxes with those that the request's rows see.
  KeyRange usable;
  int key0;  // of the first key tile
  int key_tiles;
  struct Own {
    int before, count;         // key tiles that none of its rows sees, then those that any sees
    int clear_from, clear_to;  // and of these the ones that all rows see all of
  } own[kGroups];
  // Of all keys that the rows see, those above are one of so many pieces; `number` counts tiles
  // whose keys may be split, and `first_part` the places for results before it.
  int piece, pieces, number, first_part;
};

struct Split {
  int whole;      // the first so many tiles stay whole
  int row_parts;  // of each of the rest; or, if this is 1,
  int pieces;     // of its keys, if it has keys for them
  float cost;     // of the launch, in the time that 128 keys take a warpgroup
};

template <typename S>
struct Shared {
  char q[S::kQueryPlaces][S::kChunks * kChunkBytes * S::kBlockM];
  char k[S::kStages][S::kArrivingBytes], v[S::kStages][S::kTileBytes];
  uint64_t tile_full[2], q_full[2], q_empty[2];
  uint64_t k_full[S::kStages], k_empty[S::kStages], v_full[S::kStages], v_empty[S::kStages];
  uint64_t landed;                // values that are not ready for use
  uint64_t v_landed[S::kStages];  // fp8
  Tile<S::kGroups> tiles[2];      // whose rows are in q, or will be
  Tile<S::kGroups> found;         // the next one
  Split split;
  // Of a KV head, up to and with the requests that a thread has counted.
  int tiles_up_to[S::kThreads];
  int warp_sums[S::kThreads / 32];
};

struct PrefillParams {
  CUtensorMap k, v, q, out;
  AttentionParams attention;
  int box_keys;
  bool query_boxes;   // a tile of queries is a box of `q`
  bool output_boxes;  // and what a warp makes of its rows is one of `out`
  // What tiles are follows from parameters alone: the first can be found while the kernel before
  // ends.
  bool known_tiles;
  int section_heads;  // KV heads whose tiles go together
  int keys;           // that 64 rows need, by the longest request
  int most_parts;     // of split tiles, that the workspace has room for
  int own_tiles;      // one a block, its first; none if blocks begin at different times
  // A score x with softcap is cap * tanh(scale * x / cap): here times log2(e), and as factor of x
  // in a power of two; what a score is below that is near 0, and factors of its odd powers there.
  float softcap_log2e, softcap_rate, near_scores, near_series[4];
  int always_maxima;  // are looked for, in every key tile (an int, which the loop tests as it is)
};

// Place in a ring.
template <int kSize>
struct Place {
  int index = 0, phase = 0;
  __device__ void advance() {
    if (++index == kSize) index = 0, phase ^= 1;
  }
};

template <int kBlockM>
__device__ int tiles_of(const AttentionParams& p, int b) {
  const Request request(p, b);
  return request.is_decode(p) ? 0 : (request.rows + kBlockM - 1) / kBlockM;
}

template <int kThreads>
__device__ int requests_a_thread(const AttentionParams& p) {
  return (p.batch + kThreads - 1) / kThreads;
}

// What the warps of a block leave of a piece: of each thread its sums, two maxima and two sums of
// weights.
__host__ __device__ constexpr int part_floats(int warps, int head_dim) {
  return warps * 32 * (head_dim / 2 + 4);
}

// How so many tiles are best split. Those of full rounds, where each block has one, stay whole.
__host__ __device__ inline Split best_split(const PrefillParams& d, int tiles, int groups) {
  const int blocks = d.attention.multiprocessors;
  const int rounds = tiles / blocks, rest = tiles - rounds * blocks;
  const auto cost = [&](int row_parts, int pieces) {
    const int more = (row_parts * pieces * rest + blocks - 1) / blocks;
    const float keys = static_cast<float>((d.keys + pieces - 1) / pieces) / 128;
    return static_cast<float>(more * (kTileCost + groups / row_parts)) * (kTileOverhead + keys);
  };
  const float full = kTileCost + groups;
  const auto joining = [&](int pieces) { return full * (kJoinCost + pieces * kPieceCost); };
  Split best{rounds * blocks, 1, 1, cost(1, 1)};
  if (rest > 0 && !d.attention.batch_invariant) {
    for (int n = 2; n <= groups; ++n) {
      if (groups % n == 0 && cost(n, 1) < best.cost) best = {rounds * blocks, n, 1, cost(n, 1)};
    }
    for (int n = 2; n <= d.most_parts / rest && n * kLeastPiece <= d.keys; ++n) {
      if (full * kTileOverhead + joining(n) >= best.cost) break;
      const float own = cost(1, n) + joining(n);
      if (own < best.cost) best = {rounds * blocks, 1, n, own};
    }
  }
  best.cost += full * rounds * (kTileOverhead + static_cast<float>(d.keys) / 128);
  return best;
}

// All threads of the block count tiles together.
template <typename S>
__device__ void count_tiles(const AttentionParams& p, Shared<S>& shared) {
  int thread = threadIdx.x, own = 0;
  recompute(thread);  // not kept for later: registers are short
  const int each = requests_a_thread<S::kThreads>(p);
#pragma unroll 1
  for (int b = thread * each; b < min(p.batch, (thread + 1) * each); ++b)
    own += tiles_of<S::kBlockM>(p, b);
  const int inclusive = inclusive_sum(thread % 32, own), of_warp = __shfl_sync(~0u, inclusive, 31);
  shared.tiles_up_to[thread] =
      inclusive + sum_of_warps_before<S::kThreads>(thread, of_warp, shared.warp_sums);
  __syncthreads();
}

// The id-th tile or part of one. False if its tile has no such part.
template <typename S>
__device__ bool find_tile(const PrefillParams& d, const Shared<S>& shared, int id,
                          Tile<S::kGroups>& found) {
  constexpr int kBlockN = S::kBlockN;
  const AttentionParams& p = d.attention;
  const int* up_to = shared.tiles_up_to;
  const int total = up_to[S::kThreads - 1];
  found.request.index = kEnd;
  const int split_id = id - shared.split.whole;  // counts parts of tiles that are split
  found.piece = found.number = 0;
  int most = 1, part = 0, part_rows = S::kBlockM;
  if (split_id >= 0) {
    const int row_parts = shared.split.row_parts;
    most = shared.split.pieces;
    found.number = split_id / (most * row_parts);
    found.piece = split_id - found.number * (most * row_parts);
    id = shared.split.whole + found.number;
    if (row_parts > 1) {
      part = found.piece;
      part_rows /= row_parts;
      found.piece = found.number = 0;
    }
  }
  if (id >= total * p.kv_heads) return true;
  // Late tiles first: under a causal mask they are the heaviest, and the light ones at the end even
  // out.
  const int section = id / (total * d.section_heads);
  const int within = id - section * total * d.section_heads;
  const int tile = total - 1 - within / d.section_heads;
  found.kv_head = section * d.section_heads + within % d.section_heads;
  int thread = 0;
  for (int end = S::kThreads - 1; thread < end;) {
    const int middle = (thread + end) / 2;
    (up_to[middle] > tile ? end : thread) = up_to[middle] > tile ? middle : middle + 1;
  }
  int b = thread * requests_a_thread<S::kThreads>(p), before = thread ? up_to[thread - 1] : 0;
  for (int n; before + (n = tiles_of<S::kBlockM>(p, b)) <= tile; ++b) before += n;

  Request request(p, b);
  const int row0 = (tile - before) * S::kBlockM + part * part_rows;
  if (row0 >= request.rows) return false;
  found.usable = request.keys(p, 0, p.group_divisor(request.rows - 1));
  request.rows = min(request.rows, row0 + part_rows);
  const int first = p.group_divisor(row0), last = p.group_divisor(request.rows - 1);
  found.request = request;
  found.row0 = row0;
  KeyRange keys = request.keys(p, first, last);
  const auto key_tiles_to = [&](int key) { return (key - found.key0 + kBlockN - 1) / kBlockN; };
  found.key0 = request.tile_begin<kBlockN>(p, keys.begin);
  found.key_tiles = keys.begin < keys.end ? key_tiles_to(keys.end) : 0;
  if constexpr (!S::kFp8) {  // boxes begin where the tile does
    if ((found.usable.begin - found.key0) % d.box_keys == 0) found.usable.begin = INT_MIN;
    if ((found.usable.end - found.key0) % d.box_keys == 0) found.usable.end = INT_MAX;
  }
  found.first_part = found.number * most;
  found.pieces = max(1, min(most, found.key_tiles / S::kLeastTiles));
  if (found.piece >= found.pieces) return false;
  if (found.pieces > 1) {
    const int before = found.piece * found.key_tiles / found.pieces;
    const int up_to_own = (found.piece + 1) * found.key_tiles / found.pieces;
    keys = {max(keys.begin, found.key0 + before * kBlockN),
            min(keys.end, found.key0 + up_to_own * kBlockN)};
    found.key0 += before * kBlockN;
    found.key_tiles = up_to_own - before;
  }
  found.keys = keys;
#pragma unroll 1
  for (int group = 0; group < S::kGroups; ++group) {
    auto& own = found.own[group];
    const int own_row0 = row0 + 64 * group;
    own = {found.key_tiles, 0, 0, 0};
    if (own_row0 >= request.rows) continue;
    const int own_first = p.group_divisor(own_row0);
    const int own_last = p.group_divisor(min(own_row0 + 64, request.rows) - 1);
    const KeyRange all = request.keys(p, own_first, own_last);
    const KeyRange seen{max(all.begin, keys.begin), min(all.end, keys.end)};
    if (seen.begin >= seen.end) continue;
    own.before = found.key_tiles - key_tiles_to(seen.end);
    own.count = key_tiles_to(seen.end) - (seen.begin - found.key0) / kBlockN;
    const KeyRange common{request.keys(p, own_last).begin, request.keys(p, own_first).end};
    const int end = found.key0 + key_tiles_to(seen.end) * kBlockN;  // of the first tile
    own.clear_from = max(0, (end - common.end + kBlockN - 1) / kBlockN);
    own.clear_to = (end - max(common.begin, found.key0)) / kBlockN;
  }
  return true;
}

// A ring of tiles of keys or of values, and the warp that fills it.
template <typename S, bool kValues>
struct Loader {
  static constexpr int kBlockN = S::kBlockN;
  const PrefillParams& d;
  Shared<S>& shared;
  Place<S::kStages> place;
  int landed_phase = 0;

  __device__ Loader(const PrefillParams& d, Shared<S>& shared) : d(d), shared(shared) {}

  __device__ void load(const Tile<S::kGroups>& tile) {
    const AttentionParams& p = d.attention;
    const CUtensorMap* map = kValues ? &d.v : &d.k;
    const int lane = threadIdx.x % 32;
    // A lane brings one chunk of one box.
    const int chunk = lane % S::kArrivingChunks, row = lane / S::kArrivingChunks * d.box_keys;
    const int offset = (kValues ? S::kTileBytes - S::kArrivingBytes : 0) +
                       chunk * (kBlockN * kChunkBytes) + row * S::kBoxBytes;
    const KeyRange keys = tile.keys;
    // Boxes without a visible key lie outside of the tensor, whatever the block table says there.
    const auto look_up = [&](int key) -> KeyAddress {
      KeyAddress address;
      address.block = static_cast<int>(p.k.blocks);
      address.token = 0;
      if (row < kBlockN && key < keys.end && key + d.box_keys > keys.begin)
        address = KeyAddress(p, tile.request.index, key);
      return address;
    };
    int key0 = tile.key0 + (tile.key_tiles - 1) * kBlockN;
    KeyAddress next = look_up(key0 + row);
    for (int left = tile.key_tiles; left > 0; --left, key0 -= kBlockN) {
      const KeyAddress address = next;
      if (left > 1) next = look_up(key0 - kBlockN + row);
      const int stage = place.index;
      uint64_t* full = kValues ? &shared.v_full[stage] : &shared.k_full[stage];
      const KeyRange usable = tile.usable;
      const bool unusable =
          !S::kFp8 && kValues && (key0 < usable.begin || key0 + kBlockN > usable.end);
      mbarrier_wait(kValues ? &shared.v_empty[stage] : &shared.k_empty[stage], place.phase ^ 1);
      uint64_t* arrival = unusable ? &shared.landed : full;
      if (S::kFp8 && kValues) arrival = &shared.v_landed[stage];
      if (lane == 0) {
        mbarrier_arrive_expect(arrival, S::kArrivingBytes);
      } else if (kWarpArrivals > 1 && arrival == full) {
        mbarrier_arrive(full);
      }
      __syncwarp();
      if (row < kBlockN) {
        tensor_copy((kValues ? shared.v[stage] : shared.k[stage]) + offset, map, arrival,
                    chunk * S::kBoxElements, address.token, 0, tile.kv_head, address.block);
      }
      if (unusable) {
        mbarrier_wait(&shared.landed, landed_phase);
        landed_phase ^= 1;
        for (int r = lane / 8; r < kBlockN * S::kChunks; r += 4) {
          const int key = key0 + r % kBlockN;
          if (key >= usable.begin && key < usable.end) continue;
          *reinterpret_cast<uint4*>(shared.v[stage] + r * kChunkBytes + lane % 8 * 16) = uint4{};
        }
        fence_for_async();
        warp_arrive(full);
      }
      place.advance();
    }
  }

  // All tiles of the block.
  __device__ void run() {
    if (d.known_tiles) wait_for_previous_kernel();
    for (Place<2> tiles;; tiles.advance()) {
      mbarrier_wait(&shared.tile_full[tiles.index], tiles.phase);
      const Tile<S::kGroups>& tile = shared.tiles[tiles.index];
      if (tile.request.index == kEnd) return;
      load(tile);
      warp_arrive(&shared.q_empty[tiles.index]);
    }
  }
};

// Worked out again at each use: registers are short.
[[maybe_unused]] __device__ inline int own_lane() {
  int thread = threadIdx.x;
  recompute(thread);
  return thread % 32;
}

// A warp's rows of fp8 values: from the second half of a place, fp16 to all of it. Those of keys
// outside of `seen`, counted from the place's first, become zeros.
template <typename S>
__device__ void widen(char* place, int warp, KeyRange seen) {
  constexpr int kBlockN = S::kBlockN, kRowsOfWarp = kBlockN / 4;
  constexpr int kPieces = S::kRowBytes / 16, kRows = 32 / kPieces;    // of a load
  constexpr int kAtOnce = S::kChunks == 1 ? kRowsOfWarp / kRows : 2;  // loads in flight
  // The swizzle repeats after eight rows: of more than that, only these count.
  const auto in_swizzle = [](int row0, int row) { return kAtOnce * kRows % 8 ? row0 + row : row; };
  const int lane = own_lane(), piece = lane % kPieces;
  const char* source =
      place + (S::kTileBytes - S::kArrivingBytes) + piece / 8 * (kBlockN * kChunkBytes);
  // 16 elements become two pieces. Half of the lanes begin with the second, so that no two write to
  // the same banks.
  const int chunk = piece / 4, first = 2 * (piece % 4) + (kPieces >= 8 ? chunk % 2 : 0);
  const bool swap = first % 2, partial = seen.begin > 0 || seen.end < kBlockN;
#pragma unroll 1
  for (int row0 = warp * kRowsOfWarp; row0 < (warp + 1) * kRowsOfWarp; row0 += kAtOnce * kRows) {
    uint4 bytes[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = lane / kPieces + i * kRows;
      const uint32_t offset = tile_offset<S::kBoxBytes>(in_swizzle(row0, row), piece % 8);
      const int before = kAtOnce * kRows % 8 ? 0 : row0 * S::kBoxBytes;
      bytes[i] = *reinterpret_cast<const uint4*>(source + before + offset);
      if (partial && (row0 + row < seen.begin || row0 + row >= seen.end)) bytes[i] = uint4{};
    }
    // Where a place is one chunk, rows that are written lie over other rows that are read.
    if constexpr (S::kChunks == 1) {
      static_assert(kRowsOfWarp == kAtOnce * kRows);
      barrier_sync<128>(kWidening);
    } else {
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = lane / kPieces + i * kRows;
      const unsigned swizzle = static_cast<unsigned>(in_swizzle(row0, row)) % 8;
      char* target = place + (chunk * kBlockN + row0 + row) * kChunkBytes;
      const auto put = [&](int index, uint32_t low, uint32_t high) {
        uint4 wide;
        widen_fp8(low, wide.x, wide.y);
        widen_fp8(high, wide.z, wide.w);
        *reinterpret_cast<uint4*>(target + ((index ^ swizzle) << 4)) = wide;
      };
      put(first, swap ? bytes[i].z : bytes[i].x, swap ? bytes[i].w : bytes[i].y);
      put(first ^ 1, swap ? bytes[i].x : bytes[i].z, swap ? bytes[i].y : bytes[i].w);
    }
  }
  fence_for_async();
}

// The warpgroup that does so with all tiles of the block.
template <typename S>
__device__ void widen_all(Shared<S>& shared) {
  constexpr int kBlockN = S::kBlockN;
  const int warp = threadIdx.x % 128 / 32;
  Place<S::kStages> place;
  for (Place<2> tiles;; tiles.advance()) {
    mbarrier_wait(&shared.tile_full[tiles.index], tiles.phase);
    const Tile<S::kGroups>& tile = shared.tiles[tiles.index];
    if (tile.request.index == kEnd) return;
    const KeyRange keys = tile.keys;
    int key0 = tile.key0 + (tile.key_tiles - 1) * kBlockN;
    for (int left = tile.key_tiles; left > 0; --left, key0 -= kBlockN, place.advance()) {
      mbarrier_wait(&shared.v_landed[place.index], place.phase);
      widen<S>(shared.v[place.index], warp, {keys.begin - key0, keys.end - key0});
      warp_arrive(&shared.v_full[place.index]);
    }
    warp_arrive(&shared.q_empty[tiles.index]);
  }
}

// The two warps that take tiles and bring their queries; one, where those are boxes.
template <typename T, typename S>
__device__ void load_queries(const PrefillParams& d, Shared<S>& shared, int thread) {
  constexpr int kPieces = S::kChunks * kChunkBytes / 16;  // a row
  const AttentionParams& p = d.attention;
  if (d.query_boxes && thread >= 32) return;
  const auto next_id = [&] { return d.own_tiles + atomicAdd(p.tile_counters, 1); };
  int id = blockIdx.x;
  if (thread == 0 && d.own_tiles == 0) id = next_id();
  if (thread == 0)
    shared.split = best_split(d, shared.tiles_up_to[S::kThreads - 1] * p.kv_heads, S::kGroups);
  bool waits = d.known_tiles;
  for (Place<2> tiles;; tiles.advance()) {
    Tile<S::kGroups>& tile = shared.tiles[tiles.index];
    if (thread < 32) {
      // Found before its place is free.
      while (thread == 0 && !find_tile(d, shared, id, shared.found)) {
        if (waits) wait_for_previous_kernel();  // which may still use the counter
        id = next_id();
      }
      __syncwarp();
      mbarrier_wait(&shared.q_empty[tiles.index], tiles.phase ^ 1);
      constexpr int kWords = sizeof(tile) / sizeof(int);
#pragma unroll 1
      for (int i = thread; i < kWords; i += 32)
        reinterpret_cast<int*>(&tile)[i] = reinterpret_cast<const int*>(&shared.found)[i];
      warp_arrive(&shared.tile_full[tiles.index]);
      if (waits) wait_for_previous_kernel();
      waits = false;
      if (thread == 0 && shared.found.request.index != kEnd) id = next_id();
      // The tile before has the other entry, of the phase before if that is the second.
      if (S::kQueryPlaces == 1)
        mbarrier_wait(&shared.q_empty[tiles.index ^ 1], tiles.phase ^ tiles.index ^ 1);
    }
    if (!d.query_boxes) barrier_sync<64>(kTileTaken);
    const bool end = tile.request.index == kEnd;
    if (d.query_boxes && !end) {
      uint64_t* full = &shared.q_full[tiles.index];
      if (thread == 0) {
        mbarrier_arrive_expect(full, sizeof(shared.q[0]));
        tensor_copy(shared.q[tiles.index % S::kQueryPlaces], &d.q, full, 0, 0,
                    tile.request.q_begin + p.group_divisor(tile.row0), 0, tile.kv_head);
      } else if (kWarpArrivals > 1) {
        mbarrier_arrive(full);
      }
      continue;
    }
    const int q_begin = tile.request.q_begin, rows = tile.request.rows, row0 = tile.row0;
    const int first_head = tile.kv_head * p.group;
    if (!end) {
      const uint32_t q = shared_address(shared.q[tiles.index % S::kQueryPlaces]);
      int first = thread;
      recompute(first);  // registers are short
#pragma unroll 2
      for (int i = first; i < S::kBlockM * kPieces; i += 64) {
        const int row = i / kPieces, piece = i % kPieces, r = min(row0 + row, rows - 1);
        const int query = p.group_divisor(r), head = first_head + r - query * p.group;
        const T* source = static_cast<const T*>(p.q) +
                          (int64_t{q_begin} + query) * p.q_stride_token + head * p.q_stride_head +
                          8 * piece;
        copy_async_16(q + (piece / 8 * S::kBlockM + row) * kChunkBytes + ((piece ^ row) % 8 << 4),
                      source, 8 * piece < p.head_dim);
      }
      copy_async_commit();
      copy_async_wait<0>();
      fence_for_async();
    }
    warp_arrive(&shared.q_full[tiles.index]);
    if (end) break;
  }
  // The last block leaves the counters as it found them.
  if (thread == 0 && atomicAdd(p.tile_counters + 1, 1) == static_cast<int>(gridDim.x) - 1)
    p.tile_counters[0] = p.tile_counters[1] = 0;
}

// Element i of lane l % 4 = j becomes element j of lane l % 4 = i, among four neighbours.
__device__ inline void transpose_quads(uint32_t (&x)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? x[i] : x[i | step], step);
      (upper ? x[i] : x[i | step]) = other;
    }
  }
}

// Queries of 16 bits in their place as two terms of fp8, the second what the first leaves, by the
// warpgroup whose rows they are: of a row all of the first term, then all of the second. The
// factors are those of the scores of rows lane / 4 and 8 below it, of the warp's 16.
template <typename T, typename S>
__device__ void split_queries(char* q, int warp_row, float (&factors)[2]) {
  constexpr int kPieces = S::kChunks * kChunkBytes / 16, kRows = 32 / kPieces;
  const int lane = own_lane(), piece = lane % kPieces;
#pragma unroll 1
  for (int row0 = 0; row0 < 16; row0 += kRows) {
    const int row = warp_row + row0 + lane / kPieces;
    const auto at = [&](int byte) {
      return q + (byte / kChunkBytes * S::kBlockM + row) * kChunkBytes +
             ((byte / 16 ^ row) % 8 << 4) + byte % 16;
    };
    const uint4 pairs = *reinterpret_cast<const uint4*>(at(16 * piece));
    float x[8];
    to_floats<T>(pairs.x, x[0], x[1]);
    to_floats<T>(pairs.y, x[2], x[3]);
    to_floats<T>(pairs.z, x[4], x[5]);
    to_floats<T>(pairs.w, x[6], x[7]);
    int largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = largest_of(largest, x[i]);
#pragma unroll
    for (int step = 1; step < kPieces; step *= 2)
      largest = max(largest, __shfl_xor_sync(~0u, largest, step));
    const PowerOfTwo<7> power(largest);  // fp8 ends at 448
    uint32_t terms[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t first = 0, second = 0;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float low = x[4 * i + 2 * j] * power.up, high = x[4 * i + 2 * j + 1] * power.up;
        // Infinities become NaN here, which fp8 has.
        low = fmaf(low, 0.0f, low), high = fmaf(high, 0.0f, high);
        const uint32_t pair = narrow_to_fp8(low, high);
        uint32_t wide, none;
        widen_fp8(pair, wide, none);
        float low_term, high_term;
        to_floats<__half>(wide, low_term, high_term);
        first |= pair << 16 * j;
        second |= uint32_t{narrow_to_fp8(low - low_term, high - high_term)} << 16 * j;
      }
      terms[0][i] = first, terms[1][i] = second;
    }
    __syncwarp();  // all of the rows has been read
#pragma unroll
    for (int term = 0; term < 2; ++term)
      *reinterpret_cast<uint2*>(at(term * S::kHeadDim + 8 * piece)) = {terms[term][0],
                                                                       terms[term][1]};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = lane / 4 + 8 * h - row0;
      const float factor = __shfl_sync(~0u, power.down, max(0, min(own, kRows - 1)) * kPieces);
      if (own >= 0 && own < kRows) factors[h] = factor;
    }
  }
}

// What a warp, and those in its place in other blocks, leave of the pieces of a tile, in the
// workspace.
template <int kWarps, int kHeadDim>
struct Parts {
  static constexpr int kSums = kHeadDim / 8, kPart = part_floats(kWarps, kHeadDim) / 4;  // float4s
  static_assert(kWarps <= kWorkspaceCounters);
  float4* first;
  int pieces;

  __device__ Parts(const AttentionParams& p, int64_t first_part, int pieces, int warp)
      : first(reinterpret_cast<float4*>(p.partials) + first_part * kPart +
              warp * ((kSums + 1) * 32) + threadIdx.x % 32),
        pieces(pieces) {}

  // A thread's sums over one piece of the keys, and of its two rows the maxima and the sums of
  // weights. The warp that is the last of the pieces to come here gets the last two over all of
  // them, and true.
  __device__ bool leave(int piece, int* counter, const float (&out)[kHeadDim / 2], float (&peak)[2],
                        float (&sum)[2]) const {
    float4* own = first + piece * kPart;
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      own[32 * i] = {out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]};
    own[32 * kSums] = {peak[0], peak[1], sum[0], sum[1]};
    __syncwarp();
    int last = 0;
    if (threadIdx.x % 32 == 0) {
      last = add_acquire_release(counter, 1) == pieces - 1;
      if (last) *counter = 0;
    }
    __syncwarp();
    if (!__shfl_sync(~0u, last, 0)) return false;
    peak[0] = peak[1] = -INFINITY;
#pragma unroll 8
    for (int k = 0; k < pieces; ++k) {
      const float4 state = __ldcg(first + k * kPart + 32 * kSums);
      peak[0] = fmaxf(peak[0], state.x), peak[1] = fmaxf(peak[1], state.y);
    }
    sum[0] = sum[1] = 0;
#pragma unroll 8
    for (int k = 0; k < pieces; ++k) {
      const float4 state = __ldcg(first + k * kPart + 32 * kSums);
      sum[0] += exp2_approx(state.x - peak[0]) * state.z;
      sum[1] += exp2_approx(state.y - peak[1]) * state.w;
    }
    return true;
  }

  // Of a thread's sums, taken in fours, fours i to i + 3 over all pieces, in their order.
  __device__ void add_up(int i, const float (&peak)[2], float4 (&total)[4]) const {
#pragma unroll(kHeadDim > 128 ? 8 : 4)  // as many loads in flight as there are registers for
    for (int k = 0; k < pieces; ++k) {
      const float4* part = first + k * kPart;
      const float4 state = __ldcg(part + 32 * kSums);
      const float factor[2] = {exp2_approx(state.x - peak[0]), exp2_approx(state.y - peak[1])};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 four = __ldcg(part + 32 * (i + j));
        total[j].x += factor[0] * four.x, total[j].y += factor[0] * four.y;
        total[j].z += factor[1] * four.z, total[j].w += factor[1] * four.w;
      }
    }
  }
};

template <typename T, typename KV, int kHeadDim, bool kSoftcap, int kGroups>
__device__ void compute(const PrefillParams& d, Shared<Shape<KV, kHeadDim, kGroups>>& shared,
                        int group) {
  using S = Shape<KV, kHeadDim, kGroups>;
  using M = Operand<T, KV>;                      // of weights and values
  using Q = std::conditional_t<S::kFp8, KV, T>;  // of queries and keys
  constexpr int kBlockN = S::kBlockN, kKeySteps = kBlockN / 16;
  constexpr int kSteps = kHeadDim / 16;  // of 32 bytes of queries; over fp8 keys are used twice
  const AttentionParams& p = d.attention;
  // Where there are no registers for another way.
  constexpr bool kAlwaysMaxima = kSoftcap || kHeadDim > 128;
  const int group_row = 64 * group;
  // Worked out again where they are needed: registers are short.
  const auto thread_of_group = [] {
    int thread = threadIdx.x;
    recompute(thread);
    return thread % 128;
  };
  // The first of a thread's two rows among those of the tile.
  const auto own_row = [&] {
    const int thread = thread_of_group();
    return group_row + thread / 32 * 16 + thread % 32 / 4;
  };

  Place<2> q_place;
  Place<S::kStages> k_place, v_place;
  float out[kHeadDim / 2];
  // Of one product: ptxas wants registers for all of them in those that a block is launched with.
  constexpr int kSumsAtOnce = kHeadDim > 128 && S::kFp8 ? 64 : kHeadDim / 2;
  float scores[kBlockN / 2];
  uint32_t weights[kKeySteps][4];
  float row_max[2] = {}, row_sum[2] = {}, factor[2];  // maxima as powers of two
  float score_factor[2] = {1, 1};
  const auto scale_log2e = [&](int h) {
    return S::kFp8 ? usable_scale(p.scale_log2e * score_factor[h]) : p.scale_log2e;
  };

  const auto own_queries = [&] {
    return shared.q[q_place.index % S::kQueryPlaces] + group_row * kChunkBytes;
  };
  // Sums of products of fp8 lose up to 2^-9 of what they have come to: the small terms come first.
  const auto nth_step = [](int i) { return S::kFp8 ? (i + kSteps / 2) % kSteps : i; };
  const auto issue_scores = [&] {
    const uint64_t q = matrix_descriptor(shared_address(own_queries()));
    const uint64_t k = matrix_descriptor<S::kBoxBytes>(shared_address(shared.k[k_place.index]));
    const auto offset = [](int byte, int rows) {
      return byte / kChunkBytes * (rows * kChunkBytes) + byte % kChunkBytes;
    };
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = nth_step(i);
      wgmma_scores<Q>(scores, at_offset(q, offset(32 * step, S::kBlockM)),
                      at_offset(k, offset(32 * step % S::kRowBytes, kBlockN)), i > 0);
    }
    wgmma_commit();
  };
  const auto issue_values = [&] {
    const uint64_t v =
        matrix_descriptor(shared_address(shared.v[v_place.index]), kBlockN * kChunkBytes);
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
      for (int part = 0; part < kHeadDim / 2; part += kSumsAtOnce) {
        // 64 columns, 32 sums of a thread, are a chunk.
        wgmma_values<M>(reinterpret_cast<float (&)[kSumsAtOnce]>(out[part]), weights[step],
                        at_offset(v, (part / 32 * kBlockN + step * 16) * kChunkBytes));
      }
    }
    wgmma_commit();
  };
  // With softcap, tanh as 1 - 2 / (1 + exp(2x)): tanh.approx is too coarse. It grows with the
  // score, so maxima are looked for before.
  const auto capped = [&](float score) {
    const float share = reciprocal_approx(1 + exp2_approx(score * d.softcap_rate));
    return fmaf(-2 * d.softcap_log2e, share, d.softcap_log2e);
  };
  // The warp's scores of the last key tile once more; by mma.sync, since other warps may not need
  // them. Neither these keys nor the queries have been released.
  const auto multiply_again = [&] {
    const char *q = own_queries(), *k = shared.k[k_place.index];
    const int thread = thread_of_group(), lane = thread % 32;
    const int q_row = thread / 32 * 16 + lane % 16, k_row = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) scores[i] = 0;
#pragma unroll 1
    for (int nth = 0; nth < kSteps; ++nth) {
      const int step = nth_step(nth), k_step = 32 * step % S::kRowBytes / 32;
      const auto at = [](const char* from, int rows, int step, uint32_t within) {
        return shared_address(from + step / 4 * (rows * kChunkBytes)) + within;
      };
      const uint32_t k_of_step =
          at(k, kBlockN, k_step, tile_offset<S::kBoxBytes>(k_row, k_step % 4 * 2 + lane / 8 % 2));
      uint32_t a[4];
      load_matrices(
          a, at(q, S::kBlockM, step, tile_offset<kChunkBytes>(q_row, step % 4 * 2 + lane / 16)));
#pragma unroll
      for (int i = 0; i < kKeySteps; ++i) {
        uint32_t b[4];
        load_matrices(b, k_of_step + 16 * i * S::kBoxBytes);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float* of_keys = &scores[8 * i + 4 * j];
          float sums[4] = {of_keys[0], of_keys[1], of_keys[2], of_keys[3]};
          mma<Q>(sums, a, b[2 * j], b[2 * j + 1]);
#pragma unroll
          for (int n = 0; n < 4; ++n) of_keys[n] = sums[n];
        }
      }
    }
  };
  const auto mask_scores = [&](const Tile<kGroups>& tile, int key0) {
    const Request& request = tile.request;
    const int first_row = tile.row0 + own_row(), column = 2 * (thread_of_group() % 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + 8 * h;
      const KeyRange visible = request.keys(p, p.group_divisor(min(row, request.rows - 1)));
#pragma unroll
      for (int i = 0; i < kBlockN / 4; ++i) {
        const int key = key0 + i / 2 * 8 + column + i % 2;
        // By selection: adding -inf would keep a NaN.
        if (key < visible.begin || key >= visible.end)
          scores[i / 2 * 4 + 2 * h + i % 2] = -INFINITY;
      }
    }
  };
  // Where all scores of a warp are near 0 (-inf is not): one special function a weight, not three.
  const auto capped_near = [&](float score, float less) {
    const float square = score * score;
    float series = d.near_series[3];
#pragma unroll
    for (int i = 2; i >= 0; --i) series = fmaf(series, square, d.near_series[i]);
    return fmaf(score, series, -less);
  };
  const auto are_near = [&] {
    if (kHeadDim > 128 && kGroups == 1) return false;  // there are no registers for two ways
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) largest = fmaxf(largest, fabsf(scores[i]));
    return !__any_sync(~0u, !(largest < d.near_scores));
  };
  // Rows' maxima, if scores exceed one of the warp's by more than the slack; then true, and
  // `factor` is for the sums so far.
  const auto find_maxima = [&] {
    float peaks[4] = {scores[0], scores[1], scores[2], scores[3]};  // as many in flight
#pragma unroll
    for (int i = 4; i < kBlockN / 2; ++i) peaks[i % 4] = fmaxf(peaks[i % 4], scores[i]);
    float peak[2] = {fmaxf(peaks[0], peaks[1]), fmaxf(peaks[2], peaks[3])};
#pragma unroll
    for (int h = 0; h < 2; ++h) peak[h] = kSoftcap ? capped(peak[h]) : peak[h] * scale_log2e(h);
    const bool grown =
        peak[0] - row_max[0] > p.rescale_slack || peak[1] - row_max[1] > p.rescale_slack;
    if (!__any_sync(~0u, grown)) return false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x = fmaxf(peak[h], row_max[h]);
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
      factor[h] = exp2_approx(row_max[h] - x);
      row_max[h] = x;
      row_sum[h] *= factor[h];
    }
    return true;
  };
  // Scores become weights, in place, with the sum of each of the two rows.
  const auto weigh = [&](float (&sums)[2], const auto& weight) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < kBlockN / 4; ++i) {
        float& score = scores[i / 2 * 4 + 2 * h + i % 2];
        score = weight(score, h);
        sums[h] = i > 0 ? sums[h] + score : score;
      }
    }
  };
  const auto exponentials = [&](float (&sums)[2]) {
    if (!kSoftcap) {
      weigh(sums, [&](float score, int h) {
        return exp2_approx(fmaf(score, scale_log2e(h), -row_max[h]));
      });
    } else if (are_near()) {
      weigh(sums, [&](float score, int h) { return exp2_approx(capped_near(score, row_max[h])); });
    } else {
      weigh(sums, [&](float score, int h) {
        return score == -INFINITY ? 0.0f : exp2_approx(capped(score) - row_max[h]);
      });
    }
  };
  // Returns whether `factor` is for the sums so far.
  const auto softmax = [&](bool with_maxima) {
    bool rescale = false;
    for (;;) {
      if (with_maxima) rescale = find_maxima();
      float sums[2];
      exponentials(sums);
      // (A NaN is not: rows behind the request's last may have it, and must not make others do so.)
      const bool large = sums[0] > kMostWeight || sums[1] > kMostWeight;
      if (with_maxima || !__any_sync(~0u, large)) {
        row_sum[0] += sums[0], row_sum[1] += sums[1];
        return rescale;
      }
      multiply_again();
      with_maxima = true;
    }
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        weights[step][j] = pack<M>(scores[8 * step + 2 * j], scores[8 * step + 2 * j + 1]);
    }
  };

  // A key tile that no row of the warpgroup sees.
  const auto skip_key_tile = [&] {
    mbarrier_wait(&shared.k_full[k_place.index], k_place.phase);
    warp_arrive(&shared.k_empty[k_place.index]);
    k_place.advance();
    mbarrier_wait(&shared.v_full[v_place.index], v_place.phase);
    warp_arrive(&shared.v_empty[v_place.index]);
    v_place = k_place;
  };

  // Rows that leave by way of their queries' place: that is free once they have been read from it.
  bool leaving = false;
  const auto release_queries = [&] {
    if (!S::kLeavesByPlace || !leaving) return;
    if (thread_of_group() % 32 == 0) tensor_store_wait_read();
    warp_arrive(&shared.q_empty[q_place.index ^ 1]);
    leaving = false;
  };
  for (;; q_place.advance()) {
    mbarrier_wait(&shared.q_full[q_place.index], q_place.phase);
    const Tile<kGroups>& tile = shared.tiles[q_place.index];
    if (tile.request.index == kEnd) break;
    if constexpr (S::kFp8) {
      split_queries<T, S>(own_queries(), thread_of_group() / 32 * 16, score_factor);
      fence_for_async();
      int thread = threadIdx.x;
      recompute(thread);
      barrier_sync<128>(kFirstGroup - 1 + thread / 128);  // warpgroup 0 loads
      const float k_scale = scale_of(p.k_scale, p.k_scale_stride, tile.kv_head);
#pragma unroll
      for (int h = 0; h < 2; ++h) score_factor[h] *= k_scale;
    }
    const int before = tile.own[group].before, count = tile.own[group].count;
    const int after = tile.key_tiles - before - count;
#pragma unroll
    for (int j = 0; j < kHeadDim / 2; ++j) out[j] = 0;
    const int tile_row = tile.row0 + own_row();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Rows behind the tile's last are of others, and must not make a warp rescale.
      const int row = tile_row + 8 * h;
      row_max[h] = row < tile.request.rows ? kUnseen : INFINITY;
      row_sum[h] = 0;
    }
#pragma unroll 1
    for (int i = 0; i < before; ++i) skip_key_tile();
    const int clear_from = tile.own[group].clear_from, clear_to = tile.own[group].clear_to;
    const auto mask_if_needed = [&](int i) {
      if (i >= clear_from && i < clear_to) return false;
      mask_scores(tile, tile.key0 + (after + count - 1 - i) * kBlockN);
      return true;
    };
    if (count > 0) {
      mbarrier_wait(&shared.k_full[k_place.index], k_place.phase);
      wgmma_fence();
      issue_scores();
      wgmma_wait<0>();
      after_wait(scores);
      warp_arrive(&shared.k_empty[k_place.index]);
      mask_if_needed(0);
      softmax(true);
      pack_weights();
    }
    release_queries();
    if (S::kLeavesByPlace || count > 0) {  // ptxas makes other code of the loop than without this
#pragma unroll 1
      for (int i = 1; i < count; ++i) {
        k_place.advance();
        mbarrier_wait(&shared.k_full[k_place.index], k_place.phase);
        wgmma_fence();
        issue_scores();
        mbarrier_wait(&shared.v_full[v_place.index], v_place.phase);
        wgmma_fence();
        issue_values();
        wgmma_wait<1>();
        after_wait(scores);
        if (kAlwaysMaxima) warp_arrive(&shared.k_empty[k_place.index]);
        const bool masked = mask_if_needed(i);
        const bool rescale = softmax(masked || kAlwaysMaxima || d.always_maxima);
        if (kAlwaysMaxima) {
          before_wait(row_sum[0] + row_sum[1]);  // else the vote on the sums does that
        } else {
          warp_arrive(&shared.k_empty[k_place.index]);
        }
        wgmma_wait<0>();
        after_wait(out);
        warp_arrive(&shared.v_empty[v_place.index]);
        v_place = k_place;
        if (rescale) {
#pragma unroll
          for (int j = 0; j < kHeadDim / 2; ++j) out[j] *= factor[j / 2 % 2];
        }
        pack_weights();
      }
    }
    const int rows = tile.request.rows, q_begin = tile.request.q_begin, kv_head = tile.kv_head;
    const int first_row = tile.row0 + own_row(), lane = thread_of_group() % 32;
    const int piece = tile.piece, pieces = tile.pieces;
    const int number = tile.number, first_part = tile.first_part;
    leaving =
        S::kLeavesByPlace && d.output_boxes && pieces == 1 && tile.row0 + group_row + 64 <= rows;
    if (!leaving) warp_arrive(&shared.q_empty[q_place.index]);
    if (count > 0) {
      mbarrier_wait(&shared.v_full[v_place.index], v_place.phase);
      wgmma_fence();
      issue_values();
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 1);
      row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 2);
    }
    // A query of the tile's and its head, of row h of a lane's two.
    const auto query_of = [&](int h, int& head) {
      const int row = min(first_row + 8 * h, rows - 1), query = p.group_divisor(row);
      head = kv_head * p.group + row - query * p.group;
      return int64_t{q_begin} + query;
    };
    float row_factor[2];
    const auto finish_rows = [&] {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int head;
        const int64_t token = query_of(h, head);
        const RowState state = finish_row(p, kLn2 * row_max[h], row_sum[h], head);
        row_factor[h] = state.factor;
        if (p.lse && lane % 4 == 0 && first_row + 8 * h < rows)
          p.lse[head * p.lse_stride_head + token] = state.lse;
      }
    };
    // Under the last product. (With softcap registers are short.)
    const bool early = !kSoftcap && pieces == 1;
    if (early) finish_rows();
    wgmma_wait<0>();
    after_wait(out);
    if (count > 0) {
      warp_arrive(&shared.v_empty[v_place.index]);
      k_place.advance();
      v_place = k_place;
    }
#pragma unroll 1
    for (int i = 0; i < after; ++i) skip_key_tile();

    const int warp = 4 * group + thread_of_group() / 32;
    const Parts<4 * kGroups, kHeadDim> parts(p, first_part, pieces, warp);
    if (pieces > 1 &&
        !parts.leave(piece, p.arrivals + number * 4 * kGroups + warp, out, row_max, row_sum))
      continue;
    if (!early) finish_rows();
    if (leaving) {
      const int thread = thread_of_group(), warp_row = thread / 32 * 16;
      char* place = own_queries() + warp_row * kChunkBytes;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; i += 2) {
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* two = &out[4 * (i + j / 2) + j % 2 * 2];
          pairs[j] = pack<T>(two[0] * row_factor[j % 2], two[1] * row_factor[j % 2]);
        }
        store_matrices(shared_address(place + i / 8 * (S::kBlockM * kChunkBytes)) +
                           tile_offset<kChunkBytes>(thread % 16, i % 8 + thread % 32 / 16),
                       pairs);
      }
      fence_for_async();
      __syncwarp();
      if (thread % 32 == 0) {
        const int token = q_begin + p.group_divisor(first_row);
#pragma unroll
        for (int chunk = 0; chunk < S::kChunks; ++chunk)
          tensor_store(&d.out, place + chunk * (S::kBlockM * kChunkBytes), 0, 0, token, chunk,
                       kv_head);
        tensor_store_commit();
      }
      continue;
    }
    T* destination[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int head;
      const int64_t token = query_of(h, head);
      destination[h] = static_cast<T*>(p.out) + token * p.out_stride_token +
                       head * p.out_stride_head + 8 * (lane % 4);
    }
    const auto write = [&](int i, const float4(&sums)[4]) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float x = h ? sums[j].z : sums[j].x, y = h ? sums[j].w : sums[j].y;
          pairs[j] = pack<T>(x * row_factor[h], y * row_factor[h]);
        }
        transpose_quads(pairs);
        if (first_row + 8 * h < rows && 8 * (i + thread_of_group() % 4) < p.head_dim)
          *reinterpret_cast<uint4*>(destination[h] + 8 * i) = {pairs[0], pairs[1], pairs[2],
                                                               pairs[3]};
      }
    };
    if (pieces == 1) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; i += 4) {
        float4 sums[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* four = &out[4 * (i + j)];
          sums[j] = {four[0], four[1], four[2], four[3]};
        }
        write(i, sums);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kHeadDim / 8; i += 4) {
        float4 sums[4] = {};
        parts.add_up(i, row_max, sums);
        write(i, sums);
      }
    }
  }
  if (S::kLeavesByPlace && thread_of_group() % 32 == 0) tensor_store_wait();
}

template <typename T, typename KV, int kHeadDim, bool kSoftcap, int kGroups>
__global__ void __launch_bounds__(Shape<KV, kHeadDim, kGroups>::kThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillParams d) {
  using S = Shape<KV, kHeadDim, kGroups>;
  extern __shared__ __align__(1024) char dynamic[];
  auto& shared = *reinterpret_cast<Shared<S>*>(dynamic);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&d.k);
    prefetch_tensor_map(&d.v);
    if (d.query_boxes) prefetch_tensor_map(&d.q);
    if (d.output_boxes) prefetch_tensor_map(&d.out);
    constexpr int kWarps = 4 * kGroups;  // that compute
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&shared.tile_full[i], kWarpArrivals);
      // Of the warps that bring queries.
      mbarrier_init(&shared.q_full[i], (d.query_boxes ? 1 : 2) * kWarpArrivals);
      // And those of keys and values, and those that widen them.
      mbarrier_init(&shared.q_empty[i], (kWarps + 2 + (S::kFp8 ? 4 : 0)) * kWarpArrivals);
    }
    for (int i = 0; i < S::kStages; ++i) {
      mbarrier_init(&shared.k_full[i], kWarpArrivals);
      mbarrier_init(&shared.k_empty[i], kWarps * kWarpArrivals);
      mbarrier_init(&shared.v_full[i], (S::kFp8 ? 4 : 1) * kWarpArrivals);
      mbarrier_init(&shared.v_empty[i], kWarps * kWarpArrivals);
      mbarrier_init(&shared.v_landed[i], 1);
    }
    mbarrier_init(&shared.landed, 1);
    mbarrier_fence_init();
  }
  if (threadIdx.x / 32 == 1) prefetch_tables(d.attention, static_cast<int>(threadIdx.x) % 32);
  // Decode, if that is the kernel before, has waited for all that both read.
  const bool beside_decode = d.attention.keys_a_pair > 0;
  if (beside_decode) {
    acquire_writes();
  } else if (!d.known_tiles) {
    wait_for_previous_kernel();
  }
  allow_next_kernel();
  count_tiles(d.attention, shared);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    give_registers_back<S::kLoaderRegisters>();
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp == 0) {
      Loader<S, false>(d, shared).run();
    } else if (warp == 1) {
      Loader<S, true>(d, shared).run();
    } else {
      load_queries<T>(d, shared, threadIdx.x - 64);
    }
  } else if (S::kFp8 && warpgroup == S::kGroups + 1) {
    if constexpr (S::kFp8) {
      give_registers_back<S::kWideningRegisters>();
      widen_all(shared);
    }
  } else {
    take_registers<S::kComputeRegisters>();
    int group = warpgroup - 1;
    if (kSoftcap || (S::kFp8 && kHeadDim > 128)) {  // worked out again: registers are short
      int thread = threadIdx.x;
      recompute(thread);
      group = kGroups == 1 ? 0 : __shfl_sync(~0u, thread / 128 - 1, 0);
    }
    compute<T, KV, kHeadDim, kSoftcap, kGroups>(d, shared, group);
  }
  // Whoever waits for this kernel waits for decode.
  if (beside_decode) wait_for_previous_kernel();
}

// Parts of split tiles that the workspace has room for.
int most_parts(const AttentionParams& p, int groups, int head_dim) {
  return std::min(2, kWorkspaceFloats / part_floats(4 * groups, head_dim)) * p.multiprocessors;
}

template <typename T, typename KV, int kHeadDim, bool kSoftcap, int kGroups>
cudaError_t launch(PrefillParams& d, cudaStream_t stream) {
  using S = Shape<KV, kHeadDim, kGroups>;
  constexpr int kBytes = sizeof(Shared<S>);
  static_assert(kBytes <= kSharedBytes);
  const AttentionParams& p = d.attention;
  d.box_keys = box_keys(p, S::kBlockN);
  d.most_parts = most_parts(p, kGroups, kHeadDim);
  static_assert(part_floats(4 * kGroups, kHeadDim) <= kWorkspaceFloats);
  cudaError_t error = make_chunk_map<KV>(&d.k, p.k, p, S::kBoxElements, d.box_keys);
  if (error == cudaSuccess) error = make_chunk_map<KV>(&d.v, p.v, p, S::kBoxElements, d.box_keys);
  const RowTensor queries{p.q, p.q_stride_token, p.q_stride_head};
  const RowTensor output{p.out, p.out_stride_token, p.out_stride_head};
  d.query_boxes = has_rows_map(queries, p, kHeadDim, 64);
  d.output_boxes = S::kLeavesByPlace && has_rows_map(output, p, kHeadDim, 16);
  if (error == cudaSuccess && d.query_boxes)
    error = make_rows_map<T>(&d.q, queries, p, S::kBlockM, S::kChunks);
  if (error == cudaSuccess && d.output_boxes) error = make_rows_map<T>(&d.out, output, p, 16, 1);
  if (error != cudaSuccess) return error;
  const auto kernel = prefill_kernel<T, KV, kHeadDim, kSoftcap, kGroups>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  return launch_overlapping(Launch<PrefillParams>{kernel, p.multiprocessors, S::kThreads, kBytes},
                            d, stream);
}

// How many warpgroups a block has: as many as share their keys well, fewer where that leaves
// multiprocessors idle or tiles half empty. Requests are taken to be as long as the longest.
int choose_groups(PrefillParams d, int head_dim, int most) {
  const AttentionParams& p = d.attention;
  int asked = SPARSEK_HOPPER_WARPGROUPS;
  if (p.batch_invariant && !asked) asked = 2;  // others are compiled apart, and may round otherwise
  const int64_t rows = int64_t{p.max_seqlen_q} * p.group;
  const int64_t requests = (p.total_q + p.max_seqlen_q - 1) / p.max_seqlen_q;
  int best = 1;
  float least = 0;
  for (int groups = 1; groups <= most; ++groups) {
    if ((groups > 2 && groups < most) || (asked && groups > asked)) continue;
    const int64_t tiles = (rows + 64 * groups - 1) / (64 * groups) * requests * p.kv_heads;
    const int few = static_cast<int>(std::min<int64_t>(tiles, 1 << 24));
    d.most_parts = most_parts(p, groups, head_dim);
    const float cost = best_split(d, few, groups).cost;
    if (groups == 1 || asked || cost < least) best = groups, least = cost;
  }
  return best;
}

}  // namespace

template <typename T, typename KV, int kHeadDim, bool kSoftcap>
cudaError_t prefill(const AttentionParams& p, cudaStream_t stream) {
  PrefillParams d{};
  d.attention = p;
  d.keys = static_cast<int>(most_keys(p, 64 / p.group + 1));
  d.own_tiles = p.keys_a_pair > 0 ? 0 : p.multiprocessors;
  d.known_tiles = !p.cu_seqlens_q && !p.seq_lens && !p.k_starts && !p.q_offsets && !p.block_table;
  // When they are looked for depends on the other rows of a warp.
  d.always_maxima = p.batch_invariant;
  // Without a causal mask tiles are alike, and blocks drift apart: heads whose keys and values stay
  // in the L2 cache go together, as many each time.
  const int64_t head_bytes = int64_t{2 * sizeof(KV) * kHeadDim} * p.max_seqlen_k;
  d.section_heads = p.kv_heads;
  while (p.window_right < 0 && d.section_heads > 1 &&
         (p.kv_heads % d.section_heads || d.section_heads * head_bytes > kSectionBytes))
    --d.section_heads;
  if (kSoftcap) {
    d.softcap_log2e = p.softcap * kLog2e;
    d.softcap_rate = 2 * kLog2e * p.scale / p.softcap;
    const float rate = p.scale / p.softcap;
    // Which of a warp's ways a score goes depends on the other rows.
    d.near_scores = p.batch_invariant ? 0 : kNear / std::abs(rate);
    float power = d.softcap_log2e * rate;
    for (int i = 0; i < 4; ++i, power *= rate * rate) d.near_series[i] = kNearSeries[i] * power;
    if (std::abs(d.near_series[3]) < FLT_MIN) d.near_scores = 0;
  }
  constexpr int kMostGroups = most_groups(kHeadDim, sizeof(KV) == 1, kSoftcap);
  switch (choose_groups(d, kHeadDim, kMostGroups)) {
    case 1:
      return launch<T, KV, kHeadDim, kSoftcap, 1>(d, stream);
    case 2:
      return launch<T, KV, kHeadDim, kSoftcap, 2>(d, stream);
    default:
      return launch<T, KV, kHeadDim, kSoftcap, kMostGroups>(d, stream);
  }
}

template cudaError_t prefill<SPARSEK_DTYPE, SPARSEK_KV, SPARSEK_HEAD_DIM, SPARSEK_SOFTCAP>(
    const AttentionParams&, cudaStream_t);

}  // namespace sparsek::sm90
