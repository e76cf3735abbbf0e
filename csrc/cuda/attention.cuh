// The pieces the attention kernels are made of. A warp owns 16 rows (queries, or keys in a backward kernel) of one head
// and meets all rows of the other side. Every operand goes from global memory to mma's registers with 16-byte loads and
// without shared memory: the order of d within a product is free (mma.cuh), so a lane takes what lies together.
#pragma once

#include "quad_pairs.cuh"

namespace pyvidx::cuda {

// Scores x[j][i] and sums of a lane belong to the rows score_row(i / 2) of the warp's 16, scores to the columns
// score_column(j, i % 2) of its kTiles tiles of 8; four lanes share a row.
template <typename T>
__device__ __forceinline__ int score_row(int half) {
  const int lane = threadIdx.x % 32;
  return on_quad_pairs<T>() ? QuadPair().row(half) : lane / 4 + 8 * half;
}
template <typename T>
__device__ __forceinline__ int score_column(int j, int side) {
  const int lane = threadIdx.x % 32;
  return on_quad_pairs<T>() ? QuadPair().column(j, side) : 8 * j + lane % 4 * 2 + side;
}
// One of the four lanes of a row.
template <typename T>
__device__ __forceinline__ bool first_of_row() {
  return score_column<T>(0, 0) == 0;
}

// The warp's 16 rows of kD elements in registers, each lane with what dot_rows asks of it as the left side: of two rows
// a chunk in four, or one row (quad_pairs.cuh).
template <typename T, int kD>
struct HeldRows {
  static constexpr int D = kD, kEach = 4 * kChunk<T>;
  Register<T> two[2][kD / kEach][kRegisters], one[kD / kChunk<T>][kRegisters];

  template <typename R>
  __device__ __forceinline__ explicit HeldRows(const R& rows) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    if (on_quad_pairs<T>()) {
#pragma unroll
      for (int i = 0; i < kD / kChunk<T>; ++i) load_chunk<T, kD>(rows, QuadPair().left_row(), i * kChunk<T>, one[i]);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kD / kEach; ++i) {
          load_chunk<T, kD>(rows.from(c * kChunk<T>), g + 8 * half, i * kEach, two[half][i]);
        }
      }
    }
  }
  __device__ __forceinline__ const HeldRows& from(int) const { return *this; }
  // A chunk of row `row`; on a GPU the indices are constants.
  __device__ __forceinline__ void give(int row, int d, Register<T> (&chunk)[kRegisters]) const {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      chunk[i] = on_quad_pairs<T>() ? one[d / kChunk<T>][i] : two[row / 8][d / kEach][i];
    }
  }
};
template <typename T, int kD>
constexpr bool kHeldInRegisters<HeldRows<T, kD>> = true;

// x <- the products of the warp's 16 rows of a, from row a0 on, with rows b0 .. b0 + 8 kTiles - 1 of b. All rows are
// loaded before the first product, so that their latencies pass together.
template <typename T, int kD, int kTiles, typename L, typename R>
__device__ __forceinline__ void dot_rows(const L& a, int a0, const R& b, int b0, Acc<T> (&x)[kTiles][4]) {
  if constexpr (kQuadPairs<T>) {
    if (on_quad_pairs<T>()) return dot_rows_on_quad_pairs<T, kD>(a, a0, b, b0, x);
  }
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const auto left_rows = a.from(c * kChunk<T>);
  const auto right_rows = b.from(c * kChunk<T>);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[j][i] = 0;
  }
  // As many loads ahead as registers hold. A branch keeps those behind it from moving up.
#pragma unroll(kD <= 0 ? 1 : sizeof(T) == 4 ? 2 : 8)
  for (int d = 0; d < width<kD>(a); d += 4 * kChunk<T>) {
    constexpr int kMost = kD <= 0 ? 2 : sizeof(T) == 4 ? 4 : 8, kAhead = kTiles < kMost ? kTiles : kMost;
    Register<T> top[kRegisters], bottom[kRegisters], other[kAhead][kRegisters];
    load_chunk<T, kD>(left_rows, a0 + g, d, top);
    load_chunk<T, kD>(left_rows, a0 + g + 8, d, bottom);
#pragma unroll
    for (int j0 = 0; j0 < kTiles; j0 += kAhead) {
      if (kAhead < kTiles && b0 + 8 * j0 >= b.count) break;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) load_chunk<T, kD>(right_rows, b0 + 8 * (j0 + j) + g, d, other[j]);
#pragma unroll
      for (int i = 0; i < kRegisters; i += 2) {
        const Register<T> left[4] = {top[i], bottom[i], top[i + 1], bottom[i + 1]};
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (!on_tensor_cores<T>() && b0 + 8 * (j0 + j) >= b.count) break;
          const Register<T> right[2] = {other[j][i], other[j][i + 1]};
          mma<T>(x[j0 + j], left, right);
        }
      }
    }
  }
}

