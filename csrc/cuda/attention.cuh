// The pieces the attention kernels are made of. A warp owns 16 rows (queries, or keys in a backward kernel) of one head
// and meets all rows of the other side. Every operand goes from global memory to mma's registers with 16-byte loads and
// without shared memory: the order of d within a product is free (mma.cuh), so a lane takes what lies together.
#pragma once

#include "mma.cuh"

namespace pyvidx::cuda {

constexpr int kRegisters = 4;  // of one chunk
template <typename T>
constexpr int kChunk = kRegisters * kPacked<T>;  // elements of one chunk: 16 bytes (double: 32)

// Columns of a result that a lane sums up at a time; the warp has 8 times as many.
template <typename T>
constexpr int kColumns = sizeof(T) == 8 ? 4 : 8;

// Rows of D elements, `stride` apart; `count` of them, the others read as 0.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  int count, D;
  __device__ __forceinline__ T* at(int row) const { return row < count ? data + row * stride : nullptr; }
};

// Rows by their addresses, which shared memory holds; nullptr: no row.
template <typename T>
struct RowTable {
  T* const* row;
  int64_t offset;  // of the D elements that are read
  int count, D;
  __device__ __forceinline__ T* at(int i) const { return row[i] == nullptr ? nullptr : row[i] + offset; }
};

// kD: a width that the compiler can unroll for, or one of these. The first two promise that 16-byte accesses fit.
constexpr int kWhole = 0;    // D is that of the rows, a multiple of a chunk
constexpr int kRagged = -1;  // any D, any alignment
template <int kD, typename R>
__device__ __forceinline__ int width(const R& rows) {
  return kD > 0 ? kD : rows.D;
}

// R: Rows or RowTable. A row that is not there reads as 0, and is not written.
template <typename T, int kD, typename R>
__device__ __forceinline__ void load_chunk(const R& rows, int row, int d, Register<T> (&chunk)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) chunk[i] = 0;
  const int D = width<kD>(rows);
  if (d >= D) return;
  const T* p = rows.at(row);
  if (p == nullptr) return;
  p += d;
  if constexpr (kD != kRagged) {
    uint4 bits[sizeof(chunk) / 16];
#pragma unroll
    for (int i = 0; i < int(sizeof(chunk) / 16); ++i) bits[i] = reinterpret_cast<const uint4*>(p)[i];
    memcpy(chunk, bits, sizeof chunk);
  } else {
#pragma unroll 1  // rarely needed, so that it should not take much code: registers move up by one
    for (int i = 0; i < kRegisters; ++i) {
#pragma unroll
      for (int r = 1; r < kRegisters; ++r) chunk[r - 1] = chunk[r];
      T element[kPacked<T>];
#pragma unroll
      for (int e = 0; e < kPacked<T>; ++e) {
        const int at = i * kPacked<T> + e;
        element[e] = d + at < D ? p[at] : from_acc<T>(0);
      }
      memcpy(&chunk[kRegisters - 1], element, sizeof element);
    }
  }
}

// x[j] <- the products of the warp's 16 rows of a, from row a0 on, with rows b0 + 8j .. b0 + 8j + 7 of b. A lane gets
// {row g, columns 2c and 2c + 1; row g + 8, the same columns}.
template <typename T, int kD, int kTiles, typename L, typename R>
__device__ __forceinline__ void dot_rows(const L& a, int a0, const R& b, int b0, Acc<T> (&x)[kTiles][4]) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[j][i] = 0;
  }
#pragma unroll(kD > 0 ? 8 : 1)
  for (int d = 0; d < width<kD>(a); d += 4 * kChunk<T>) {
    Register<T> top[kRegisters], bottom[kRegisters];
    load_chunk<T, kD>(a, a0 + g, d + c * kChunk<T>, top);
    load_chunk<T, kD>(a, a0 + g + 8, d + c * kChunk<T>, bottom);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (b0 + 8 * j >= b.count) break;
      Register<T> other[kRegisters];
      load_chunk<T, kD>(b, b0 + 8 * j + g, d + c * kChunk<T>, other);
#pragma unroll
      for (int i = 0; i < kRegisters; i += 2) {
        const Register<T> left[4] = {top[i], bottom[i], top[i + 1], bottom[i + 1]}, right[2] = {other[i], other[i + 1]};
        mma<T>(x[j], left, right);
      }
    }
  }
}

// Which n-th of the 8 groups of columns column g of mma's right tiles stands for. A lane of the sums has columns 2c and
// 2c + 1: this way what the four lanes of a row store at once lies together.
__device__ __forceinline__ int column_group(int g) { return g / 2 + 4 * (g % 2); }

template <typename T, int kD, int kCount, typename R>
__device__ __forceinline__ void store_columns(const R& out, int row, int d, const Acc<T> (&x)[kCount]) {
  const int D = width<kD>(out);
  if (d >= D) return;
  T* p = out.at(row);
  if (p == nullptr) return;
  p += d;
  if constexpr (kD != kRagged) {
#pragma unroll
    for (int i = 0; i < kCount; i += kVec<T>) {
      if (d + i >= D) return;
      Acc<T> part[kVec<T>];
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

// sum[n] += w b for the columns from `slab` on, with w as dot_rows leaves it for rows b0 .. b0 + 8 kTiles - 1 of b.
template <typename T, int kD, int kTiles, typename R>
__device__ __forceinline__ void add_weighted(const Acc<T> (&w)[kTiles][4], const R& b, int b0, int slab,
                                             Acc<T> (&sum)[kColumns<T>][4]) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  constexpr int kChunks = kColumns<T> / kChunk<T>;
  constexpr int kStep = kPacked<T>;  // tiles that one mma takes: 8 rows of b, or 16
#pragma unroll
  for (int j = 0; j < kTiles; j += kStep) {
    if (b0 + 8 * j >= b.count) break;
    Register<T> rows[kStep][2][kChunks][kRegisters];  // two neighboring rows of each tile
#pragma unroll
    for (int s = 0; s < kStep; ++s) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          const int column = slab + kColumns<T> * column_group(g) + i * kChunk<T>;
          load_chunk<T, kD>(b, b0 + 8 * (j + s) + 2 * c + r, column, rows[s][r][i]);
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
          right[s] = n % 2 ? low >> 16 | (high & 0xffff0000u) : (low & 0xffffu) | high << 16;
        }
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) right[r] = rows[0][r][n / kChunk<T>][n % kChunk<T>];
      }
      mma<T>(sum[n], left, right);
    }
  }
}

