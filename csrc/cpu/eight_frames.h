// temporal_attention and its gradient over 8 frames, the most common clip, where D is a whole number of cache lines.
// Scores are dot products along D, a vector of them at a time: nothing is transposed. The rows of q and grad_out, which
// both products of a part use over and over, are packed, line by line: [D / line][frame], so that all addresses within
// a line are constants (as they lie, H * D is often a power of two, and they all fall into the same few sets of L1).
// Those of k and v are read where they are. The rows of a later task are fetched meanwhile, one line of all rows, then
// the next: an order that the hardware's prefetcher follows. Every row is written once, in whole lines: lines streamed
// by halves that do not follow each other take twice as long.
//
// Tried at v3, CLIP-L/14 on a Zen 4: time over that of the way before, float32 forward, backward; bfloat16 alike
//   whole lines, everything packed  .77 .75; .78 .73
//   + k and v where they are        .73 .77; .56 .74  kept
//   + no search for NaN in sums     .73 .77; .53 .68  kept
//   + 4 rows by 2 vectors of 16 bit .75 .79; .53 .69  thrown away
//   + rows fetched 3 tasks ahead    bfloat16 1.71 to 1.60 ms, backward 3.33 to 3.07; float32 2.50 to 2.39, 3.97 to 3.68
//   + a shorter e^x for bfloat16    1.63 to 1.59, 3.14 to 3.06  kept, both
// Backward in bfloat16 arithmetic binds there: 7,500 instructions a task (2,800 multiply-adds, 1,400 cycles at two a
// cycle; 1,056 to round), 2,260 cycles from the caches and 2,790 from memory, where a copy takes 1,410.
#pragma once
#include <algorithm>
#include <array>

#include "pairs.h"
#include "temporal_attention.h"

namespace pyvidx {
namespace {

constexpr int kEight = 8;
constexpr int64_t kTasksAhead = 3;  // the one whose rows are fetched; 2 and 4 do as well, 1 takes 7 % longer

template <typename T>
constexpr int kLine = 64 / sizeof(T);  // elements of a cache line
template <typename T>
constexpr int kLineVectors = kLine<T> / kWidth<T>;

// Vector c of a cache line's elements, in the order of pairs.h: the same for all rows, but not that of the memory.
template <typename T>
PYVIDX_SIMD Vec<T> load_of_line(const T* line, int c) {
  const T* const pair = line + c / 2 * 2 * kWidth<T>;
  return c % 2 ? load(pair, simd::Second{}) : load(pair, simd::First{});
}

template <typename T, typename How>
PYVIDX_SIMD void store_line(T* line, const Vec<T> (&x)[kLineVectors<T>], How how) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    using Part = std::conditional_t<std::is_same_v<How, simd::Stream>, simd::PairStream, simd::Pair>;
#pragma GCC unroll 8
    for (int c = 0; c < kLineVectors<T>; c += 2) store(line + c * kWidth<T>, simd::Two(x[c], x[c + 1]), Part{});
  } else {
#pragma GCC unroll 8
    for (int c = 0; c < kLineVectors<T>; ++c) store(line + c * kWidth<T>, x[c], how);
  }
}

// Step to the next row. GCC would otherwise find all rows' addresses before the loop over lines and keep them on the
// stack: as many loads again as there are rows.
template <typename T>
PYVIDX_SIMD void step(T*& row, int64_t stride) {
  row += stride;
  asm("" : "+r"(row));
}

template <typename T, int kParts>
using Rows = std::array<Matrix<const T>, kParts>;  // q, k, v (and grad_out) of one task

// to [D / kLine][frame][kLine] <- the rows as they are computed with.
template <typename T>
PYVIDX_SIMD void pack_eight(Matrix<const T> from, int64_t D, Acc<T>* to) {
  for (int64_t d = 0; d < D; d += kLine<T>) {
    const T* row = from.data + d;
#pragma GCC unroll 8
    for (int frame = 0; frame < kEight; ++frame, step(row, from.row), to += kLine<T>) {
#pragma GCC unroll 8
      for (int c = 0; c < kLineVectors<T>; ++c) simd::write(to + c * kWidth<T>, load_of_line(row, c));
    }
  }
}

// Fetches the rows of a task in the order in which they are packed, a share at each of `calls` calls: all at once they
// would hold up every other load.
template <typename T, int kParts>
class Ahead {
 public:
  Ahead(const Rows<T, kParts>& rows, int64_t D, int calls)
      : rows_(rows), D_(D), share_((kParts * D / kLine<T> + calls - 1) / calls) {}
  PYVIDX_INLINE void operator()() {
    for (int64_t i = 0; i < share_ && begin_ < D_; ++i) {
      const T* row = rows_[part_].data + begin_;
#pragma GCC unroll 8
      for (int frame = 0; frame < kEight; ++frame, step(row, rows_[part_].row)) simd::prefetch(row);
      if (++part_ == kParts) part_ = 0, begin_ += kLine<T>;
    }
  }

