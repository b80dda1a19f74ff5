// Thin wrappers of wgmma: products of 64 rows by a warpgroup (four warps), asynchronous.
//
// Thread t of the warpgroup holds of d the rows 16 * (t / 32) + t % 32 / 4 (elements 0 and 1 of
// four) and 8 below (2 and 3), element 4 * j + i at column 8 * j + 2 * (t % 4) + i % 2.
#pragma once
#include "ptx.cuh"

namespace sparsek {

// An operand in shared memory in rows of 128 bytes, or 64, swizzled: 8 rows lie together. The rows
// run along the inner dimension of the product (a step is 32 bytes of it), or, for a transposed
// second operand, each is one index of the inner dimension, and `chunk_bytes` lie between one 64
// columns and the next.
template <int kRowBytes = 128>
__device__ inline uint64_t matrix_descriptor(uint32_t address, uint32_t chunk_bytes = 16) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint64_t kEightRows = 8 * kRowBytes >> 4, kSwizzle = kRowBytes == 128 ? 1 : 2;
  return (address & 0x3ffff) >> 4 | uint64_t{chunk_bytes >> 4} << 16 | kEightRows << 32 |
         kSwizzle << 62;
}

// The same layout, so many bytes further on.
__device__ inline uint64_t at_offset(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);  // no carry: shared memory is smaller than the field
}

// Before the first product that reads registers or accumulators which were written before.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// Keeps ptxas from moving the wait behind this up over what x, a sum that is never below 0, is made
// of: products run meanwhile. (NaN is not below 0 either.)
__device__ inline void before_wait(float x) { __syncwarp(__any_sync(~0u, x < 0) ? 0u : ~0u); }
// Keeps the compiler from using accumulators before the wait in front of this.
template <int kCount>
__device__ inline void after_wait(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Writes to shared memory so far are seen by later asynchronous reads and copies.
__device__ inline void fence_for_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

template <int kRegisters>
__device__ inline void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Lists of registers and of accumulators, as an asm statement takes them.
#define SPARSEK_LIST_32                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SPARSEK_LIST_40 SPARSEK_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SPARSEK_LIST_64                                                      \
  SPARSEK_LIST_40                                                            \
  ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SPARSEK_LIST_128                                                                 \
  SPARSEK_LIST_64                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77"               \
  ", %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91"               \
  ", %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105"         \
  ", %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119" \
  ", %120, %121, %122, %123, %124, %125, %126, %127"
#define SPARSEK_SUMS_8(i)                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define SPARSEK_SUMS_32 SPARSEK_SUMS_8(0), SPARSEK_SUMS_8(8), SPARSEK_SUMS_8(16), SPARSEK_SUMS_8(24)
#define SPARSEK_SUMS_40 SPARSEK_SUMS_32, SPARSEK_SUMS_8(32)
#define SPARSEK_SUMS_64 SPARSEK_SUMS_40, SPARSEK_SUMS_8(40), SPARSEK_SUMS_8(48), SPARSEK_SUMS_8(56)
#define SPARSEK_SUMS_128                                                                           \
  SPARSEK_SUMS_64, SPARSEK_SUMS_8(64), SPARSEK_SUMS_8(72), SPARSEK_SUMS_8(80), SPARSEK_SUMS_8(88), \
      SPARSEK_SUMS_8(96), SPARSEK_SUMS_8(104), SPARSEK_SUMS_8(112), SPARSEK_SUMS_8(120)

#define SPARSEK_SCORES_OF(N, SHAPE_AND_TYPES, COUNT, A, B, ACCUMULATE, TRANSPOSED)              \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " ACCUMULATE                 \
               ", 0;\n"                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #N SHAPE_AND_TYPES " {" SPARSEK_LIST_##COUNT \
               "}, " A ", " B ", accumulate, 1, 1" TRANSPOSED ";\n}\n"                          \
               : SPARSEK_SUMS_##COUNT                                                           \
               : "l"(a), "l"(b), "r"(accumulate))
#define SPARSEK_SCORES(N, TYPE, COUNT, ...) \
  SPARSEK_SCORES_OF(N, "k16.f32." TYPE "." TYPE, COUNT, __VA_ARGS__, ", 0, 0")
// Of E4M3, the one type of a byte.
#define SPARSEK_FP8_SCORES(N, COUNT, ...) \
  SPARSEK_SCORES_OF(N, "k32.f32.e4m3.e4m3", COUNT, __VA_ARGS__, "")
// d = a * b^T, or d += a * b^T: a has 64 rows of 32 bytes and b N, both in shared memory.
template <typename T>
__device__ inline void wgmma_scores(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (sizeof(T) == 1)
    SPARSEK_FP8_SCORES(128, 64, "%64", "%65", "%66");
  else if constexpr (std::is_same_v<T, __half>)
    SPARSEK_SCORES(128, "f16", 64, "%64", "%65", "%66");
  else
    SPARSEK_SCORES(128, "bf16", 64, "%64", "%65", "%66");
}
template <typename T>
__device__ inline void wgmma_scores(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (sizeof(T) == 1)
    SPARSEK_FP8_SCORES(64, 32, "%32", "%33", "%34");
  else if constexpr (std::is_same_v<T, __half>)
    SPARSEK_SCORES(64, "f16", 32, "%32", "%33", "%34");
  else
    SPARSEK_SCORES(64, "bf16", 32, "%32", "%33", "%34");
}
template <typename T>
__device__ inline void wgmma_scores(float (&d)[40], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __half>)
    SPARSEK_SCORES(80, "f16", 40, "%40", "%41", "%42");
  else
    SPARSEK_SCORES(80, "bf16", 40, "%40", "%41", "%42");
}

#define SPARSEK_VALUES(N, TYPE, COUNT, A, B)                                   \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
               " {" SPARSEK_LIST_##COUNT "}, {" A "}, " B ", 1, 1, 1, 1;\n"    \
               : SPARSEK_SUMS_##COUNT                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
// d += a * b: a is 64x16, in the layout of d rounded to T in pairs; b 16xN in shared memory.
template <typename T>
__device__ inline void wgmma_values(float (&d)[128], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, __half>)
    SPARSEK_VALUES(256, "f16", 128, "%128, %129, %130, %131", "%132");
  else
    SPARSEK_VALUES(256, "bf16", 128, "%128, %129, %130, %131", "%132");
}
template <typename T>
__device__ inline void wgmma_values(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, __half>)
    SPARSEK_VALUES(128, "f16", 64, "%64, %65, %66, %67", "%68");
  else
    SPARSEK_VALUES(128, "bf16", 64, "%64, %65, %66, %67", "%68");
}
template <typename T>
__device__ inline void wgmma_values(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, __half>)
    SPARSEK_VALUES(64, "f16", 32, "%32, %33, %34, %35", "%36");
  else
    SPARSEK_VALUES(64, "bf16", 32, "%32, %33, %34, %35", "%36");
}
#undef SPARSEK_VALUES
#undef SPARSEK_FP8_SCORES
#undef SPARSEK_SCORES
#undef SPARSEK_SCORES_OF

}  // namespace sparsek
