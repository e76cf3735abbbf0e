// What the forward and the backward kernel of residual_norm share: a thread's pack of channels in a row.
#pragma once
#include "block.cuh"
#include "pyvidx/residual_norm.h"

namespace pyvidx::cuda {

constexpr int kNormThreads = 256;  // at most
constexpr int kNormWarps = kNormThreads / 32;

// kSize elements of any type, in 16-byte accesses where there are so many, else element by element.
template <typename T, int kSize>
__device__ __forceinline__ void load_channels(const T* p, Acc<T> (&x)[kSize]) {
  if constexpr (kSize < kVec<T>) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = to_acc(p[i]);
  } else {
#pragma unroll
    for (int j = 0; j < kSize; j += kVec<T>) {
      Acc<T> part[kVec<T>];
      load_vec<T>(p + j, part);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) x[j + i] = part[i];
    }
  }
}
template <typename T, int kSize>
__device__ __forceinline__ void store_channels(T* p, const Acc<T> (&x)[kSize]) {
  if constexpr (kSize < kVec<T>) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) p[i] = from_acc<T>(x[i]);
  } else {
#pragma unroll
    for (int j = 0; j < kSize; j += kVec<T>) {
      Acc<T> part[kVec<T>];
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) part[i] = x[j + i];
      store_vec<T>(p + j, part);
    }
  }
}

#ifndef __CUDACC_RTC__
// Threads for rows of C channels in packs of kSize; whole warps.
inline unsigned norm_threads(int64_t C, int kSize) {
  const int64_t packs = ceil_div(C, kSize);
  return unsigned(packs < kNormThreads ? ceil_div(packs, 32) * 32 : kNormThreads);
}
#endif

}  // namespace pyvidx::cuda
