// Pieces kernels are made of: 16-byte loads and stores of any floating type through its accumulator type, and sums,
// maxima and arg-maxima over a warp or a block. Reductions are deterministic: a fixed tree, no atomics.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"
#include "pyvidx/view.h"
#ifndef __CUDACC_RTC__
#include "pyvidx/dispatch.h"
#endif

namespace pyvidx {

#ifndef __CUDACC_RTC__
template <>
struct DTypeOf<__half> {
  static constexpr DType value = DType::f16;
};
template <>
struct DTypeOf<__nv_bfloat16> {
  static constexpr DType value = DType::bf16;
};
#endif

namespace cuda {

// ---- one element ----

// The type arithmetic is done in: float, and double for double (gradcheck).
template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

// Round to T (to nearest even).
template <typename T>
__device__ __forceinline__ T from_acc(Acc<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_acc<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// 1 / x and 2^x to an ulp or two, in one instruction where the exact ones take about ten and branch. Subnormal results
// are 0. The emulator makes them an ulp too small.
__device__ __forceinline__ float reciprocal(float x) {
#if defined(PYVIDX_EMU)
  return 1 / x * (1 - 1.2e-7f);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float power_of_two(float x) {
#if defined(PYVIDX_EMU)
  return exp2f(x) * (1 - 1.2e-7f);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

// 1 / x for x from 1 on, to half an ulp or a little more: a step of Newton's behind the one instruction.
__device__ __forceinline__ float refined_reciprocal(float x) {
  const float y = reciprocal(x);
  return y + y * (1 - x * y);
}
__device__ __forceinline__ double refined_reciprocal(double x) { return 1 / x; }

// ---- 16 bytes ----

template <typename T>
constexpr int kVec = 16 / sizeof(T);  // elements of one 16-byte access

// p must be 16-byte aligned. Going through uint4 makes it one load instruction for every T.
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }

template <typename T>
__device__ __forceinline__ void unpack(uint4 bits, Acc<T> (&out)[kVec<T>]) {
  T element[kVec<T>];
  memcpy(static_cast<void*>(element), &bits, sizeof bits);
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) out[i] = to_acc(element[i]);
}

template <typename T>
__device__ __forceinline__ void load_vec(const T* p, Acc<T> (&out)[kVec<T>]) {
  unpack<T>(load16(p), out);
}

// 16 bytes of global memory, or zeros. Predicated rather than behind a branch, so that the loads of many rows are under
// way together. The memory must not change while the kernel runs.
__device__ __forceinline__ uint4 load16_if(bool present, const void* p) {
#if defined(PYVIDX_EMU)
  return present ? load16(p) : uint4{0, 0, 0, 0};
#else
  uint4 bits;
  asm("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n"
      "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
      "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(bits.x), "=&r"(bits.y), "=&r"(bits.z), "=&r"(bits.w)
      : "l"(p), "r"(unsigned(present)));
  return bits;
#endif
}

// To global memory, in one instruction. Written in C++, nvcc takes the store apart where it peels iterations off a loop
// (seen with 13.0), and a store to any memory is slower. Nothing is loaded ahead of it: load all first, then store.
__device__ __forceinline__ void store16(void* p, uint4 bits) {
#if defined(PYVIDX_EMU)
  *static_cast<uint4*>(p) = bits;
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(bits.x), "r"(bits.y),
               "r"(bits.z), "r"(bits.w)
               : "memory");
#endif
}

template <typename T>
__device__ __forceinline__ void store_vec(T* p, const Acc<T> (&x)[kVec<T>]) {
  T element[kVec<T>];
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) element[i] = from_acc<T>(x[i]);
  uint4 bits;
  memcpy(&bits, element, sizeof bits);
  store16(p, bits);
}

// The same, or one element where rows are not aligned.
template <typename T, int kSize>
__device__ __forceinline__ void load_pack(const T* p, Acc<T> (&x)[kSize]) {
  if constexpr (kSize == 1) {
    x[0] = to_acc(*p);
  } else {
    load_vec(p, x);
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void store_pack(T* p, const Acc<T> (&x)[kSize]) {
  if constexpr (kSize == 1) {
    *p = from_acc<T>(x[0]);
  } else {
    store_vec(p, x);
  }
}

// kSize elements as they lie in memory: whole 16-byte accesses, or one element where rows are not aligned. Loading
// first and unpacking later keeps many loads under way; a load that a branch unpacks at once is waited for in the
// branch.
template <typename T, int kSize>
struct Packed {
  uint4 bits[kSize / kVec<T>] = {};

  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int j = 0; j < kSize / kVec<T>; ++j) bits[j] = load16(p + j * kVec<T>);
  }
  // What no thread writes; zeros where it is not there.
  __device__ __forceinline__ void load_if(bool present, const T* p) {
#pragma unroll
    for (int j = 0; j < kSize / kVec<T>; ++j) bits[j] = load16_if(present, p + j * kVec<T>);
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

template <typename T>
struct Packed<T, 1> {
  T element = from_acc<T>(0);

  __device__ __forceinline__ void load(const T* p) { element = *p; }
  __device__ __forceinline__ void load_if(bool present, const T* p) { element = present ? *p : from_acc<T>(0); }
  __device__ __forceinline__ void unpack(Acc<T> (&x)[1]) const { x[0] = to_acc(element); }
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
  if constexpr (kSize == 1) *p = from_acc<T>(x[0]);
#pragma unroll
  for (int j = 0; j + kVec<T> <= kSize; j += kVec<T>) {
    Acc<T> part[kVec<T>];
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) part[i] = x[j + i];
    store_vec<T>(p + j, part);
  }
}

#ifndef __CUDACC_RTC__
// May every row (last dimension) of the view be read with load_vec<T>, with no tail? A view of length 0 may.
// kSize: elements of one access.
template <typename T, int kSize = kVec<T>, int kDims>
bool vectorizable(const View<kDims>& view) {
  if (view.size[kDims - 1] % kSize != 0 || reinterpret_cast<uintptr_t>(view.data) % (kSize * sizeof(T)) != 0) {
    return false;
  }
  if (view.stride[kDims - 1] != 1 && view.size[kDims - 1] > 1) return false;
  for (int d = 0; d < kDims - 1; ++d) {
    if (view.size[d] > 1 && view.stride[d] % kSize != 0) return false;
  }
  return true;
}
#endif

// ---- a warp; all 32 lanes take part and all get the result ----

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

template <typename T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

__device__ __forceinline__ unsigned warp_max(unsigned x) {
#if defined(PYVIDX_EMU) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800)
  return __reduce_max_sync(kFullWarp, x);
#else
  return warp_max<unsigned>(x);
#endif
}

template <typename T>
struct ArgMax {
  T value;
  int index;
};

// The larger value, the smaller index on ties; NaN is larger than every number, as in torch.argmax.
template <typename T>
__device__ __forceinline__ ArgMax<T> better(ArgMax<T> a, ArgMax<T> b) {
  const bool nan_a = a.value != a.value, nan_b = b.value != b.value;
  const bool tie = a.value == b.value || (nan_a && nan_b);
  const bool take_b = tie ? b.index < a.index : nan_b || (!nan_a && b.value > a.value);
  return take_b ? b : a;
}

template <typename T>
__device__ __forceinline__ ArgMax<T> warp_argmax(ArgMax<T> x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = better(x, {__shfl_xor_sync(kFullWarp, x.value, offset), __shfl_xor_sync(kFullWarp, x.index, offset)});
  }
  return x;
}

// ---- a block of kThreads threads; every thread takes part and all get the result ----

// Reduce kCount values at once; `combine` works on a warp, `neutral` changes nothing.
template <int kThreads, int kCount, typename T, typename Combine>
__device__ __forceinline__ void block_reduce(T (&x)[kCount], T neutral, Combine combine) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps");
  constexpr int kWarps = kThreads / 32;
  // Raw storage, because a shared variable must not have a constructor.
  __shared__ __align__(16) unsigned char storage[kWarps * kCount * sizeof(T)];
  T* const partial = reinterpret_cast<T*>(storage);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int lane = thread % 32, warp = thread / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = combine(x[i]);
  if constexpr (kWarps > 1) {
    __syncthreads();  // the last call's results have been read
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) partial[warp * kCount + i] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = combine(lane < kWarps ? partial[lane * kCount + i] : neutral);
  }
}

