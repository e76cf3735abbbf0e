// The tensor cores' mma.sync for the emulator, with their rounding: products are exact; four registers' worth of them
// and the sum so far are brought to the exponent of the largest, cut to 24 bits toward zero, added exactly, and cut
// again. Sums so drift toward zero, where adding to nearest would not. Published measurements give newer GPUs (sm_75
// on) one to three bits more before the cut and sometimes more terms at a time, both of which err less than what is
// here.
//
// PYVIDX_EMU_MMA=tensor_cores makes kernels use it (as on sm_80 and newer), otherwise they shuffle (as on sm_70).
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

// Whether they are there. (runtime.cpp: a variable of a header would lie in the red zone behind a kernel's shared
// memory)
bool tensor_cores();

// cvt.rna.tf32: to nearest, ties away from zero, 10 bits behind the point.
inline unsigned to_tf32(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return std::isfinite(x) ? (bits + 0x1000u) & ~0x1fffu : bits;
}

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

// sum += a b for a warp: mma.cuh says which lane holds what.
template <typename T>
void tensor_mma(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], Site site = here()) {
  constexpr int kPacked = 4 / sizeof(T);
  uint64_t top[32], bottom[32], right[32];
  const auto exchange = [&](unsigned low, unsigned high, uint64_t (&all)[32]) {
    const Lanes lanes = sync_warp(~0u, low | uint64_t(high) << 32, false, site);
    if (lanes.present != ~0u) fail("mma.sync without all lanes of the warp", site);
    std::memcpy(all, lanes.value, sizeof all);
  };
  exchange(a[0], a[2], top);
  exchange(a[1], a[3], bottom);
  exchange(b[0], b[1], right);
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

}  // namespace cuemu
