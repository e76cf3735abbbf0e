// View: a borrowed, strided tensor. Plain data, no torch, usable on host and device.
#pragma once
#if !defined(__CUDACC_RTC__)
#include <cstdint>
#else
using int8_t = signed char;
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#endif

// Always inlined: a CPU kernel file is compiled once per instruction-set level, and an out-of-line copy of a shared
// template would let the linker keep the AVX-512 one for every machine.
#if defined(__CUDACC__)
#define PYVIDX_INLINE __host__ __device__ __forceinline__
#else
#define PYVIDX_INLINE __attribute__((always_inline)) inline
#endif

namespace pyvidx {

enum class DType : int8_t { f16, bf16, f32, f64, i32, i64, u8 };

template <int kDims>
struct View {
  void* data = nullptr;  // nullptr: this optional tensor is absent
  int64_t size[kDims] = {};
  int64_t stride[kDims] = {};  // in elements
  DType dtype = DType::f32;

  PYVIDX_INLINE explicit operator bool() const { return data != nullptr; }

  // Pointer to element (i0, i1, ...); missing trailing indices are 0.
  template <typename T, typename... Index>
  PYVIDX_INLINE T* at(Index... index) const {
    static_assert(sizeof...(index) <= kDims, "too many indices");
    int64_t offset = 0;
    int d = 0;
    ((offset += int64_t(index) * stride[d++]), ...);
    return static_cast<T*>(data) + offset;
  }
};

}  // namespace pyvidx
