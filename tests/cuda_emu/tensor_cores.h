// The tensor cores' mma.sync for the emulator, with their rounding: products are exact; four registers' worth of them
// (m8n8k4: its four) and the sum so far are brought to the exponent of the largest, cut to 24 bits toward zero, added
// exactly, and cut again. Sums so drift toward zero, where adding to nearest would not. Published measurements give
// newer GPUs (sm_75 on) one to three bits more before the cut and sometimes more terms at a time, both of which err
// less than what is here.
//
// PYVIDX_EMU_MMA=tensor_cores makes kernels use those of sm_80 and newer, =quad_pairs those of sm_70 (m8n8k4, half
// only), otherwise they shuffle (what no tensor cores of a GPU can multiply).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "engine.h"

namespace cuemu {

// Which of them are there. (runtime.cpp: a variable of a header would lie in the red zone behind a kernel's shared
// memory)
bool tensor_cores();
bool quad_pairs();

// The i-th element of a register.
template <typename T>
double element(unsigned bits, int i) {
  if constexpr (sizeof(T) == 4) {
    float x;
    bits &= ~0x1fffu;  // the hardware does not look at the others
    std::memcpy(&x, &bits, sizeof x);
    return x;
  } else {
    T x;
    const unsigned short half = static_cast<unsigned short>(bits >> 16 * i);
    std::memcpy(static_cast<void*>(&x), &half, sizeof x);
    return float(x);
  }
}

inline int exponent_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return int(bits >> 52 & 0x7ff) - 1023;  // of 0: below that of any number
}
inline double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The sum of terms that an adder of 24 bits gives.
template <int kCount>
float add_truncated(const double (&terms)[kCount]) {
  double plain = 0;
  int largest = -1023;
  for (const double x : terms) {
    plain += x;
    const int exponent = exponent_of(x);
    largest = exponent > largest ? exponent : largest;
  }
  if (largest == -1023 || !std::isfinite(plain)) return float(plain);
  const double unit = power_of_two(largest - 23), inverse = power_of_two(23 - largest);
  int64_t sum = 0, scale = 1;
  for (const double x : terms) sum += int64_t(x * inverse);
  while (std::abs(sum) >= 1 << 24) sum /= 2, scale *= 2;
  return float(double(sum * scale) * unit);
}

// What every lane of the warp brings.
inline void exchange(uint64_t mine, uint64_t (&all)[32], Site site) {
  const Lanes lanes = sync_warp(~0u, mine, false, site);
  if (lanes.present != ~0u) fail("mma.sync without all lanes of the warp", site);
  std::memcpy(all, lanes.value, sizeof all);
}

// sum += a b for a warp: mma.cuh says which lane holds what.
template <typename T>
void tensor_mma(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], Site site = here()) {
  constexpr int kPacked = 4 / sizeof(T);
  uint64_t top[32], bottom[32], right[32];
  exchange(a[0] | uint64_t(a[2]) << 32, top, site);
  exchange(a[1] | uint64_t(a[3]) << 32, bottom, site);
  exchange(b[0] | uint64_t(b[1]) << 32, right, site);
  const int row = lane() & ~3, first_column = lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const uint64_t* const left = (i < 2 ? top : bottom) + row;
    const uint64_t* const other = right + (first_column + i % 2) * 4;
    for (int shift = 0; shift < 64; shift += 32) {
      double terms[4 * kPacked + 1];
      terms[4 * kPacked] = sum[i];
      for (int c = 0; c < 4; ++c) {
        const unsigned x = unsigned(left[c] >> shift), y = unsigned(other[c] >> shift);
        for (int e = 0; e < kPacked; ++e) terms[c * kPacked + e] = element<T>(x, e) * element<T>(y, e);
      }
      sum[i] = add_truncated(terms);
    }
  }
}

// mma.sync.m8n8k4.row.{row or col}.f32.f16.f16.f32: four products of 8 x 4 and 4 x 8, each by 8 lanes (PTX manual,
// 9.7.15.5.1). a and b: four halves, the first in the lowest bits; c0 to c3 are in x, c4 to c7 in y.
template <bool kRowMajorB>
void mma_m8n8k4(float (&x)[4], float (&y)[4], uint64_t a, uint64_t b, Site site = here()) {
  uint64_t left[32], right[32];
  exchange(a, left, site);
  exchange(b, right, site);
  const int self = lane(), first = self / 4 % 4 * 4;
  const auto member = [=](int i) { return first + (i < 4 ? i : 16 + i - 4); };  // of the 8 lanes
  const auto half = [](uint64_t bits, int i) { return element<__half>(unsigned(bits >> 16 * i), 0); };
  for (int i = 0; i < 8; ++i) {
    float& c = i < 4 ? x[i] : y[i - 4];
    const int row = (self < 16 ? 0 : 4) + (self & 1) + (i & 2), column = (i & 4) + (self & 2) + (i & 1);
    double terms[5] = {0, 0, 0, 0, c};
    for (int k = 0; k < 4; ++k) {
      const double other =
          kRowMajorB ? half(right[member(column / 4 * 4 + k)], column % 4) : half(right[member(column)], k);
      terms[k] = half(left[member(row)], k) * other;
    }
    c = add_truncated(terms);
  }
}

}  // namespace cuemu
