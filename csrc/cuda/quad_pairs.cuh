// The products of the attention kernels on sm_70's tensor cores, which take 16-bit floats (half). mma.m8n8k4 is four
// products of an 8 x 4 and a 4 x 8 tile, one for each pair of quads: lanes 4p to 4p + 3 and 4p + 16 to 4p + 19. Here
// the four are the quarters of a 16 x 16 x 4 product: bit 0 of p chooses the upper or lower 8 rows, bit 1 the left or
// right 8 columns. Layouts of a quarter, from the PTX manual (9.7.15.5.1), with `low` the lane's first two bits and
// `high` 1 for lanes from 16 on:
//   left tile:   row low + 4 high, its 4 elements along k
//   right tile:  the same of a column (.col), or of row low the 4 columns from 4 high on (.row)
//   sums:        element i is of row low % 2 + (i & 2) + 4 high and column (i & 4) + (low & 2) + i % 2
// So keys are read like queries, values as they lie, and nothing is transposed. A 16 x 8 x 16 product is 8 HMMA
// instructions; made of shuffles (mma.cuh) it is about 180.
#pragma once

#include "rows.cuh"

namespace pyvidx::cuda {

#if defined(PYVIDX_EMU)
template <typename T>
constexpr bool kQuadPairs = false;
template <>
inline constexpr bool kQuadPairs<__half> = true;
template <typename T>
__device__ inline bool on_quad_pairs() {
  return kQuadPairs<T> && cuemu::quad_pairs();
}
#else
template <typename T>
constexpr bool kQuadPairs = false;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
template <>
inline constexpr bool kQuadPairs<__half> = true;
#endif
template <typename T>
__device__ __forceinline__ constexpr bool on_quad_pairs() {
  return kQuadPairs<T>;
}
#endif

// Two neighboring tiles of 16 x 8 scores or sums hold a lane's 8 sums: elements 0 to 3 and 4 to 7.
template <bool kRowMajorB>
__device__ __forceinline__ void mma_of_quad_pairs(float (&x)[4], float (&y)[4], unsigned a0, unsigned a1, unsigned b0,
                                                  unsigned b1) {
#if defined(PYVIDX_EMU)
  cuemu::mma_m8n8k4<kRowMajorB>(x, y, a0 | uint64_t(a1) << 32, b0 | uint64_t(b1) << 32);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
#define PYVIDX_MMA(layout)                                                                                      \
  asm volatile("mma.sync.aligned.m8n8k4.row." layout                                                            \
               ".f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, {%0,%1,%2,%3,%4,%5,%6,%7};\n"   \
               : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3]), "+f"(y[0]), "+f"(y[1]), "+f"(y[2]), "+f"(y[3]) \
               : "r"(a0), "r"(a1), "r"(b0), "r"(b1))
  if constexpr (kRowMajorB) {
    PYVIDX_MMA("row");
  } else {
    PYVIDX_MMA("col");
  }
#undef PYVIDX_MMA
#endif
}

// Where a lane stands.
struct QuadPair {
  int low, high, bottom, right;
  __device__ __forceinline__ QuadPair() {
    const int lane = threadIdx.x % 32;
    low = lane % 4, high = lane / 16, bottom = lane / 4 % 2, right = lane / 8 % 2;
  }
  // Of the left tile's 16 rows and the right tile's 16 columns.
  __device__ __forceinline__ int left_row() const { return 8 * bottom + 4 * high + low; }
  __device__ __forceinline__ int right_column() const { return 8 * right + 4 * high + low; }
  // Of the lane's sums: see score_row and score_column.
  __device__ __forceinline__ int row(int half) const { return 8 * bottom + 4 * high + low % 2 + 2 * half; }
  __device__ __forceinline__ int column(int j, int side) const {
    return 16 * (j / 2) + 8 * right + 4 * (j % 2) + low / 2 * 2 + side;
  }
};

template <typename T, int kD, int kTiles, typename L, typename R>
__device__ __forceinline__ void dot_rows_on_quad_pairs(const L& a, int a0, const R& b, int b0, float (&x)[kTiles][4]) {
  static_assert(kTiles % 2 == 0, "whole tiles of 16 columns");
  const QuadPair at;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[j][i] = 0;
  }
  constexpr int kStep = kD > 0 ? 2 : 1;  // chunks of a row: a sector of 32 bytes
  // 2 are as many loads as registers hold, but for rows that are there already.
