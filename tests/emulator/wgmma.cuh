// csrc/common/wgmma.cuh for the host. Products are made when they are waited for, as late as can
// be.
#pragma once
#include <array>
#include <tuple>

#include "ptx.cuh"

namespace sparsek {

inline uint64_t matrix_descriptor(uint32_t address, uint32_t chunk_bytes = 16) {
  return (address & 0x3ffff) >> 4 | uint64_t{chunk_bytes >> 4} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

inline uint64_t at_offset(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

namespace emulated {

// An operand as the hardware reads it: the swizzle is of the address.
template <typename T>
struct Operand {
  uint32_t start, leading, stride;

  explicit Operand(uint64_t descriptor)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) emulator::fail("unknown layout of wgmma");
  }
  float at(uint32_t address) const {
    address ^= address >> 3 & 0x70;
    T value;
    std::memcpy(&value, emulator::at_shared(address, 2), 2);
    return static_cast<float>(value);
  }
  // Rows along the inner dimension.
  float row(int r, int k) const { return at(start + r / 8 * stride + r % 8 * 128 + 2 * k); }
  // Transposed: rows along the outer dimension.
  float column(int n, int k) const {
    return at(start + n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2);
  }
};

// A second operand as rows of 16, read once for all threads.
template <typename T>
inline const float* decoded(uint64_t descriptor, int rows, bool transposed) {
  static std::map<std::tuple<const void*, uint64_t>, std::vector<float>> known;
  static uint64_t version = 0;
  if (version != emulator::shared_version) known.clear();
  version = emulator::shared_version;
  auto& values = known[{emulator::current->block, descriptor}];
  if (values.empty()) {
    const Operand<T> operand(descriptor);
    for (int n = 0; n < rows; ++n)
      for (int k = 0; k < 16; ++k)
        values.push_back(transposed ? operand.column(n, k) : operand.row(n, k));
  }
  return values.data();
}

// This thread's elements of d, from its two rows of the first operand.
template <int kCount>
inline void multiply(float* d, const float (&a)[2][16], const float* b) {
  const int lane = emulator::current->lane;
  for (int i = 0; i < kCount; ++i) {
    const float* column = b + 16 * (i / 4 * 8 + 2 * (lane % 4) + i % 2);
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += a[i / 2 % 2][k] * column[k];
    d[i] += sum;
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
    float rows[2][16];
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < 16; ++k) rows[h][k] = first.row(row + 8 * h, k);
    emulated::multiply<kCount>(d, rows, emulated::decoded<T>(b, 2 * kCount, false));
  });
}
template <typename T, int kCount>
inline void wgmma_values(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
  const auto* all = emulator::exchange(emulator::Words{{a[0], a[1], a[2], a[3]}});
  const int lane = emulator::current->lane;
  std::array<float, 32> rows;  // two of 16
  for (int h = 0; h < 2; ++h) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t pair = all[lane / 4 * 4 + k % 8 / 2].word[h + k / 8 * 2];
      rows[16 * h + k] = emulated::unpack<T>(pair, k % 2);
    }
  }
  emulator::current->products.back().push_back([&d, rows, b] {
    float a[2][16];
    std::copy(rows.begin(), rows.end(), &a[0][0]);
    emulated::multiply<kCount>(d, a, emulated::decoded<T>(b, 2 * kCount, true));
  });
}

}  // namespace sparsek