template <int kThreads, int kCount, typename T>
__device__ __forceinline__ void block_sum(T (&x)[kCount]) {
  block_reduce<kThreads>(x, T(0), [](T v) { return warp_sum(v); });
}

template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T x) {
  T values[1] = {x};
  block_sum<kThreads>(values);
  return values[0];
}

template <int kThreads, typename T>
__device__ __forceinline__ T block_max(T x, T lowest) {
  T values[1] = {x};
  block_reduce<kThreads>(values, lowest, [](T v) { return warp_max(v); });
  return values[0];
}

// Threads without a candidate pass {anything <= lowest, INT_MAX}.
template <int kThreads, typename T>
__device__ __forceinline__ ArgMax<T> block_argmax(ArgMax<T> x, T lowest) {
  ArgMax<T> values[1] = {x};
  block_reduce<kThreads>(values, ArgMax<T>{lowest, 0x7fffffff}, [](ArgMax<T> v) { return warp_argmax(v); });
  return values[0];
}

// Sums over a block of any number of warps; every thread takes part and all get the results. Calls take turns between
// two buffers, so that one barrier per call is enough: when a buffer is written again, all have left it.
template <int kCount, typename A, int kMaxWarps>
struct RowSum {
  A* shared;  // [2][kMaxWarps][kCount]
  int turn = 0;

  __device__ __forceinline__ void operator()(A (&x)[kCount]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = warp_sum(x[i]);
    if (warps == 1) return;
    A* const mine = shared + turn * kMaxWarps * kCount;
    turn ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) mine[warp * kCount + i] = x[i];
    }
    __syncthreads();
    constexpr int kPeers = kMaxWarps <= 8 ? 8 : kMaxWarps <= 16 ? 16 : 32;  // lanes that add up; the others do the same
    const int peer = lane % kPeers;
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = peer < warps ? mine[peer * kCount + i] : A(0);
#pragma unroll
    for (int offset = kPeers / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(kFullWarp, x[i], offset);
    }
  }
};

}  // namespace cuda
}  // namespace pyvidx
