// What the kernels of memory banks take at a time, and how they copy it.
#pragma once
#include "block.cuh"

namespace pyvidx::cuda {

// A pack is what a thread takes at a time: 16 bytes, or one element where rows are not aligned.
template <typename T, bool kVectorized>
constexpr int kPack = kVectorized ? kVec<T> : 1;

template <typename T, bool kVectorized>
struct RawPack {
  using type = uint4;
};
template <typename T>
struct RawPack<T, false> {
  using type = T;
};
template <typename T, bool kVectorized>
using Raw = typename RawPack<T, kVectorized>::type;

template <typename T>
__device__ __forceinline__ void unpack_raw(uint4 bits, Acc<T> (&x)[kVec<T>]) {
  unpack<T>(bits, x);
}
template <typename T>
__device__ __forceinline__ void unpack_raw(T element, Acc<T> (&x)[1]) {
  x[0] = to_acc(element);
}
template <typename T, bool kVectorized>
__device__ __forceinline__ Raw<T, kVectorized> pack_raw(const Acc<T> (&x)[kPack<T, kVectorized>]) {
  T element[kPack<T, kVectorized>];
#pragma unroll
  for (int i = 0; i < kPack<T, kVectorized>; ++i) element[i] = from_acc<T>(x[i]);
  Raw<T, kVectorized> bits;
  memcpy(&bits, element, sizeof bits);
  return bits;
}
// A pack of T from a row of F: of 16 bits, where T is float.
template <typename T, bool kVectorized, typename F>
__device__ __forceinline__ Raw<T, kVectorized> load_as(const F* p) {
  if constexpr (sizeof(F) == sizeof(T)) {
    return *reinterpret_cast<const Raw<T, kVectorized>*>(p);
  } else {
    constexpr int kSize = kPack<T, kVectorized>;
    F element[kSize];
    if constexpr (kVectorized) {
      const uint2 bits = *reinterpret_cast<const uint2*>(p);
      memcpy(static_cast<void*>(element), &bits, sizeof bits);
    } else {
      element[0] = *p;
    }
    Acc<T> x[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = to_acc(element[i]);
    return pack_raw<T, kVectorized>(x);
  }
}
template <typename T>
__device__ __forceinline__ void store_raw(T* p, T x) {
  *p = x;
}
__device__ __forceinline__ void store_raw(void* p, uint4 x) { store16(p, x); }

constexpr int kCopyAhead = 3;  // packs of a thread that are under way together; with 4 memory_merge_kernel spills

// `count` packs, several under way at once: a store is a wall for the loads behind it.
template <typename Pack, int kAhead = kCopyAhead, typename From, typename To>
__device__ __forceinline__ void copy_packs(int count, From from, To to) {
#pragma unroll 1
  for (int first = 0; first < count; first += kAhead) {
    Pack packs[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i < count) packs[i] = *reinterpret_cast<const Pack*>(from(first + i));
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= count) break;
      store_raw(to(first + i), packs[i]);
    }
  }
}

// A row of C elements, by a warp.
template <typename T, bool kVectorized>
__device__ __forceinline__ void copy_row(const T* from, T* to, int C) {
  constexpr int kSize = kPack<T, kVectorized>, kStep = 32 * kSize;
  const int first = int(threadIdx.x) % 32 * kSize;
  if (first >= C) return;
  copy_packs<Raw<T, kVectorized>>((C - first + kStep - 1) / kStep, [&](int i) { return from + first + i * kStep; },
                                  [&](int i) { return to + first + i * kStep; });
}

}  // namespace pyvidx::cuda
