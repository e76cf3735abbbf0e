// mma: the product of a 16 x k and a k x 8 tile held by a warp, added to a 16 x 8 tile, for every floating type: on
// tensor cores where the GPU has fitting ones, otherwise with shuffles (sm_70, float before sm_80, double; the emulator
// does either, see tests/cuda_emu/tensor_cores.h).
//
// With g = lane / 4 and c = lane % 4, a lane holds, of the left tile, registers {0, 2} of row g and {1, 3} of row g +
// 8; of the right tile, two registers of column g; of the sums, columns 2c and 2c + 1 of rows g and g + 8. A register
// holds one element, or two 16-bit ones, that follow each other along k. Which k they stand for is up to the caller:
// the elements of a lane's register of the left tile meet those of the same register (0 or 1 of a row or column) of the
// lanes of the same c in the right tile, and a sum does not mind the order of its terms.
#pragma once

#include "block.cuh"
#if defined(PYVIDX_EMU)
#include "tensor_cores.h"
#endif

namespace pyvidx::cuda {

template <typename T>
struct RegisterOf {
  using type = Acc<T>;
};
template <>
struct RegisterOf<__half> {
  using type = unsigned;
};
template <>
struct RegisterOf<__nv_bfloat16> {
  using type = unsigned;
};
template <typename T>
using Register = typename RegisterOf<T>::type;
template <typename T>
constexpr int kPacked = sizeof(Register<T>) / sizeof(T);  // elements per register

// Round two numbers to 16 bits; the first one lies in the lower half.
template <typename T>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  unsigned bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
template <>
__device__ __forceinline__ unsigned pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  unsigned bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// The elements of a register, in the accumulator's type.
template <typename T>
__device__ __forceinline__ void unpack(Register<T> bits, Acc<T> (&x)[kPacked<T>]) {
  if constexpr (kPacked<T> == 1) {
    x[0] = bits;
  } else {
    const unsigned short half[2] = {static_cast<unsigned short>(bits), static_cast<unsigned short>(bits >> 16)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      T element;
      memcpy(static_cast<void*>(&element), &half[i], sizeof element);
      x[i] = to_acc(element);
    }
  }
}

// sum + the products of the elements of two registers
template <typename T>
__device__ __forceinline__ Acc<T> register_dot(Register<T> a, Register<T> b, Acc<T> sum) {
  Acc<T> x[kPacked<T>], y[kPacked<T>];
  unpack<T>(a, x);
  unpack<T>(b, y);
#pragma unroll
  for (int i = 0; i < kPacked<T>; ++i) sum += x[i] * y[i];
  return sum;
}

// By value and out of line: an unrolled kernel holds hundreds of these, and ptxas then takes minutes over it.
template <typename T>
struct Tiles {
  Acc<T> sum[4];
  Register<T> a[4], b[2];
};
template <typename T>
struct Sums {
  Acc<T> sum[4];
};
template <typename T>
__device__ __attribute__((noinline)) Sums<T> mma_with_shuffles(Tiles<T> t) {
  const int lane = threadIdx.x % 32, row = lane & ~3, column = lane % 4 * 8;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Register<T> top = __shfl_sync(kFullWarp, t.a[2 * i], row + c);
      const Register<T> bottom = __shfl_sync(kFullWarp, t.a[2 * i + 1], row + c);
      const Register<T> left = __shfl_sync(kFullWarp, t.b[i], column + c);
      const Register<T> right = __shfl_sync(kFullWarp, t.b[i], column + 4 + c);
      t.sum[0] = register_dot<T>(top, left, t.sum[0]);
      t.sum[1] = register_dot<T>(top, right, t.sum[1]);
      t.sum[2] = register_dot<T>(bottom, left, t.sum[2]);
      t.sum[3] = register_dot<T>(bottom, right, t.sum[3]);
    }
  }
  return {{t.sum[0], t.sum[1], t.sum[2], t.sum[3]}};
}

// ---- tensor cores: which types have one instruction for the product, and that instruction. float stands for tf32,
// whose numbers are floats with 10 bits behind the point. ----

#if defined(PYVIDX_EMU)
template <typename T>
constexpr bool kTensorCores = sizeof(T) <= 4;
__device__ inline bool tensor_cores() { return cuemu::tensor_cores(); }
template <typename T>
__device__ inline void tensor_mma(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  cuemu::tensor_mma<T>(sum, a, b);
}
#else
__device__ __forceinline__ constexpr bool tensor_cores() { return true; }
template <typename T>
__device__ void tensor_mma(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <typename T>
constexpr bool kTensorCores = sizeof(T) <= 4;
#define PYVIDX_TENSOR_MMA(T, instruction)                                                                          \
  template <>                                                                                                      \
  __device__ __forceinline__ void tensor_mma<T>(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { \
    asm volatile(instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"                            \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
  }
PYVIDX_TENSOR_MMA(__half, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
PYVIDX_TENSOR_MMA(__nv_bfloat16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
PYVIDX_TENSOR_MMA(float, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef PYVIDX_TENSOR_MMA
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
template <typename T>
constexpr bool kTensorCores = false;
template <>
inline constexpr bool kTensorCores<__half> = true;
template <>
__device__ __forceinline__ void tensor_mma<__half>(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
  }
}
#else
template <typename T>
constexpr bool kTensorCores = false;
#endif
#endif

// Does mma<T> take tensor cores here?
template <typename T>
__device__ __forceinline__ constexpr bool on_tensor_cores() {
  if constexpr (kTensorCores<T>) return tensor_cores();
  return false;
}

// The nearest of tf32, ties away from zero. cvt.rna.tf32 does the same in about five instructions, for a NaN's sake.
__device__ __forceinline__ unsigned to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & ~0x1fffu; }

// Float at nearly full precision: with each number as the sum of two of tf32 (what is lost is below 2^-21 of it; tensor
// cores ignore the last bits of the smaller one, and a NaN passes through it), three products; the fourth is below a
// float's rounding. Tensor cores truncate what they add up, always toward zero, so the products go into a tile of their
// own, and it is added to the sum as floats are, to nearest: a sum of many tiles would otherwise drift by a truncation
// of the whole sum per tile.
template <typename T>
__device__ __forceinline__ void mma_of_halves(float (&sum)[4], const T (&a)[4], const T (&b)[2]) {
  unsigned a_high[4], a_low[4], b_high[2], b_low[2];
  const auto split = [](float x, unsigned& high, unsigned& low) {
    high = to_tf32(x);
    low = __float_as_uint(x - __uint_as_float(high));
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) split(a[i], a_high[i], a_low[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) split(b[i], b_high[i], b_low[i]);
  float part[4] = {};
  tensor_mma<T>(part, a_low, b_high);
  tensor_mma<T>(part, a_high, b_low);
  tensor_mma<T>(part, a_high, b_high);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += part[i];
}

// All lanes of the warp take part.
template <typename T>
__device__ __forceinline__ void mma(Acc<T> (&sum)[4], const Register<T> (&a)[4], const Register<T> (&b)[2]) {
  if constexpr (kTensorCores<T>) {
    if (tensor_cores()) {
      if constexpr (sizeof(T) == 4) {
        mma_of_halves<T>(sum, a, b);
      } else {
        tensor_mma<T>(sum, a, b);
      }
      return;
    }
  }
  const Sums<T> out = mma_with_shuffles<T>({{sum[0], sum[1], sum[2], sum[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = out.sum[i];
}

}  // namespace pyvidx::cuda
