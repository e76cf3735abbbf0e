// Rows of tensors, and how a lane takes part of one: what lies together, 16 bytes at a time, from global memory
// straight to the registers of mma (mma.cuh), and back.
#pragma once

#include "mma.cuh"

namespace pyvidx::cuda {

constexpr int kRegisters = 4;  // of one chunk
template <typename T>
constexpr int kChunk = kRegisters * kPacked<T>;  // elements of one chunk: 16 bytes (double: 32)

// Columns of a result that a lane sums up at a time; the warp has 8 times as many.
template <typename T>
constexpr int kColumns = sizeof(T) == 8 ? 4 : 8;

// Rows of D elements, `stride` bytes apart; `count` of them, the others read as 0. A stride of 32 bits makes an address
// one instruction instead of four.
template <typename T, typename Stride = int64_t>
struct Rows {
  using Element = T;
  T* data;
  Stride stride;
  int count, D;
  __device__ __forceinline__ bool has(int row) const { return row < count; }
  __device__ __forceinline__ T* at(int row) const {
    return reinterpret_cast<T*>(reinterpret_cast<int64_t>(data) + int64_t(row) * stride);
  }
  // The same rows from an element on.
  __device__ __forceinline__ Rows from(int d) const { return {data + d, stride, count, D - d}; }
  // Those behind the first ones.
  __device__ __forceinline__ Rows behind(int rows) const { return {at(rows), stride, count - rows, D}; }
};

// Up to 8 rows each of two tensors: rows 0 to 7 and 8 to 15.
template <typename T, typename Stride>
struct RowsOfTwo {
  using Element = T;
  Rows<T, Stride> first, second;
  int count, D;
  __device__ __forceinline__ RowsOfTwo(Rows<T, Stride> first, Rows<T, Stride> second)
      : first(first), second(second), count(second.count > 0 ? 16 : 8), D(first.D) {}
  __device__ __forceinline__ bool has(int row) const { return row % 8 < (row < 8 ? first.count : second.count); }
  __device__ __forceinline__ T* at(int row) const { return (row < 8 ? first : second).at(row % 8); }
  __device__ __forceinline__ RowsOfTwo from(int d) const { return {first.from(d), second.from(d)}; }
};

// p + row * stride bytes in one instruction, which the compiler does not find where it widens a stride in another
// place.
__device__ __forceinline__ int64_t address_of(int64_t p, int row, int stride) {
#if defined(PYVIDX_EMU)
  return p + int64_t(row) * stride;
#else
  int64_t address;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(row), "r"(stride), "l"(p));
  return address;
#endif
}
__device__ __forceinline__ int64_t address_of(int64_t p, int row, int64_t stride) { return p + row * stride; }

// Rows of which there is one at least, the last of them in the place of those behind it: loads need no predicate, where
// what comes of these rows is thrown away.
template <typename T, typename Stride>
struct RepeatedRows : Rows<T, Stride> {
  __device__ __forceinline__ explicit RepeatedRows(Rows<T, Stride> rows) : Rows<T, Stride>(rows) {}
  __device__ __forceinline__ T* at(int row) const {
    return reinterpret_cast<T*>(
        address_of(reinterpret_cast<int64_t>(this->data), min(row, this->count - 1), this->stride));
  }
  __device__ __forceinline__ RepeatedRows from(int d) const { return RepeatedRows(Rows<T, Stride>::from(d)); }
};
template <typename R>
constexpr bool kAllThere = false;
template <typename T, typename Stride>
constexpr bool kAllThere<RepeatedRows<T, Stride>> = true;

// Rows by their addresses, which shared memory holds; nullptr: no row.
template <typename T>
struct RowTable {
  using Element = T;
  T* const* row;
  int64_t offset;  // of the D elements that are read
  int count, D;
  __device__ __forceinline__ bool has(int i) const { return row[i] != nullptr; }
  __device__ __forceinline__ T* at(int i) const { return row[i] + offset; }
  __device__ __forceinline__ RowTable from(int d) const { return {row, offset + d, count, D - d}; }
};

