// The gradient of temporal_attention over 8 frames, the most common clip, where D is a whole number of cache lines.
// Scores are dot products along D, a vector of them at a time: nothing is transposed. A task's rows are packed, since
// H * D is often a power of two and then they all fall into the same few sets of L1. The next task's rows replace them
// line by line, once the last product has used a line, so that loads overlap arithmetic. This order (one line of all
// rows, then the next) is one that the hardware's prefetcher follows: without prefetch, row by row took twice as long.
// Every row is read and written once. Forward the same way gained nothing at H = 16.
#pragma once
#include <algorithm>
#include <array>

#include "temporal_attention.h"

namespace pyvidx {
namespace {

constexpr int kEight = 8;

template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);  // elements of a cache line

template <typename T>
using Rows = std::array<Matrix<const T>, 4>;  // q, k, v and grad_out of one task

template <typename T>
struct Packed {
  Acc<T>* memory;  // [part][frame][D]
  int64_t D;

  Acc<T>* part(int i) const { return memory + i * kEight * D; }
  // One line of all rows.
  PYVIDX_SIMD void fill(const Rows<T>& from, int64_t begin) const {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
#pragma GCC unroll 8
      for (int i = 0; i < kEight; ++i) {
#pragma GCC unroll 8
        for (int64_t d = 0; d < kLine<T>; d += kWidth<T>)
          simd::write(memory + (part * kEight + i) * D + begin + d,
                      load(from[part].data + i * from[part].row + begin + d));
      }
    }
  }
  // One line of the first three parts to `out`. Lines streamed by halves that do not follow each other take twice as
  // long, so where a vector is no whole line the gradients wait here.
  template <typename How>
  PYVIDX_SIMD void drain(T* out, int64_t row, int64_t part, int64_t begin, How how) const {
    for (int p = 0; p < 3; ++p) {
#pragma GCC unroll 8
      for (int i = 0; i < kEight; ++i) {
#pragma GCC unroll 8
        for (int64_t d = 0; d < kLine<T>; d += kWidth<T>)
          store(out + p * part + i * row + d, simd::read<Vec<T>>(memory + (p * kEight + i) * D + begin + d), how);
      }
    }
  }
};

// Fetches the rows of a task in the order in which they are packed, a share at each of `calls` calls: all at once they
// would hold up every other load.
template <typename T>
class Ahead {
 public:
  Ahead(const Rows<T>& rows, int64_t D, int calls)
      : rows_(rows), units_(4 * D / kLine<T>), share_((units_ + calls - 1) / calls) {}
  PYVIDX_INLINE void operator()() {
    for (const int64_t end = std::min(unit_ + share_, units_); unit_ < end; ++unit_) {
      const Matrix<const T>& part = rows_[unit_ % 4];
      for (int i = 0; i < kEight; ++i) simd::prefetch(part.data + i * part.row + unit_ / 4 * kLine<T>);
    }
  }