template <typename T, int kD, typename R>
__device__ __forceinline__ void store_sums(const Acc<T> (&sum)[kColumns<T>][4], const R& out, int a0, int slab) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Acc<T> x[kColumns<T>];
#pragma unroll
      for (int n = 0; n < kColumns<T>; ++n) x[n] = sum[n][2 * half + side];
      store_columns<T, kD, kColumns<T>>(out, a0 + g + 8 * half, slab + kColumns<T> * column_group(2 * c + side), x);
    }
  }
}

// out rows a0 + 0..15 <- w b, with w for all rows of b as dot_rows leaves it.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void weigh_rows(const Acc<T> (&w)[kTiles][4], const Rows<const T>& b, const Rows<T>& out,
                                           int a0) {
#pragma unroll(kD > 0 ? 8 : 1)
  for (int slab = 0; slab < width<kD>(b); slab += 8 * kColumns<T>) {
    Acc<T> sum[kColumns<T>][4] = {};
    add_weighted<T, kD>(w, b, 0, slab, sum);
    store_sums<T, kD>(sum, out, a0, slab);
  }
}

// The same where the weights are more than registers hold: weights(b0, w) computes them, kTiles at a time, once per
// slab.
template <typename T, int kD, int kTiles, typename F>
__device__ __forceinline__ void weigh_rows_by_parts(F&& weights, const Rows<const T>& b, const Rows<T>& out, int a0) {
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

// ---- softmax over the rows of scores, which the 4 lanes of the same g hold ----

template <typename A>
__device__ __forceinline__ A quad_sum(A x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}
template <typename A>
__device__ __forceinline__ A quad_max(A x) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const A other = __shfl_xor_sync(kFullWarp, x, bit);
    x = other > x ? other : x;
  }
  return x;
}
__device__ __forceinline__ float power_of_two(float x) { return exp2f(x); }
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }

constexpr double kAbsent = -3e38;              // the score of what is not there
constexpr double kLog2e = 1.4426950408889634;  // part of `scale` here: a power of two is one instruction

// The largest score (in units of log 2) of a row and 1 / the sum of its exponentials.
template <typename A>
struct Softmax {
  A largest, inverse;
  __device__ __forceinline__ A weight(A score) const { return power_of_two(score - largest) * inverse; }
};

// f(column, 0 for row g or 1 for row g + 8, x) for each of this lane's scores, the tiles' first column being c0.
template <int kTiles, typename A, typename F>
__device__ __forceinline__ void each_score(A (&x)[kTiles][4], int c0, F&& f) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) f(c0 + 8 * j + 2 * int(threadIdx.x % 4) + i % 2, i / 2, x[j][i]);
  }
}

// x <- 2^(scale x), divided by its sum, over columns 0..T-1; the other columns become 0. One Softmax for row g, one for
// row g + 8.
template <int kTiles, typename A>
__device__ __forceinline__ void softmax_rows(A (&x)[kTiles][4], int T, A scale, Softmax<A> (&rows)[2]) {
  A largest[2] = {A(kAbsent), A(kAbsent)}, sum[2] = {};
  each_score(x, 0, [&](int column, int half, A& s) {
    s = column < T ? s * scale : A(kAbsent);
    largest[half] = s > largest[half] ? s : largest[half];
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) largest[half] = quad_max(largest[half]);
  each_score(x, 0, [&](int, int half, A& s) { sum[half] += s = power_of_two(s - largest[half]); });
#pragma unroll
  for (int half = 0; half < 2; ++half) rows[half] = {largest[half], 1 / quad_sum(sum[half])};
  each_score(x, 0, [&](int, int half, A& s) { s *= rows[half].inverse; });
}

// The same Softmax for query rows q0 + 0..15 without keeping the scores, kTiles tiles of keys at a time.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void softmax_by_parts(const Rows<const T>& q, int q0, const Rows<const T>& k, Acc<T> scale,
                                                 Softmax<Acc<T>> (&rows)[2]) {
  using A = Acc<T>;
  A largest[2] = {A(kAbsent), A(kAbsent)}, sum[2] = {};  // the sums of this lane's columns
#pragma unroll 1
  for (int k0 = 0; k0 < k.count; k0 += 8 * kTiles) {
    A x[kTiles][4], next[2] = {largest[0], largest[1]};
    dot_rows<T, kD>(q, q0, k, k0, x);
    each_score(x, k0, [&](int column, int half, A& s) {
      s = column < k.count ? s * scale : A(kAbsent);
      next[half] = s > next[half] ? s : next[half];
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      next[half] = quad_max(next[half]);
      sum[half] *= power_of_two(largest[half] - next[half]);
      largest[half] = next[half];
    }
    each_score(x, k0, [&](int, int half, A& s) { sum[half] += power_of_two(s - largest[half]); });
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) rows[half] = {largest[half], 1 / quad_sum(sum[half])};
}

}  // namespace pyvidx::cuda