// Which n-th of the 8 groups of columns column g of mma's right tiles stands for. A lane of the sums has columns 2c and
// 2c + 1: this way what the four lanes of a row store at once lies together.
__device__ __forceinline__ int column_group(int g) { return g / 2 + 4 * (g % 2); }

// sum[n] += w b for the columns from `slab` on, with w as dot_rows leaves it for rows b0 .. b0 + 8 kTiles - 1 of b.
template <typename T, int kD, int kTiles, typename R>
__device__ __forceinline__ void add_weighted(const Acc<T> (&w)[kTiles][4], const R& b, int b0, int slab,
                                             Acc<T> (&sum)[kColumns<T>][4]) {
  if constexpr (kQuadPairs<T>) {
    if (on_quad_pairs<T>()) return add_weighted_on_quad_pairs<T, kD>(w, b, b0, slab, sum);
  }
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  constexpr int kChunks = kColumns<T> / kChunk<T>;
  constexpr int kStep = kPacked<T>;  // tiles that one mma takes: 8 rows of b, or 16
  const auto columns = b.from(kColumns<T> * column_group(g));
#pragma unroll
  for (int j = 0; j < kTiles; j += kStep) {
    const bool ahead = kD > 0 && on_tensor_cores<T>() && (sizeof(T) == 2 || j % 4 != 0);  // loads, as above
    if (!ahead && b0 + 8 * j >= b.count) break;
    Register<T> rows[kStep][2][kChunks][kRegisters];  // two neighboring rows of each tile
#pragma unroll
    for (int s = 0; s < kStep; ++s) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          load_chunk<T, kD>(columns, b0 + 8 * (j + s) + 2 * c + r, slab + i * kChunk<T>, rows[s][r][i]);
        }
      }
    }
    Register<T> left[4];
    if constexpr (kStep == 2) {
      constexpr int kNext = kTiles > 1;  // there is a second tile
      left[0] = pack<T>(w[j][0], w[j][1]), left[1] = pack<T>(w[j][2], w[j][3]);
      left[2] = kNext ? pack<T>(w[j + kNext][0], w[j + kNext][1]) : 0u;
      left[3] = kNext ? pack<T>(w[j + kNext][2], w[j + kNext][3]) : 0u;
    } else {
      left[0] = w[j][0], left[1] = w[j][2], left[2] = w[j][1], left[3] = w[j][3];
    }
#pragma unroll
    for (int n = 0; n < kColumns<T>; ++n) {
      Register<T> right[2];
      if constexpr (kStep == 2) {  // element n of the two rows beside each other
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const unsigned low = rows[s][0][0][n / 2], high = rows[s][1][0][n / 2];
          right[s] = __byte_perm(low, high, n % 2 ? 0x7632 : 0x5410);
        }
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) right[r] = rows[0][r][n / kChunk<T>][n % kChunk<T>];
      }
      mma<T>(sum[n], left, right);
    }
  }
}

// Rows a0 .. a0 + 15 of out, columns from `slab` on, <- the sums of add_weighted<T>.
template <typename T, int kD, typename Out>
__device__ __forceinline__ void store_sums(const Acc<T> (&sum)[kColumns<T>][4], const Out& out, int a0, int slab) {
  if constexpr (kQuadPairs<T>) {
    if (on_quad_pairs<T>()) return store_sums_of_quad_pairs<kD>(sum, out, a0, slab);
  }
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Acc<T> x[kColumns<T>];
#pragma unroll
      for (int n = 0; n < kColumns<T>; ++n) x[n] = sum[n][2 * half + side];
      store_columns<kD>(out, a0 + g + 8 * half, slab + kColumns<T> * column_group(2 * c + side), x);
    }
  }
}

// out rows a0 + 0..15 <- w b, with w for all rows of b as dot_rows leaves it.
template <typename T, int kD, int kTiles, typename R, typename Out>
__device__ __forceinline__ void weigh_rows(const Acc<T> (&w)[kTiles][4], const R& b, const Out& out, int a0) {
#pragma unroll(kD > 0 ? 8 : 1)
  for (int slab = 0; slab < width<kD>(b); slab += 8 * kColumns<T>) {
    Acc<T> sum[kColumns<T>][4] = {};
    add_weighted<T, kD>(w, b, 0, slab, sum);
    store_sums<T, kD>(sum, out, a0, slab);
  }
}