 private:
  const Rows<T, kParts>& rows_;
  int64_t D_, share_, begin_ = 0;
  int part_ = 0;
};

// Lane i <- the sum over the lanes of x[i].
template <typename V, size_t kCount, size_t... i>
PYVIDX_SIMD V sums_of(const V (&x)[kCount], std::index_sequence<i...> lanes) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    constexpr size_t kHalf = kCount / 2;
    V next[kHalf];
#pragma GCC unroll 8
    for (size_t j = 0; j < kHalf; ++j)
      next[j] = interleave_low(x[j], x[j + kHalf], lanes) + interleave_high(x[j], x[j + kHalf], lanes);
    return sums_of(next, lanes);
  }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// The same within the 128-bit halves first: a shuffle across them is four instructions instead of two.
template <size_t... i>
PYVIDX_SIMD simd::VF sums_of(const simd::VF (&x)[8], std::index_sequence<i...>) {
  const auto add = [](simd::VF a, simd::VF b) __attribute__((always_inline)) {
    return (simd::VF)_mm256_unpacklo_ps((__m256)a, (__m256)b) + (simd::VF)_mm256_unpackhi_ps((__m256)a, (__m256)b);
  };
  const simd::VF low = add(add(x[0], x[2]), add(x[1], x[3])), high = add(add(x[4], x[6]), add(x[5], x[7]));
  return (simd::VF)_mm256_permute2f128_ps((__m256)low, (__m256)high, 0x20) +
         (simd::VF)_mm256_permute2f128_ps((__m256)low, (__m256)high, 0x31);
}
#endif

// One vector of w[key][query] <- <q[query], k[key]>. Apart from the loop over vectors, or GCC keeps the sums in memory.
template <typename T>
__attribute__((noinline)) void score_vector(const Acc<T>* queries, Matrix<const T> keys, int64_t D, Acc<T>* w) {
  using V = Vec<T>;
  constexpr int kLanes = kWidth<T>, kQueries = kLanes < kEight ? kLanes : kEight;
  V sums[kLanes];
#pragma GCC unroll 16
  for (V& sum : sums) sum = V{};  // GCC clears a whole array through memory
  for (int64_t d = 0; d < D; d += kLine<T>, queries += kEight * kLine<T>) {
#pragma GCC unroll 8
    for (int c = 0; c < kLineVectors<T>; ++c) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const V key = load_of_line(keys.data + i / kQueries * keys.row + d, c);
        sums[i] += simd::read<V>(queries + i % kQueries * kLine<T> + c * kLanes) * key;
      }
    }
  }
  simd::write(w, sums_of(sums, std::make_index_sequence<kLanes>()));
}

// All of w; meanwhile() is called before each vector.
template <typename T, typename F>
PYVIDX_SIMD void scores_of_eight(const Acc<T>* q, Matrix<const T> k, int64_t D, Acc<T>* w, F& meanwhile) {
  for (int i = 0; i < kEight * kEight; i += kWidth<T>) {
    meanwhile();
    score_vector<T>(q + i % kEight * kLine<T>, {k.data + i / kEight * k.row, k.row}, D, w + i);
  }
}

// One line of out[i] <- sum_j w(i, j) x[j]: w(i, j) = w[j][i] where the queries are the rows of `out`, else w[i][j].
// x_at(): that line of x[0]; next() steps to the next row
template <typename T, bool kOfQueries, typename A, typename F, typename How>
PYVIDX_SIMD void weigh_eight(const A* w, F&& x_at, T* out, int64_t row, How how) {
  constexpr int kVectors = kLineVectors<T>, kRows = kVectors < kEight ? kEight / kVectors : 1;
  constexpr int kRow = kOfQueries ? 1 : kEight, kStep = kOfQueries ? kEight : 1;
  for (int i = 0; i < kEight; i += kRows) {
    Vec<T> sums[kRows][kVectors];
    auto x = x_at();
#pragma GCC unroll 8
    for (int j = 0; j < kEight; ++j, x.next()) {
      Vec<T> b[kVectors];
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) b[c] = x.vector(c);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const A a = w[(i + r) * kRow + j * kStep];
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) sums[r][c] = j == 0 ? a * b[c] : sums[r][c] + a * b[c];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r, step(out, row)) store_line(out, sums[r], how);
  }
}
template <typename T>
struct PackedLine {
  const Acc<T>* line;
  PYVIDX_SIMD Vec<T> vector(int c) const { return simd::read<Vec<T>>(line + c * kWidth<T>); }
  PYVIDX_SIMD void next() { step(line, kLine<T>); }
};
template <typename T>
struct LineInPlace {
  const T* line;
  int64_t row;
  PYVIDX_SIMD Vec<T> vector(int c) const { return load_of_line(line, c); }
  PYVIDX_SIMD void next() { step(line, row); }
};

