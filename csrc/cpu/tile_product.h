// Small matrix products in registers, for operands that lie packed in the caches: attention over a few dozen frames is
// too small for a general GEMM. The columns lie along the vector, so no horizontal sum is ever needed.
#pragma once
#include <type_traits>
#include <utility>

#include "simd.h"

namespace pyvidx {
namespace {

// Half an AVX-512 vector: for columns that fill no more. 8 frames are the most common clip.
typedef float HalfVector __attribute__((vector_size(32)));

// The left operand: element (r, k) at data[r * row + k * step]. One of row and step is usually 1: either a matrix or
// its transpose is read as it lies.
template <typename A>
struct Left {
  const A* data;
  int64_t row, step;
};

// The right operand and the result: rows `row` elements apart, whole vectors of columns. The result may be stored past
// the caches, where its rows are aligned to the stored bytes.
template <typename T>
struct Matrix {
  T* data;
  int64_t row;
  bool stream = false;
};

template <typename V, typename T>
PYVIDX_SIMD V read_vector(const T* p) {
  if constexpr (sizeof(T) == sizeof(V{}[0]))
    return simd::read<V>(p);
  else
    return simd::load(p);
}

// Two bfloat16 that follow each other along the depth: one instruction multiplies both and adds both products.
struct Pair {
  uint32_t bits;
};

template <typename V, typename A>
PYVIDX_SIMD V multiply_add(A a, V b, V sum) {
  return sum + a * b;
}
#if defined(__AVX512BF16__)
PYVIDX_SIMD simd::VF multiply_add(Pair a, simd::VF b, simd::VF sum) {
  return (simd::VF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a.bits), (__m512bh)b);
}
PYVIDX_SIMD HalfVector multiply_add(Pair a, HalfVector b, HalfVector sum) {
  return (HalfVector)_mm256_dpbf16_ps((__m256)sum, (__m256bh)_mm256_set1_epi32(a.bits), (__m256bh)b);
}
#endif

// out[r][c] <- sum_k left(r, k) right[k][c] for kRows rows and kVectors vectors of columns.
template <typename V, int kRows, int kVectors, typename A, typename R, typename O>
PYVIDX_SIMD void tile(Left<A> left, Matrix<const R> right, int64_t depth, Matrix<O> out) {
  constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);
  // An FMA's result is ready after 4 cycles, in which a core starts up to 8: too few sums are split into two.
  constexpr int kChains = simd::kBytes == 64 && kRows * kVectors <= 8 ? 2 : 1;
  V sums[kChains][kRows][kVectors] = {};
  const auto step = [&](int64_t k, V(&acc)[kRows][kVectors]) __attribute__((always_inline)) {
    V b[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) b[c] = read_vector<V>(right.data + k * right.row + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const A a = left.data[r * left.row + k * left.step];
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) acc[r][c] = multiply_add(a, b[c], acc[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + kChains <= depth; k += kChains) {
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) step(k + chain, sums[chain]);
  }
  if (kChains == 2 && k < depth) step(k, sums[0]);
  const auto put = [&](auto how) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) {
        const V sum = kChains == 2 ? sums[0][r][c] + sums[kChains - 1][r][c] : sums[0][r][c];
        O* p = out.data + r * out.row + c * kLanes;
        if constexpr (std::is_same_v<V, simd::Vec<O>>)
          simd::store(p, sum, how);
        else
          simd::write(p, sum);
      }
    }
  };
  out.stream ? put(simd::Stream{}) : put(simd::Full{});
}

// All rows from r0 on, kRows at a time, then by halves.
template <typename V, int kRows, int kVectors, typename A, typename R, typename O, typename F>
PYVIDX_SIMD void tiles(int64_t rows, int64_t depth, Left<A> left, Matrix<const R> right, Matrix<O> out, int64_t r0,
                       F& meanwhile) {
  for (; r0 + kRows <= rows; r0 += kRows) {
    tile<V, kRows, kVectors>(Left<A>{left.data + r0 * left.row, left.row, left.step}, right, depth,
                             Matrix<O>{out.data + r0 * out.row, out.row, out.stream});
    meanwhile(r0, r0 + kRows);
  }
  if constexpr (kRows > 1) {
    if (r0 < rows) tiles<V, kRows / 2, kVectors>(rows, depth, left, right, out, r0, meanwhile);
  }
}

// out [rows][columns] <- left [rows][depth] x right [depth][columns]; `columns` is a multiple of the vector's lanes.
// Fast where four vectors of each row of `right` fit in L1. meanwhile(begin, end) is called for ranges of the rows,
// each row once, between tiles: to start loads that are to arrive while the tiles compute.
template <typename V, typename A, typename R, typename O, typename F>
__attribute__((noinline)) void product(int64_t rows, int64_t columns, int64_t depth, Left<A> left,
                                       Matrix<const R> right, Matrix<O> out, const F& meanwhile) {
  constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);
  constexpr bool kManyRegisters = simd::kBytes == 64;  // 32 of them instead of 16
  int64_t c = 0;
  const auto once = [&](int64_t begin, int64_t end) {
    if (c == 0) meanwhile(begin, end);
  };
  const auto right_at = [&] { return Matrix<const R>{right.data + c, right.row}; };
  const auto out_at = [&] { return Matrix<O>{out.data + c, out.row, out.stream}; };
  if constexpr (kManyRegisters) {
    for (; c + 4 * kLanes <= columns && rows > 8; c += 4 * kLanes)
      tiles<V, 4, 4>(rows, depth, left, right_at(), out_at(), 0, once);
  }
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes)  // up to 8 rows: reads `right` once
    tiles<V, kManyRegisters ? 8 : 4, 2>(rows, depth, left, right_at(), out_at(), 0, once);
  if (c < columns) tiles<V, 8, 1>(rows, depth, left, right_at(), out_at(), 0, once);
}

template <typename V, size_t... i>
PYVIDX_SIMD V interleave_low(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (i % 2 * sizeof...(i) + i / 2)...);
}
template <typename V, size_t... i>
PYVIDX_SIMD V interleave_high(V a, V b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (i % 2 * sizeof...(i) + sizeof...(i) / 2 + i / 2)...);
}

// out [columns][out_ld] <- the transpose of in [rows][columns]. `columns` and out_ld are multiples of the vector's
// lanes; columns of out from `rows` on, up to out_ld, become 0.
template <typename V, typename A>
__attribute__((noinline)) void transpose(Matrix<const A> in, int64_t rows, int64_t columns, A* out, int64_t out_ld) {
  constexpr int kLanes = sizeof(V) / sizeof(A);
  constexpr auto kIndex = std::make_index_sequence<kLanes>();
  for (int64_t r0 = 0; r0 < out_ld; r0 += kLanes) {
    for (int64_t c0 = 0; c0 < columns; c0 += kLanes) {
      V block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = r0 + i < rows ? simd::read<V>(in.data + (r0 + i) * in.row + c0) : V{};
#pragma GCC unroll 4
      for (int round = 1; round < kLanes; round *= 2) {  // each a perfect shuffle of the block
        V next[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes / 2; ++i) {
          next[2 * i] = interleave_low(block[i], block[i + kLanes / 2], kIndex);
          next[2 * i + 1] = interleave_high(block[i], block[i + kLanes / 2], kIndex);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = next[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) simd::write(out + (c0 + i) * out_ld + r0, block[i]);
    }
  }
}

}  // namespace
}  // namespace pyvidx
