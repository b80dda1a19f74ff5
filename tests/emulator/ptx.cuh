// csrc/common/ptx.cuh for the host: what each instruction does, after the PTX ISA's description.
#pragma once
#include "emulator.h"

namespace sparsek {

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - emulator::dynamic_shared());
}

inline void prefetch_to_l2(const void*) {}

inline void copy_async_16(uint32_t destination, const void* source, bool valid) {
  if (destination % 16 || reinterpret_cast<uintptr_t>(source) % 16)
    emulator::fail("cp.async of 16 bytes is not aligned");
  emulator::current->copies.back().push_back({destination, valid ? source : nullptr});
}
inline void copy_async_commit() { emulator::current->copies.emplace_back(); }
template <int kPending>
inline void copy_async_wait() {
  auto& groups = emulator::current->copies;
  for (; groups.size() > kPending + 1; groups.pop_front()) {
    for (const auto& copy : groups.front()) {
      char* destination = emulator::at_shared(copy.destination, 16);
      copy.source ? std::memcpy(destination, copy.source, 16) : std::memset(destination, 0, 16);
    }
  }
}

template <int kThreads>
inline emulator::Barrier& named_barrier(int barrier) {
  auto& named = emulator::current->block->named[barrier];
  if (named.arrived == 0) named.expected = kThreads;
  if (named.expected != kThreads) emulator::fail("threads disagree on who meets at a barrier");
  return named;
}
template <int kThreads>
inline void barrier_sync(int barrier) {
  emulator::wait(named_barrier<kThreads>(barrier));
}

inline int add_acquire_release(int* address, int value) { return atomicAdd(address, value); }

inline uint32_t transpose_matrix(uint32_t x) {
  const auto* all = emulator::exchange(emulator::Words{{x}});
  const int row = emulator::current->lane / 4, column = emulator::current->lane % 4 * 2;
  const auto at = [&](int j) { return all[4 * (column + j) + row / 2].word[0] >> 16 * (row % 2); };
  return (at(0) & 0xffff) | at(1) << 16;
}

namespace emulated {

// Addresses of the eight rows of four matrices.
inline const emulator::Words* rows(uint32_t address) {
  emulator::at_shared(address, 16);
  return emulator::exchange(emulator::Words{{address}});
}
inline uint16_t element(const emulator::Words* rows, int matrix, int row, int column) {
  uint16_t value;
  std::memcpy(&value, emulator::at_shared(rows[8 * matrix + row].word[0] + 2 * column, 2), 2);
  return value;
}

// Sixteen at a time, as tensor cores take them.
using Bits = uint32_t __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(64)));

// Products of elements of a byte are two, of the lower bytes of 16 bits and of the upper.
template <typename T>
constexpr int kParts = sizeof(T) == 1 ? 2 : 1;

// From eight words of two elements each, or of that part of four.
template <typename T>
inline Floats widen(const uint32_t* words, int part = 0) {
  uint16_t __attribute__((vector_size(32))) elements;
  std::memcpy(&elements, words, sizeof(elements));
  const Bits bits = __builtin_convertvector(elements, Bits);
  if constexpr (sizeof(T) == 1) {
    const Bits size = bits >> 8 * part & 0x7f;  // the exponent's bias is less by 120
    const Floats scaled = reinterpret_cast<Floats>(size << 20) * 0x1p120f;
    const Bits special = size == 0x7f ? Bits{} + 0x7fc00000u : Bits{};
    return reinterpret_cast<Floats>(reinterpret_cast<Bits>(scaled) | special |
                                    (bits >> 8 * part & 0x80) << 24);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return reinterpret_cast<Floats>(bits << 16);
  } else {
    // The exponent's bias is less by 112; infinities and NaN have a wider exponent.
    const Bits size = (bits & 0x7fff) << 13;
    const Floats scaled = reinterpret_cast<Floats>(size) * 0x1p112f;
    const Bits special = size >= 0x1f << 23 ? Bits{} + 0x7f800000u : Bits{};
    return reinterpret_cast<Floats>(reinterpret_cast<Bits>(scaled) | special |
                                    (bits & 0x8000) << 16);
  }
}
inline float sum(const Floats& x) {
  float __attribute__((vector_size(16))) parts[4];
  std::memcpy(parts, &x, sizeof(x));
  const auto four = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  return (four[0] + four[1]) + (four[2] + four[3]);
}
// One of the two rows of a 16 x 16 operand that a lane's products need, from all lanes' words.
template <typename T>
inline Floats row_of_a(const emulator::Words* all, int half, int part = 0) {
  uint32_t words[8];
  for (int i = 0; i < 8; ++i)
    words[i] = all[emulator::current->lane / 4 * 4 + i % 4].word[half + i / 4 * 2];
  return widen<T>(words, part);
}

}  // namespace emulated

inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  const auto* rows = emulated::rows(address);
  const int lane = emulator::current->lane;
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int j) {
      return uint32_t{emulated::element(rows, i, lane / 4, 2 * (lane % 4) + j)};
    };
    r[i] = at(0) | at(1) << 16;
  }
  emulator::wait(emulator::current->warp->barrier);
}
inline void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  const auto* rows = emulated::rows(address);
  const int lane = emulator::current->lane;
  for (int i = 0; i < 4; ++i) {
    const uint32_t to = rows[8 * i + lane / 4].word[0] + lane % 4 * 4;
    std::memcpy(emulator::at_shared(to, 4), &r[i], 4);
  }
  emulator::wait(emulator::current->warp->barrier);
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  const auto* rows = emulated::rows(address);
  const int lane = emulator::current->lane;
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int j) {
      return uint32_t{emulated::element(rows, i, 2 * (lane % 4) + j, lane / 4)};
    };
    r[i] = at(0) | at(1) << 16;
  }
  emulator::wait(emulator::current->warp->barrier);
}

template <typename T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto* all = emulator::exchange(emulator::Words{{a[0], a[1], a[2], a[3], b0, b1}});
  const int pair = emulator::current->lane % 4;
  for (int part = 0; part < emulated::kParts<T>; ++part) {
    emulated::Floats rows[2], columns[2];
    for (int j = 0; j < 2; ++j) {
      rows[j] = emulated::row_of_a<T>(all, j, part);
      uint32_t words[8];
      for (int i = 0; i < 8; ++i) words[i] = all[4 * (2 * pair + j) + i % 4].word[4 + i / 4];
      columns[j] = emulated::widen<T>(words, part);
    }
    for (int i = 0; i < 4; ++i) d[i] += emulated::sum(rows[i / 2] * columns[i % 2]);
  }
}

inline void widen_fp8(uint32_t four, uint32_t& low, uint32_t& high) {
  __half values[4];
  for (int i = 0; i < 4; ++i) {
    __nv_fp8_e4m3 value;
    value.__x = static_cast<uint8_t>(four >> 8 * i);
    values[i] = static_cast<__half>(value);
  }
  std::memcpy(&low, values, 4);
  std::memcpy(&high, values + 2, 4);
}
inline uint16_t narrow_to_fp8(float low, float high) {
  return static_cast<uint16_t>(__nv_fp8_e4m3(low).__x | __nv_fp8_e4m3(high).__x << 8);
}
inline uint32_t swap_inner_bytes(uint32_t x) {
  return (x & 0xff0000ff) | (x & 0xff00) << 8 | (x >> 8 & 0xff00);
}

inline float reciprocal_approx(float x) { return 1 / x; }
inline float exp2_approx(float x) { return std::exp2(x); }

template <typename T>
inline void recompute(T&) {}

template <typename T>
inline uint32_t pack(float low, float high) {
  const T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, 4);
  return bits;
}

template <typename T>
inline void to_floats(uint32_t pair, float& low, float& high) {
  T both[2];
  std::memcpy(both, &pair, 4);
  low = static_cast<float>(both[0]), high = static_cast<float>(both[1]);
}

}  // namespace sparsek