// The vector along which the queries lie for the softmax.
template <typename T>
using QueriesOfEight = std::conditional_t<simd::kBytes == 64 && sizeof(Acc<T>) == 4, HalfVector, Vec<T>>;

template <typename T>
constexpr int kScoreCalls = kEight * kEight / kWidth<T>;  // of scores_of_eight's meanwhile

template <typename T>
void attend_eight(const TemporalAttentionArgs& a, const Executor& executor) {
  using A = Acc<T>;
  const int64_t D = a.qkv.size[5], tasks = a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4];
  const bool stream = streams<T>(a.out);
  const auto rows_at = [&](Task t) {
    return Rows<T, 3>{part_of<T>(a.qkv, t, 0), part_of<T>(a.qkv, t, 1), part_of<T>(a.qkv, t, 2)};
  };
  parallel_for(executor, tasks, kGrainElements / (4 * kEight * D) + 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(kEight * D * sizeof(A));
    A* const q = scratch.take<A>(kEight * D);
    alignas(64) A w[kEight * kEight];
    each_task(a.qkv, begin, end, kTasksAhead, [&](Task task, Task next_task) {
      const Rows<T, 3> rows = rows_at(task), next = rows_at(next_task);
      Ahead<T, 3> ahead(next, D, kScoreCalls<T>);
      pack_eight(rows[0], D, q);
      scores_of_eight<T>(q, rows[1], D, w, ahead);
      softmax_columns<QueriesOfEight<T>, std::is_same_v<T, BFloat16>>(w, kEight, kEight, A(a.scale));
      T* const out = a.out.at<T>(task.b, 0, task.p, task.h);
      const auto products = [&](auto how) __attribute__((always_inline)) {
        for (int64_t d = 0; d < D; d += kLine<T>) {
          weigh_eight<T, true>(
              w, [&] { return LineInPlace<T>{rows[2].data + d, rows[2].row}; }, out + d, a.out.stride[1], how);
        }
      };
      stream ? products(simd::Stream{}) : products(simd::Full{});
    });
    simd::fence();
  });
}

template <typename T>
void attend_eight_backward(const TemporalAttentionBackwardArgs& a, const Executor& executor) {
  using A = Acc<T>;
  const int64_t D = a.qkv.size[5], tasks = a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4];
  const bool stream = streams<T>(a.grad_qkv);
  const auto rows_at = [&](Task t) {
    return Rows<T, 4>{part_of<T>(a.qkv, t, 0), part_of<T>(a.qkv, t, 1), part_of<T>(a.qkv, t, 2),
                      rows_of<T>(a.grad_out, t)};
  };
  parallel_for(executor, tasks, kGrainElements / (7 * kEight * D) + 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(2 * kEight * D * sizeof(A));
    A *const q = scratch.take<A>(kEight * D), *const grad = scratch.take<A>(kEight * D);
    alignas(64) A w[kEight * kEight], dw[kEight * kEight];
    each_task(a.qkv, begin, end, kTasksAhead, [&](Task task, Task next_task) {
      const Rows<T, 4> rows = rows_at(task), next = rows_at(next_task);
      Ahead<T, 4> ahead(next, D, 2 * kScoreCalls<T>);
      pack_eight(rows[0], D, q);
      pack_eight(rows[3], D, grad);
      scores_of_eight<T>(q, rows[1], D, w, ahead);
      softmax_columns<QueriesOfEight<T>, std::is_same_v<T, BFloat16>>(w, kEight, kEight, A(a.scale));
      scores_of_eight<T>(grad, rows[2], D, dw, ahead);
      softmax_columns_backward<QueriesOfEight<T>>(w, dw, kEight, kEight, A(a.scale));
      T* const out = a.grad_qkv.at<T>(task.b, 0, task.p, 0, task.h);
      const int64_t row = a.grad_qkv.stride[1], part = a.grad_qkv.stride[3];
      const auto products = [&](auto how) __attribute__((always_inline)) {
        for (int64_t d = 0; d < D; d += kLine<T>) {
          weigh_eight<T, true>(dw, [&] { return LineInPlace<T>{rows[1].data + d, rows[1].row}; }, out + d, row, how);
          weigh_eight<T, false>(dw, [&] { return PackedLine<T>{q + d * kEight}; }, out + part + d, row, how);
          weigh_eight<T, false>(w, [&] { return PackedLine<T>{grad + d * kEight}; }, out + 2 * part + d, row, how);
        }
      };
      stream ? products(simd::Stream{}) : products(simd::Full{});
    });
    simd::fence();
  });
}

}  // namespace
}  // namespace pyvidx