// The same where the weights are more than registers hold: weights(b0, w) computes them, kTiles at a time, once per
// slab.
template <typename T, int kD, int kTiles, typename F, typename R, typename Out>
__device__ __forceinline__ void weigh_rows_by_parts(F&& weights, const R& b, const Out& out, int a0) {
#pragma unroll 1
  for (int slab = 0; slab < width<kD>(b); slab += 8 * kColumns<T>) {
    Acc<T> sum[kColumns<T>][4] = {};
#pragma unroll 1
    for (int b0 = 0; b0 < b.count; b0 += 8 * kTiles) {
      Acc<T> w[kTiles][4];
      weights(b0, w);
      add_weighted<T, kD>(w, b, b0, slab, sum);
    }
    store_sums<T, kD>(sum, out, a0, slab);
  }
}

// ---- softmax over the rows of scores ----

__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }

// Over the four lanes that share a row.
template <typename T>
__device__ __forceinline__ Acc<T> row_sum(Acc<T> x) {
  x += __shfl_xor_sync(kFullWarp, x, on_quad_pairs<T>() ? 2 : 1);
  return x + __shfl_xor_sync(kFullWarp, x, on_quad_pairs<T>() ? 8 : 2);
}
template <typename T>
__device__ __forceinline__ Acc<T> row_max(Acc<T> x) {
  x = larger(x, __shfl_xor_sync(kFullWarp, x, on_quad_pairs<T>() ? 2 : 1));
  return larger(x, __shfl_xor_sync(kFullWarp, x, on_quad_pairs<T>() ? 8 : 2));
}

constexpr double kAbsent = -3e38;              // the score of what is not there
constexpr double kLog2e = 1.4426950408889634;  // part of `scale` here: a power of two is one instruction

// The largest score (in units of log 2) of a row and 1 / the sum of its exponentials.
template <typename A>
struct Softmax {
  A largest, inverse;
  __device__ __forceinline__ A weight(A score) const { return power_of_two(score - largest) * inverse; }
};

// f(column, half, x) for each of this lane's scores, the tiles' first column being c0.
template <typename T, int kTiles, typename F>
__device__ __forceinline__ void each_score(Acc<T> (&x)[kTiles][4], int c0, F&& f) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) f(c0 + score_column<T>(j, i % 2), i / 2, x[j][i]);
  }
}

// x <- 2^(scale x), divided by its sum over the columns of which present(column, half), which is not asked if `all`;
// the other columns become 0. One Softmax for each of the lane's rows.
template <typename T, int kTiles, typename Present>
__device__ __forceinline__ void softmax_rows(Acc<T> (&x)[kTiles][4], Acc<T> scale, bool all, Present&& present,
                                             Softmax<Acc<T>> (&rows)[2]) {
  using A = Acc<T>;
  A largest[2] = {A(kAbsent), A(kAbsent)}, sum[2] = {};
  each_score<T>(x, 0, [&](int, int, A& s) { s *= scale; });
  if (!all) {
    each_score<T>(x, 0, [&](int column, int half, A& s) { s = present(column, half) ? s : A(kAbsent); });
  }
  each_score<T>(x, 0, [&](int, int half, A& s) { largest[half] = larger(largest[half], s); });
#pragma unroll
  for (int half = 0; half < 2; ++half) largest[half] = row_max<T>(largest[half]);
  each_score<T>(x, 0, [&](int, int half, A& s) { sum[half] += s = power_of_two(s - largest[half]); });
#pragma unroll
  for (int half = 0; half < 2; ++half) rows[half] = {largest[half], reciprocal(row_sum<T>(sum[half]))};
  each_score<T>(x, 0, [&](int, int half, A& s) { s *= rows[half].inverse; });
}

// The same Softmax for query rows q0 + 0..15 without keeping the scores, kTiles tiles of keys at a time.
template <typename T, int kD, int kTiles, typename R>
__device__ __forceinline__ void softmax_by_parts(const R& q, int q0, const R& k, Acc<T> scale,
                                                 Softmax<Acc<T>> (&rows)[2]) {
  using A = Acc<T>;
  A largest[2] = {A(kAbsent), A(kAbsent)}, sum[2] = {};  // the sums of this lane's columns
#pragma unroll 1
  for (int k0 = 0; k0 < k.count; k0 += 8 * kTiles) {
    A x[kTiles][4], next[2] = {largest[0], largest[1]};
    dot_rows<T, kD>(q, q0, k, k0, x);
    each_score<T>(x, k0, [&](int column, int half, A& s) {
      s = column < k.count ? s * scale : A(kAbsent);
      next[half] = larger(next[half], s);
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      next[half] = row_max<T>(next[half]);
      sum[half] *= power_of_two(largest[half] - next[half]);
      largest[half] = next[half];
    }
    each_score<T>(x, k0, [&](int, int half, A& s) { sum[half] += power_of_two(s - largest[half]); });
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) rows[half] = {largest[half], reciprocal(row_sum<T>(sum[half]))};
}

}  // namespace pyvidx::cuda
