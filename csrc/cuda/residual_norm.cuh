// What the forward and the backward kernel of residual_norm share: a thread's pack of channels in a row.
#pragma once
#include "block.cuh"
#include "pyvidx/residual_norm.h"

namespace pyvidx::cuda {

// kSize elements as they lie in memory, in 16-byte loads.
template <typename T, int kSize>
struct Packed {
  uint4 bits[kSize / kVec<T>];

  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int j = 0; j < kSize / kVec<T>; ++j) bits[j] = load16(p + j * kVec<T>);
  }
  // What no thread writes.
  __device__ __forceinline__ void load_constant(const T* p) {
#pragma unroll
    for (int j = 0; j < kSize / kVec<T>; ++j) bits[j] = __ldg(reinterpret_cast<const uint4*>(p + j * kVec<T>));
  }
  __device__ __forceinline__ void unpack(Acc<T> (&x)[kSize]) const {
#pragma unroll
    for (int j = 0; j < kSize / kVec<T>; ++j) {
      Acc<T> part[kVec<T>];
      cuda::unpack<T>(bits[j], part);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) x[j * kVec<T> + i] = part[i];
    }
  }
};

template <typename T, int kSize>
__device__ __forceinline__ void load_channels(const T* p, Acc<T> (&x)[kSize]) {
  Packed<T, kSize> packed;
  packed.load(p);
  packed.unpack(x);
}
template <typename T, int kSize>
__device__ __forceinline__ void load_parameters(const T* p, Acc<T> (&x)[kSize]) {
  Packed<T, kSize> packed;
  packed.load_constant(p);
  packed.unpack(x);
}

template <typename T, int kSize>
__device__ __forceinline__ void store_channels(T* p, const Acc<T> (&x)[kSize]) {
#pragma unroll
  for (int j = 0; j < kSize; j += kVec<T>) {
    Acc<T> part[kVec<T>];
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) part[i] = x[j + i];
    store_vec<T>(p + j, part);
  }
}

}  // namespace pyvidx::cuda
