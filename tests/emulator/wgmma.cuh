// csrc/common/wgmma.cuh for the host. Products are made when they are waited for, as late as can
// be.
#pragma once
#include <array>
#include <tuple>

#include "ptx.cuh"

namespace sparsek {

template <int kRowBytes = 128>
inline uint64_t matrix_descriptor(uint32_t address, uint32_t chunk_bytes = 16) {
  return (address & 0x3ffff) >> 4 | uint64_t{chunk_bytes >> 4} << 16 |
         uint64_t{8 * kRowBytes >> 4} << 32 | uint64_t{kRowBytes == 128 ? 1 : 2} << 62;
}

inline uint64_t at_offset(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

namespace emulated {

// An operand as the hardware reads it: the swizzle is of the address.
template <typename T>
struct Operand {
  uint32_t start, leading, stride, row_bytes;

  explicit Operand(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        row_bytes(descriptor >> 62 == 1 ? 128 : 64) {
    if (descriptor >> 62 == 0 || descriptor >> 62 == 3 || (descriptor >> 49 & 7))
      emulator::fail("unknown layout of wgmma");
  }
  uint16_t at(uint32_t address) const {
    address ^= address >> 3 & (row_bytes - 16);
    uint16_t bits;
    std::memcpy(&bits, emulator::at_shared(address, 2), 2);
    return bits;
  }
  // Rows along the inner dimension, in pieces of two bytes.
  uint16_t row(int r, int k) const {
    return at(start + r / 8 * stride + r % 8 * row_bytes + 2 * k);
  }
  // Transposed: rows along the outer dimension.
  uint16_t column(int n, int k) const {
    return at(start + n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2);
  }
};

// A second operand, read once for all threads: the 16 elements of each row that a lane has, which
// are those of each eight that begin at twice the lane's place in its four.
template <typename T>
inline const float* decoded(uint64_t descriptor, int rows, bool transposed, int part = 0) {
  static std::map<std::tuple<const void*, uint64_t, int>, std::vector<float>> known;
  static uint64_t version = 0;
  if (version != emulator::shared_version) known.clear();
  version = emulator::shared_version;
  auto& values = known[{emulator::current->block, descriptor, part}];
  if (values.empty()) {
    values.resize(16 * rows);
    const Operand<T> operand(descriptor);
    for (int n = 0; n < rows; ++n) {
      uint16_t elements[16];
      for (int k = 0; k < 16; ++k)
        elements[k] = transposed ? operand.column(n, k) : operand.row(n, k);
      uint32_t words[8];
      std::memcpy(words, elements, sizeof(words));
      const Floats row = widen<T>(words, part);
      const int own = n / 8 * 2 + n % 2;
      for (int k = 0; k < 16; ++k) values[(n % 8 / 2 * 16 + k) * (rows / 4) + own] = row[k];
    }
  }
  return values.data() + emulator::current->lane % 4 * 4 * rows;
}

// This thread's elements of d, from its two rows of the first operand.
template <int kCount>
inline void multiply(float* d, const Floats (&a)[2], const float* b) {
  constexpr int kColumns = kCount / 2;
  for (int h = 0; h < 2; ++h) {
    float sums[kColumns] = {};
    for (int k = 0; k < 16; ++k)
      for (int i = 0; i < kColumns; ++i) sums[i] += a[h][k] * b[k * kColumns + i];
    for (int i = 0; i < kColumns; ++i) d[i / 2 * 4 + 2 * h + i % 2] += sums[i];
  }
}

}  // namespace emulated

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::current->products.emplace_back(); }
template <int kPending>
inline void wgmma_wait() {
  auto& groups = emulator::current->products;
  emulator::pause();
  for (; groups.size() > kPending + 1; groups.pop_front())
    for (const auto& product : groups.front()) product();
}
inline void before_wait(float) {}
template <int kCount>
inline void after_wait(float (&)[kCount]) {}
inline void fence_for_async() {}
template <int kRegisters>
inline void give_registers_back() {}
template <int kRegisters>
inline void take_registers() {}

template <typename T, int kCount>
inline void wgmma_scores(float (&d)[kCount], uint64_t a, uint64_t b, int accumulate) {
  emulator::current->products.back().push_back([&d, a, b, accumulate] {
    if (!accumulate) std::fill(d, d + kCount, 0.0f);
    const emulated::Operand<T> first(a);
    const int lane = emulator::current->lane;
    const int row = static_cast<int>(emulator::current->thread_idx.x) % 128 / 32 * 16 + lane / 4;
    for (int part = 0; part < emulated::kParts<T>; ++part) {
      emulated::Floats rows[2];
      for (int h = 0; h < 2; ++h) {
        uint16_t elements[16];
        for (int k = 0; k < 16; ++k) elements[k] = first.row(row + 8 * h, k);
        uint32_t words[8];
        std::memcpy(words, elements, sizeof(words));
        rows[h] = emulated::widen<T>(words, part);
      }
      emulated::multiply<kCount>(d, rows, emulated::decoded<T>(b, 2 * kCount, false, part));
    }
  });
}
template <typename T, int kCount>
inline void wgmma_values(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
  const auto* all = emulator::exchange(emulator::Words{{a[0], a[1], a[2], a[3]}});
  const std::array<emulated::Floats, 2> rows = {emulated::row_of_a<T>(all, 0),
                                                emulated::row_of_a<T>(all, 1)};
  emulator::current->products.back().push_back([&d, rows, b] {
    emulated::multiply<kCount>(d, {rows[0], rows[1]}, emulated::decoded<T>(b, 2 * kCount, true));
  });
}

}  // namespace sparsek