#pragma unroll(kHeldInRegisters<L> ? 8 : kD > 0 ? 2 : 1)
  for (int d = 0; d < width<kD>(a); d += kStep * kChunk<T>) {
    unsigned left[kStep][kRegisters], right[kTiles / 2][kStep][kRegisters];
#pragma unroll
    for (int s = 0; s < kStep; ++s) {
      load_chunk<T, kD>(a, a0 + at.left_row(), d + s * kChunk<T>, left[s]);
#pragma unroll
      for (int j = 0; j < kTiles / 2; ++j) {
        load_chunk<T, kD>(b, b0 + 16 * j + at.right_column(), d + s * kChunk<T>, right[j][s]);
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles / 2; ++j) {
      if (kD <= 0 && b0 + 16 * j >= b.count) break;
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
#pragma unroll
        for (int i = 0; i < kRegisters; i += 2) {
          mma_of_quad_pairs<false>(x[2 * j], x[2 * j + 1], left[s][i], left[s][i + 1], right[j][s][i],
                                   right[j][s][i + 1]);
        }
      }
    }
  }
}

// Which n-th of a slab's groups of 8 columns: of the right tiles of `part` 0 or 1, the lane's. Both halves of such a
// tile (4 high + 0..3) are each 8 columns in memory, of which a product takes 4: `part` counts groups, not columns.
__device__ __forceinline__ int value_group(int part, int high, int right) { return 4 * part + 2 * high + right; }

template <typename T, int kD, int kTiles, typename R>
__device__ __forceinline__ void add_weighted_on_quad_pairs(const float (&w)[kTiles][4], const R& b, int b0, int slab,
                                                           float (&sum)[kColumns<T>][4]) {
  static_assert(kTiles % 2 == 0 && kColumns<T> == 8, "whole tiles of 16 rows of b");
  const QuadPair at;
  const int lane = threadIdx.x % 32;
  const bool odd = at.low / 2 != 0;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int first = b0 + 16 * (j / 2) + 4 * (j % 2);  // of the rows of b that this takes: these 4 and 8 further on
    if (kD <= 0 && first >= b.count) break;             // and the next one's loads stay behind these products
    unsigned rows[2][2][kRegisters];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int column = slab + 8 * value_group(part, at.high, at.right);
        load_chunk<T, kD>(b, first + 8 * side + at.low, column, rows[side][part]);
      }
    }
    // A left tile wants all 4 elements of one row; a lane has two of each of two rows, the other lane the others.
    const unsigned upper = pack<T>(w[j][0], w[j][1]), lower = pack<T>(w[j][2], w[j][3]);
    const unsigned mine = odd ? lower : upper, others = __shfl_xor_sync(kFullWarp, odd ? upper : lower, 2);
    const unsigned own[2] = {odd ? others : mine, odd ? mine : others};
#pragma unroll
    for (int side = 0; side < 2; ++side) {  // which half of the 16 columns of w: lanes that are `right` have the second
      const unsigned a0 = __shfl_sync(kFullWarp, own[0], (lane & ~8) + 8 * side);
      const unsigned a1 = __shfl_sync(kFullWarp, own[1], (lane & ~8) + 8 * side);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int n = 4 * part + 2 * i;
          mma_of_quad_pairs<true>(sum[n], sum[n + 1], a0, a1, rows[side][part][2 * i], rows[side][part][2 * i + 1]);
        }
      }
    }
  }
}

// Here sum[4 part + 2 i + high] are the columns 4 i + 0..3 of group value_group(part, high): lanes 2 apart swap rows,
// so that each has all 8 columns of one.
template <int kD, typename Out>
__device__ __forceinline__ void store_sums_of_quad_pairs(const float (&sum)[8][4], const Out& out, int a0, int slab) {
  const QuadPair at;
  const bool odd = at.low / 2 != 0;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      float x[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // columns 4 (i / 2) + i % 2, and 2 further on
        const float (&pairs)[4] = sum[4 * part + 2 * (i / 2) + high];
        const float mine = odd ? pairs[2 + i % 2] : pairs[i % 2];
        const float other = __shfl_xor_sync(kFullWarp, odd ? pairs[i % 2] : pairs[2 + i % 2], 2);
        x[4 * (i / 2) + i % 2] = odd ? other : mine;
        x[4 * (i / 2) + 2 + i % 2] = odd ? mine : other;
      }
      store_columns<kD>(out, a0 + at.left_row(), slab + 8 * value_group(part, high, at.right), x);
    }
  }
}

}  // namespace pyvidx::cuda