 private:
  const Rows<T>& rows_;
  int64_t unit_ = 0, units_, share_;
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

// w[key][query] <- <q[query], k[key]>, one vector of w after the other; meanwhile() is called before each.
template <typename V, typename A, typename F>
__attribute__((noinline)) void scores_of_eight(const A* q, const A* k, int64_t D, A* w, F& meanwhile) {
  constexpr int kLanes = sizeof(V) / sizeof(A), kQueries = kLanes < kEight ? kLanes : kEight, kKeys = kLanes / kQueries;
  for (int j = 0; j < kEight; j += kKeys) {
    for (int i = 0; i < kEight; i += kQueries) {
      meanwhile();
      V sums[kLanes];
#pragma GCC unroll 16
      for (V& sum : sums) sum = V{};  // GCC clears a whole array through memory
      for (int64_t d = 0; d < D; d += kLanes) {
        V b[kKeys];
#pragma GCC unroll 2
        for (int c = 0; c < kKeys; ++c) b[c] = simd::read<V>(k + (j + c) * D + d);
#pragma GCC unroll 8
        for (int r = 0; r < kQueries; ++r) {
          const V a = simd::read<V>(q + (i + r) * D + d);
#pragma GCC unroll 2
          for (int c = 0; c < kKeys; ++c) sums[c * kQueries + r] += a * b[c];
        }
      }
      simd::write(w + j * kEight + i, sums_of(sums, std::make_index_sequence<kLanes>()));
    }
  }
}

// put(part, frame, gradient) for one vector of columns of all gradients; each part's after the last use of that part.
//   grad_q[i] <- sum_j dw[j][i] k[j], grad_k[j] <- sum_i dw[j][i] q[i], grad_v[j] <- sum_i w[j][i] grad_out[i]
template <typename V, typename A, typename Put>
PYVIDX_SIMD void gradients_of_eight(const A* w, const A* dw, const A* q, const A* k, const A* grad, int64_t D,
                                    Put&& put) {
  V rows[kEight], sums[kEight];
#pragma GCC unroll 8
  for (int i = 0; i < kEight; ++i) rows[i] = simd::read<V>(q + i * D), sums[i] = V{};
#pragma GCC unroll 8
  for (int j = 0; j < kEight; ++j) {
    const V b = simd::read<V>(k + j * D);
    V sum = {};
#pragma GCC unroll 8
    for (int i = 0; i < kEight; ++i) {
      const A s = dw[j * kEight + i];
      sums[i] += s * b;
      sum += s * rows[i];
    }
    put(1, j, sum);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kEight; ++i) put(0, i, sums[i]), rows[i] = simd::read<V>(grad + i * D);
#pragma GCC unroll 8
  for (int j = 0; j < kEight; ++j) {
    V sum = w[j * kEight] * rows[0];
#pragma GCC unroll 8
    for (int i = 1; i < kEight; ++i) sum += w[j * kEight + i] * rows[i];
    put(2, j, sum);
  }
}

template <typename T>
void attend_eight_backward(const TemporalAttentionBackwardArgs& a, const Executor& executor) {
  using A = Acc<T>;
  using Query = std::conditional_t<simd::kBytes == 64 && sizeof(A) == 4, HalfVector, Vec<T>>;
  const int64_t D = a.qkv.size[5], tasks = a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4];
  const bool stream = streams<T>(a.grad_qkv);
  const auto rows_at = [&](Task t) {
    return Rows<T>{part_of<T>(a.qkv, t, 0), part_of<T>(a.qkv, t, 1), part_of<T>(a.qkv, t, 2),
                   rows_of<T>(a.grad_out, t)};
  };
  parallel_for(executor, tasks, kGrainElements / (7 * kEight * D) + 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(4 * kEight * D * sizeof(A));
    const Packed<T> x{scratch.take<A>(4 * kEight * D), D};
    alignas(64) A w[kEight * kEight], dw[kEight * kEight];
    bool first = true;
    each_task(a.qkv, begin, end, [&](Task task, Task next_task) {
      const Rows<T> next = rows_at(next_task);
      if (first) {
        for (int64_t d = 0; d < D; d += kLine<T>) x.fill(rows_at(task), d);
      }
      first = false;
      Ahead<T> ahead(next, D, 2 * kEight * kEight / kWidth<T>);
      scores_of_eight<Vec<T>>(x.part(0), x.part(1), D, w, ahead);
      softmax_columns<Query>(w, kEight, kEight, A(a.scale));
      scores_of_eight<Vec<T>>(x.part(3), x.part(2), D, dw, ahead);
      softmax_columns_backward<Query>(w, dw, kEight, kEight, A(a.scale));
      T* const out = a.grad_qkv.at<T>(task.b, 0, task.p, 0, task.h);
      const int64_t row = a.grad_qkv.stride[1], part = a.grad_qkv.stride[3];
      const auto products = [&](auto how) __attribute__((always_inline)) {
        for (int64_t line = 0; line < D; line += kLine<T>) {
          for (int64_t d = line; d < line + kLine<T>; d += kWidth<T>) {
            const auto put = [&](int p, int i, Vec<T> v) __attribute__((always_inline)) {
              if constexpr (kWidth<T> == kLine<T>)
                store(out + p * part + i * row + d, v, how);
              else
                simd::write(x.part(p) + i * D + d, v);
            };
            gradients_of_eight<Vec<T>>(w, dw, x.part(0) + d, x.part(1) + d, x.part(3) + d, D, put);
          }
          if constexpr (kWidth<T> != kLine<T>) x.drain(out + line, row, part, line, how);
          x.fill(next, line);
        }
      };
      stream ? products(simd::Stream{}) : products(simd::Full{});
    });
    simd::fence();
  });
}

}  // namespace
}  // namespace pyvidx