// Are these rows that a lane holds in registers? See HeldRows.
template <typename R>
constexpr bool kHeldInRegisters = false;

// kD: a width that the compiler can unroll for, or one of these. The first two promise that 16-byte accesses fit.
constexpr int kWhole = 0;    // D is that of the rows, a multiple of a chunk
constexpr int kRagged = -1;  // any D, any alignment
// Strides of rows that vectorized kernels read fit in 32 bits, see has_chunks.
template <int kD>
struct StrideOf {
  using type = int;
};
template <>
struct StrideOf<kRagged> {
  using type = int64_t;
};
template <int kD, typename R>
__device__ __forceinline__ int width(const R& rows) {
  return kD > 0 ? kD : rows.D;
}

// R: any of the rows above. A row that is not there reads as 0, and is not written.
template <typename T, int kD, typename R>
__device__ __forceinline__ void load_chunk(const R& rows, int row, int d, Register<T> (&chunk)[kRegisters]) {
  if constexpr (kHeldInRegisters<R>) {
    rows.give(row, d, chunk);
  } else {
    const T* const p = rows.at(row) + d;
    const bool present = rows.has(row) && (kD > 0 || d < rows.D);  // a fixed width is a multiple of what a warp reads
    if constexpr (kD > 0 && kAllThere<R>) {
      uint4 bits[sizeof(chunk) / 16];
#pragma unroll
      for (int i = 0; i < int(sizeof(chunk) / 16); ++i) bits[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
      memcpy(chunk, bits, sizeof chunk);
    } else if constexpr (kD != kRagged) {
      uint4 bits[sizeof(chunk) / 16];
#pragma unroll
      for (int i = 0; i < int(sizeof(chunk) / 16); ++i) bits[i] = load16_if(present, p + i * kVec<T>);
      memcpy(chunk, bits, sizeof chunk);
    } else {
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) chunk[i] = 0;
      if (!present) return;
#pragma unroll 1  // rarely needed, so that it should not take much code: registers move up by one
      for (int i = 0; i < kRegisters; ++i) {
#pragma unroll
        for (int r = 1; r < kRegisters; ++r) chunk[r - 1] = chunk[r];
        T element[kPacked<T>];
#pragma unroll
        for (int e = 0; e < kPacked<T>; ++e) {
          const int at = i * kPacked<T> + e;
          element[e] = d + at < rows.D ? p[at] : from_acc<T>(0);
        }
        memcpy(&chunk[kRegisters - 1], element, sizeof element);
      }
    }
  }
}

// kCount elements from d on of a row of out.
template <int kD, int kCount, typename R, typename A>
__device__ __forceinline__ void store_columns(const R& out, int row, int d, const A (&x)[kCount]) {
  using T = typename R::Element;
  const int D = width<kD>(out);
  if ((kD <= 0 && d >= D) || !out.has(row)) return;
  T* const p = out.at(row) + d;
  if constexpr (kD != kRagged) {
#pragma unroll
    for (int i = 0; i < kCount; i += kVec<T>) {
      if (d + i >= D) return;
      A part[kVec<T>];
#pragma unroll
      for (int e = 0; e < kVec<T>; ++e) part[e] = x[i + e];
      store_vec(p + i, part);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (d + i < D) p[i] = from_acc<T>(x[i]);
    }
  }
}

#ifndef __CUDACC_RTC__
// Can rows along dimension kRow be read in chunks, and have they strides of 32 bits?
template <typename T, int kRow, int kDims>
bool has_chunks(const View<kDims>& x) {
  const int64_t most = 0x7fffffff / int64_t(sizeof(T));
  return x.size[kDims - 1] % kChunk<T> == 0 && vectorizable<T>(x) && x.stride[kRow] <= most && x.stride[kRow] >= -most;
}
#endif

}  // namespace pyvidx::cuda
