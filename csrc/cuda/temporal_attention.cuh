// The pieces temporal_attention's kernels are made of. A warp owns 16 rows (queries, or keys in the backward kernel) of
// one (b, p, h) and meets all T rows of the other side. Every operand goes from global memory to mma's registers with
// 16-byte loads and without shared memory: the order of d within a product is free (mma.cuh), so a lane takes what lies
// together.
#pragma once

#include "mma.cuh"

namespace pyvidx::cuda {

constexpr int kRegisters = 4;  // of one chunk
template <typename T>
constexpr int kChunk = kRegisters * kPacked<T>;  // elements of one chunk: 16 bytes (double: 32)

// Columns of a result that a lane sums up at a time, of 8 times as many per warp; fewer where scores take the
// registers.
template <typename T, int kTiles>
constexpr int kColumns = sizeof(T) == 2 || (sizeof(T) == 4 && kTiles <= 8) ? 8 : 4;

// Rows of D elements, `stride` apart; `count` of them, the others read as 0.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  int count, D;
  bool vectorized;  // 16-byte accesses fit, and D is a multiple of them
};

// D is that of the rows, or a constant the compiler can unroll for.
template <int kD, typename T>
__device__ __forceinline__ int width(const Rows<T>& rows) {
  return kD > 0 ? kD : rows.D;
}

template <int kD, typename T>
__device__ __forceinline__ void load_chunk(const Rows<const T>& rows, int row, int d,
                                           Register<T> (&chunk)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) chunk[i] = 0;
  const int D = width<kD>(rows);
  if (row >= rows.count || d >= D) return;
  const T* p = rows.data + row * rows.stride + d;
  if (kD > 0 || rows.vectorized) {
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
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void dot_rows(const Rows<const T>& a, int a0, const Rows<const T>& b, int b0,
                                         Acc<T> (&x)[kTiles][4]) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[j][i] = 0;
  }
#pragma unroll(kD > 0 ? 8 : 1)
  for (int d = 0; d < width<kD>(a); d += 4 * kChunk<T>) {
    Register<T> top[kRegisters], bottom[kRegisters];
    load_chunk<kD>(a, a0 + g, d + c * kChunk<T>, top);
    load_chunk<kD>(a, a0 + g + 8, d + c * kChunk<T>, bottom);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (b0 + 8 * j >= b.count) break;
      Register<T> other[kRegisters];
      load_chunk<kD>(b, b0 + 8 * j + g, d + c * kChunk<T>, other);
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

template <int kD, int kCount, typename T>
__device__ __forceinline__ void store_columns(const Rows<T>& out, int row, int d, const Acc<T> (&x)[kCount]) {
  const int D = width<kD>(out);
  if (row >= out.count || d >= D) return;
  T* p = out.data + row * out.stride + d;
  if (kD > 0 || out.vectorized) {
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

// out rows a0 + 0..15 <- w b, with w [16][b.count] as dot_rows leaves it.
template <typename T, int kD, int kTiles>
__device__ __forceinline__ void weigh_rows(const Acc<T> (&w)[kTiles][4], const Rows<const T>& b, const Rows<T>& out,
                                           int a0) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  constexpr int kCount = kColumns<T, kTiles>, kChunks = kCount / kChunk<T>;
  constexpr int kStep = kPacked<T>;  // tiles that one mma takes: 8 rows of b, or 16
#pragma unroll(kD > 0 ? 8 : 1)
  for (int slab = 0; slab < width<kD>(b); slab += 8 * kCount) {
    Acc<T> sum[kCount][4] = {};
#pragma unroll
    for (int j = 0; j < kTiles; j += kStep) {
      if (8 * j >= b.count) break;
      Register<T> rows[kStep][2][kChunks][kRegisters];  // two neighboring rows of each tile
#pragma unroll
      for (int s = 0; s < kStep; ++s) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int i = 0; i < kChunks; ++i) {
            load_chunk<kD>(b, 8 * (j + s) + 2 * c + r, slab + kCount * column_group(g) + i * kChunk<T>, rows[s][r][i]);
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
      for (int n = 0; n < kCount; ++n) {
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
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Acc<T> x[kCount];
#pragma unroll
        for (int n = 0; n < kCount; ++n) x[n] = sum[n][2 * half + side];
        store_columns<kD, kCount>(out, a0 + g + 8 * half, slab + kCount * column_group(2 * c + side), x);
      }
    }
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

// The largest score (in units of log 2) of a row and 1 / the sum of its exponentials.
template <typename A>
struct Softmax {
  A largest, inverse;
};

constexpr double kLog2e = 1.4426950408889634;  // the exponentials are powers of two: one instruction

// x <- softmax(scale x) over columns 0..T-1; the other columns become 0. One Softmax for row g, one for row g + 8.
template <int kTiles, typename A>
__device__ __forceinline__ void softmax_rows(A (&x)[kTiles][4], int T, A scale, Softmax<A> (&rows)[2]) {
  const int c = threadIdx.x % 4;
  const A absent = -A(3e38);
  scale *= A(kLog2e);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    A largest = absent, sum = 0;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        x[j][i] = 8 * j + 2 * c + i % 2 < T ? x[j][i] * scale : absent;
        largest = x[j][i] > largest ? x[j][i] : largest;
      }
    }
    largest = quad_max(largest);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) sum += x[j][i] = power_of_two(x[j][i] - largest);
    }
    rows[half] = {largest, 1 / quad_sum(sum)};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) x[j][i] *= rows[half].inverse;
    }
  }
}

}  // namespace pyvidx::cuda
