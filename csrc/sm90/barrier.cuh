// Arrivals at mbarriers by whole warps.
#pragma once
#include "../common/hopper.cuh"

namespace sparsek::sm90 {

// How often a warp arrives when all its lanes have done with what a barrier guards: one of them for
// all. compute-sanitizer's racecheck sees only what threads did that arrive themselves, so in
// builds with assertions, which it checks, every lane does.
#ifdef SPARSEK_DEBUG
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
__device__ inline void warp_arrive(uint64_t* barrier) {
  __syncwarp();
  if (kWarpArrivals == 32 || threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

}  // namespace sparsek::sm90
